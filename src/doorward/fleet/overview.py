"""What became of a fleet: a table of all models as CSV, an overview page, and the report of each."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from doorward._version import __version__
from doorward.core.formatting import duration, number, plain
from doorward.core.records import SEVERITY
from doorward.core.report_json import from_json
from doorward.fleet.remote import Folder
from doorward.fleet.store import Done, FleetStore
from doorward.reports import to_html
from doorward.reports.page import template

#: Verdicts as they are shown, the worst first; then what has none.
ORDER = (*sorted(SEVERITY, key=lambda verdict: -SEVERITY[verdict]), "failed", "running", "waiting")
COLUMNS = ("path", "digest", "state", "verdict", "p_value", "targets", "seconds", "peak_memory", "error")


def standing(one: Done) -> str:
    """Return a model's verdict, or its state where it has none."""
    return one.verdict or one.state


def worst_first(rows: Iterable[Done]) -> list[Done]:
    """Return models in the order of their verdicts, the worst first, then of their paths."""
    return sorted(rows, key=lambda one: (ORDER.index(standing(one)), one.path))


def to_csv(rows: Iterable[Done]) -> str:
    """Write one line for each place."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for one in rows:
        values = one.model_dump() | {"targets": "; ".join(one.targets)}
        cells = ["" if values[name] is None else plain(str(values[name])) for name in COLUMNS]
        # no formula in spreadsheets
        table.writerow([f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell for cell in cells])
    return text.getvalue()


def to_text(rows: Sequence[Done], counts: dict[str, int]) -> str:
    """Write how many models there are of each verdict, and name those with an alarm or without a verdict."""
    told = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in ORDER if counts.get(name)]
    lines = [", ".join(told) if told else "the store is empty"]
    lines += [
        f"  {standing(one).replace('_', ' ')}: {plain(one.path)}{_more(one)}"
        for one in worst_first(rows)
        if standing(one) not in ("nothing_found", "waiting", "running")
    ]
    return "\n".join(lines) + "\n"


def _more(one: Done) -> str:
    if one.error:
        return f": {plain(one.error)}"
    targets = f" ({', '.join(map(plain, one.targets))})" if one.targets else ""
    return targets + (f", p = {number(one.p_value)}" if one.p_value is not None else "")


def to_page(rows: Sequence[Done], linked: frozenset[str] = frozenset()) -> str:
    """Write the overview: counts, and a table that can be narrowed to one verdict; no script is needed.

    Args:
        linked: keys of models whose reports lie in `reports/KEY.html`.
    """
    ordered = worst_first(rows)
    counts = Counter(map(standing, ordered))
    return template("overview.html.j2", ("doorward.fleet",)).render(
        rows=ordered,
        worst=standing(ordered[0]) if ordered else "waiting",
        standing=standing,
        counts=[(name, counts[name]) for name in ORDER if counts[name]],
        days=_days(ordered),
        linked=linked,
        number=number,
        duration=duration,
        date=lambda at: time.strftime("%Y-%m-%d %H:%M", time.gmtime(at)) if at else "",
        version=__version__,
    )


def _days(rows: Iterable[Done]) -> list[tuple[str, dict[str, int]]]:
    """Return how many models of each verdict ended on each day, the last thirty of those with any."""
    days: dict[str, Counter[str]] = {}
    for one in rows:
        if one.finished is not None:
            day = time.strftime("%Y-%m-%d", time.gmtime(one.finished))
            days.setdefault(day, Counter())[standing(one)] += 1
    return [(day, dict(days[day])) for day in sorted(days)[-30:]]


def write_overview(store: FleetStore, out: Folder) -> None:
    """Write `index.html`, `models.csv`, and for each model its report as JSON and HTML in `reports/`.

    A report that is there already is left as it is: what is done does not change.

    Raises:
        InputError: if the folder cannot be written.
    """
    rows = list(store.rows())
    there = out.names("reports")
    linked = set()
    for key in sorted({one.key for one in rows if one.state == "done"}):
        linked.add(key)
        if f"{key}.html" in there:
            continue
        text = store.report(key)
        if text is None:
            linked.discard(key)
            continue
        out.write(f"reports/{key}.json", text)
        out.write(f"reports/{key}.html", to_html(from_json(text)))
    out.write("models.csv", to_csv(rows))
    out.write("index.html", to_page(rows, frozenset(linked)))
