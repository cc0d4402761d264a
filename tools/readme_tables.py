"""Write the tables of README and docs from the results that are committed (`make docs`).

A table stands between <!-- SUITE --> and <!-- end -->, and is what `doorward bench show SUITE` says of
benchmarks/results/SUITE-cpu.json.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from doorward.bench import results, summary, tables
from doorward.bench.suite import get_suite
from doorward.core.errors import InputError
from doorward.scan.calibration import shipped

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
#: Where the table of each suite stands; those in the docs appear with their results.
PAGES = {"scan-population": README, "null": README} | {
    suite: page
    for suite, page in dict.fromkeys(("attacks", "scan-attacks"), ROOT / "docs" / "attacks.md").items()
    if results.results_file(RESULTS, suite, "cpu").is_file()
}

#: What is said above results that are not of the scan as it is shipped.
EARLIER = (
    "*These are results of an earlier version of the scan, by an earlier bank; they are to be measured anew.*"
)


def marks(suite: str) -> re.Pattern[str]:
    """Return what finds a table's place in a page, with the marks as its groups."""
    return re.compile(rf"(<!-- {suite} -->\n).*?(<!-- end -->)", re.DOTALL)


def table(suite: str, folder: Path = RESULTS) -> str:
    """Return a suite's table.

    Raises:
        InputError: if its results are missing, or are something else.
    """
    held = results.read_results(results.results_file(folder, suite, "cpu"))
    shown = tables.to_markdown(summary.summarise(get_suite(suite), held))
    return shown if is_current(held) else f"{EARLIER}\n\n{shown}"


def is_current(held: results.Results) -> bool:
    """Return whether results are judged by the calibration set that is shipped, if by any."""
    return held.made_with.get("calibration", ()) in ((), (results.calibration_label(shipped()),))


def in_page(page: str, folder: Path = RESULTS) -> str:
    """Return a page with each table in its place; what has no place is left out.

    Raises:
        InputError: if a table has a place and no results.
    """
    for suite in PAGES:
        if place := marks(suite).search(page):
            page = f"{page[: place.end(1)]}\n{table(suite, folder)}\n{page[place.start(2) :]}"
    return page


if __name__ == "__main__":
    try:
        for file in sorted(set(PAGES.values())):
            file.write_text(in_page(file.read_text(encoding="utf-8")), encoding="utf-8")
    except InputError as error:
        sys.exit(f"error: {error}")
