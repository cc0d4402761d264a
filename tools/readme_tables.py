"""Write the tables of README and docs from the results that are committed (`make docs`).

A table stands between <!-- NAME --> and <!-- end -->. NAME is a suite, whose table is what `doorward bench
show` says of benchmarks/results/NAME-cpu.json; or `file scanners`, `foreign models`, `guard load`, `strip
forwards`, or the README's short table of the models, `results`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import file_scanners  # noqa: E402
import foreign_models  # noqa: E402
import guard_load  # noqa: E402
import strip_forwards  # noqa: E402
from doorward.bench import results, summary, tables  # noqa: E402
from doorward.bench.suite import Scale, get_suite  # noqa: E402
from doorward.core.errors import InputError  # noqa: E402
from doorward.core.formatting import percent  # noqa: E402
from doorward.stats.metrics import rate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SCALE: Scale = "cpu"
README, MEASURED, ATTACKS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "attacks.md"
TRAINING_DATA, REPAIRS = ROOT / "docs" / "training-data.md", ROOT / "docs" / "repairs.md"
GUARD = ROOT / "docs" / "guard.md"

#: The suites of the page of results.
SHORT = ("scan-population", "null")
#: Where the table of each suite stands that appears with its results.
WITH_RESULTS = dict.fromkeys(("attacks", "scan-attacks"), ATTACKS) | {
    "training-data": TRAINING_DATA,
    "imbalanced-data": TRAINING_DATA,
    "repairs": REPAIRS,
}
#: Where the table of each suite stands.
SUITES = dict.fromkeys(SHORT, MEASURED) | {
    suite: file
    for suite, file in WITH_RESULTS.items()
    if results.results_file(RESULTS, suite, SCALE).is_file()
}
#: Where every table stands.
PAGES = {
    "results": README,
    "file scanners": MEASURED,
    "foreign models": MEASURED,
    "guard load": GUARD,
    "strip forwards": GUARD,
} | SUITES

#: What is said above results that are not of the scan as it is shipped.
EARLIER = (
    "*These are results of an earlier version of the scan, with an earlier calibration set. They have not "
    "been measured again.*"
)


def marks(name: str) -> re.Pattern[str]:
    """Return what finds a table's place in a page, with the marks as its groups."""
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str, folder: Path = RESULTS) -> str:
    """Return the table of that name.

    Raises:
        InputError: if its results are missing, or are something else.
    """
    if name == "file scanners":
        return file_scanners.table(_json(folder / file_scanners.RESULTS.name))
    if name == "foreign models":
        return foreign_models.table(_json(folder / "foreign-models.json")["models"])
    if name == "guard load":
        return guard_load.table(_json(folder / "guard-load.json"))
    if name == "strip forwards":
        return strip_forwards.table(_json(folder / "strip-forwards.json"))
    if name == "results":
        return foreign_table(folder)
    held = read(name, folder)
    shown = tables.to_markdown(summary.summarise(get_suite(name), held))
    return shown if is_current(held) else f"{EARLIER}\n\n{shown}"


def foreign_table(folder: Path = RESULTS) -> str:
    """Return the README's table: what a scan says of models that others' code made, with 95 % intervals.

    Raises:
        InputError: if the results are missing.
    """
    rows = _json(folder / "foreign-models.json")["models"]
    lines = []
    for told, (word, count, of) in foreign_models.outcomes(rows).items():
        low, high = (percent(bound) for bound in _interval(count, of))
        lines.append(f"| {told} | {count} of {of} {word} | {low} to {high} |\n")
    return "| models | outcome | 95 % interval |\n|---|---|---|\n" + "".join(lines)


def _interval(count: int, of: int) -> tuple[float, float]:
    found = rate(count, of)
    return found.low, found.high


def _json(file: Path) -> Any:
    """Read a results file.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from error


def read(suite: str, folder: Path = RESULTS) -> results.Results:
    """Read a suite's results.

    Raises:
        InputError: if they are missing, or are something else.
    """
    return results.read_results(results.results_file(folder, suite, SCALE))


def is_current(held: results.Results) -> bool:
    """Return whether results are judged by the calibration set that is shipped, if by any."""
    return held.made_with.get("calibration", ()) in (
        (),
        (results.calibration_label(results.shipped_for(get_suite(held.suite))),),
    )


def in_page(page: str, folder: Path = RESULTS) -> str:
    """Return a page with each table in its place; what has no place is left out.

    Raises:
        InputError: if a table has a place and no results.
    """
    for name in PAGES:
        if place := marks(name).search(page):
            page = f"{page[: place.end(1)]}\n{table(name, folder)}\n{page[place.start(2) :]}"
    return page


if __name__ == "__main__":
    try:
        for file in sorted(set(PAGES.values())):
            file.write_text(in_page(file.read_text(encoding="utf-8")), encoding="utf-8")
    except InputError as error:
        sys.exit(f"error: {error}")
