"""Write the tables of README and docs from the results that are committed (`make docs`).

A table stands between <!-- NAME --> and <!-- end -->. NAME is a suite, whose table is what `doorward bench
show` says of benchmarks/results/NAME-cpu.json; or `file scanners`, or the README's short table of `results`.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import file_scanners  # noqa: E402
from doorward.bench import results, summary, tables  # noqa: E402
from doorward.bench.suite import Measure, Scale, get_suite  # noqa: E402
from doorward.core.errors import InputError  # noqa: E402
from doorward.core.formatting import percent  # noqa: E402
from doorward.core.records import Rate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SCALE: Scale = "cpu"
README, MEASURED, ATTACKS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "attacks.md"
TRAINING_DATA = ROOT / "docs" / "training-data.md"

#: The suites whose results the README's short table is made of.
SHORT = ("scan-population", "null")
#: Where the table of each suite stands; those of the attacks appear with their results.
SUITES = dict.fromkeys(SHORT, MEASURED) | {
    suite: ATTACKS
    for suite in ("attacks", "scan-attacks")
    if results.results_file(RESULTS, suite, SCALE).is_file()
}
if results.results_file(RESULTS, "training-data", SCALE).is_file():
    SUITES["training-data"] = TRAINING_DATA
#: Where every table stands.
PAGES = {"results": README, "file scanners": MEASURED} | SUITES

#: What is said above results that are not of the scan as it is shipped.
EARLIER = (
    "*These are results of an earlier version of the scan, with an earlier calibration set. They have not "
    "been measured again.*"
)


@dataclass(frozen=True)
class Line:
    """A line of the README's short table.

    Attributes:
        about: which models.
        counted: what is counted of them, as `measure` does.
        groups: of the suite; all that its claims are about if empty.
    """

    about: str
    counted: str
    suite: str
    measure: Measure
    groups: tuple[str, ...] = ()

    def count(self, held: results.Results) -> Rate:
        """Count what the line is about in the suite's results."""
        groups = self.groups or tuple(
            group.name for group in get_suite(self.suite).groups(SCALE) if not group.excluded_from_claims
        )
        return summary.measure(self.measure, [one for one in held.results if one.group in groups])


DATA = {"fashion_mnist": "clothes", "mnist": "digits", "gtsrb": "traffic signs"}
LINES = (
    *(
        Line(f"planted patch, {what}", "found", SHORT[0], "exact_target", (f"{name}-badnets",))
        for name, what in DATA.items()
    ),
    Line(
        "source-specific or all-to-all patch",
        "found",
        SHORT[0],
        "exact_target",
        ("fashion_mnist-source-specific", "mnist-all-to-all"),
    ),
    Line(
        "clean, same data",
        "flagged",
        SHORT[0],
        "clean_wrong",
        tuple(f"{name}-clean" for name in DATA),
    ),
    Line("clean, 2 to 43 classes", "flagged", SHORT[1], "alarm_at_5"),
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
        file = folder / file_scanners.RESULTS.name
        try:
            return file_scanners.table(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror})") from error
    if name == "results":
        return short_table(folder)
    held = read(name, folder)
    shown = tables.to_markdown(summary.summarise(get_suite(name), held))
    return shown if is_current(held) else f"{EARLIER}\n\n{shown}"


def short_table(folder: Path = RESULTS) -> str:
    """Return the README's table: a few lines with counts and 95 % intervals.

    Raises:
        InputError: if results are missing, or are something else.
    """
    held = {suite: read(suite, folder) for suite in SHORT}
    rows = [(line, line.count(held[line.suite])) for line in LINES]
    made = "| models | outcome | 95 % interval |\n|---|---|---|\n" + "".join(
        f"| {line.about} | {one.successes} of {one.n} {line.counted} | "
        f"{percent(one.low)} to {percent(one.high)} |\n"
        for line, one in rows
    )
    return made if all(map(is_current, held.values())) else f"{EARLIER}\n\n{made}"


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
