"""Look at every kind of page in headless Chromium, and check it by axe-core.

    npm pack axe-core && tar xf axe-core-*.tgz package/axe.min.js
    python benchmarks/accessible_pages.py package/axe.min.js [--shots DIR]

shows each page at three widths, light and dark, with everything folded and unfolded, and goes through it by
the Tab key. It writes benchmarks/results/accessible-pages.json and ends with 4 if axe-core reports anything
serious or critical, something sticks out of the window, or a place that Tab reaches shows no focus. The pages
are those of the tests. Needs Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer

import measuring

sys.path.append(str(measuring.ROOT / "tests"))
import html_pages  # type: ignore[import-not-found]
import report_examples  # type: ignore[import-not-found]
import test_pages  # type: ignore[import-not-found]
from doorward.core.records import Report
from doorward.fleet.overview import to_page
from doorward.fleet.store import Done
from doorward.guard.serving.app import _Server
from doorward.guard.serving.watch import Rejected, _bars
from doorward.models.encode.image import encode_png
from doorward.reports import to_html

RESULTS = measuring.RESULTS / "accessible-pages.json"
VIEWS, HEIGHT = tuple(product((390, 1280, 2000), ("light", "dark"))), 1200
GRAVE = ("serious", "critical")
OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
#: Elements that Tab comes to, and whether the one that has the focus shows it.
STOPS = """document.querySelectorAll('a[href], summary, [tabindex="0"], input').length"""
FOCUS = """(() => { const e = document.activeElement, name = e.outerHTML.slice(0, 80);
  const shown = [e, e.parentElement].some(one => one && getComputedStyle(one).outlineStyle != "none");
  return e == document.body ? null : [name, shown]; })()"""


def status() -> str:
    """Return a status page of a guard that has raised an alarm."""
    rng = np.random.default_rng(0)
    picture = encode_png(rng.integers(0, 255, (28, 28, 1), dtype=np.uint8))
    watch = SimpleNamespace(
        inputs=1234,
        rejected_inputs=56,
        alarm="of the last 200 inputs 21 were rejected, of clean ones 2 would be",
        started=time.time() - 4000,
        histograms=lambda: [_bars("strip", rng.normal(0, 1, 300), rng.normal(1, 1, 300), 2.0)],
        newest=lambda: [Rejected(time.time(), picture, "3 (Dress)", ("strip: the entropy is low",))] * 5,
    )
    server = SimpleNamespace(watch=watch, guard=SimpleNamespace(rate=0.01), name="garments")
    return bytes(asyncio.run(_Server.status(server)).body).decode()  # type: ignore[arg-type]


def fleet() -> str:
    """Return an overview of models of every verdict."""
    verdicts = ("nothing_found", "suspicious", "backdoored", "unsafe", "could_not_tell")
    rows = [
        Done(
            key=f"{i:064d}",
            digest="d",
            path=f"/registry/team-{i % 3}/model-{i}.onnx",
            state="done",
            verdict=verdicts[i % 5],
            p_value=0.01 * i,
            targets=("Dress",) if i % 5 in (1, 2) else (),
            seconds=40.0 + i,
            finished=1.7e9 + 1e4 * i,
        )
        for i in range(30)
    ]
    failed = Done(key="f", digest="d", path="/registry/cut.onnx", state="failed", error="it is cut off")
    return to_page([*rows, failed], frozenset(one.key for one in rows))


def report(make: Callable[[], Report]) -> str:
    """Return the page of a report."""
    return to_html(make())


PAGES: dict[str, Callable[[], str]] = {
    **{f"report, {name}": partial(report, make) for name, make in report_examples.EXAMPLES.items()},
    "repair": test_pages.PAGES["repair"],
    "guard": test_pages.PAGES["guard"],
    "guard status": status,
    "fleet": fleet,
}


def checked(
    browser: html_pages.Browser,
    page: str,
    axe: str,
    shots: Path | None = None,
    name: str = "",
    views: Iterable[tuple[int, str]] = VIEWS,
) -> Iterator[Any]:
    """Yield what is found of a page at some widths and schemes, folded and unfolded."""
    for width, scheme in views:
        browser.show(page, width=width, height=HEIGHT, scheme=scheme)
        if shots is not None:
            file = f"{name.replace(', ', '-').replace(' ', '-')}-{width}-{scheme}.png"
            (shots / file).write_bytes(browser.screenshot())
        browser.driver.execute_script(axe)
        for unfolded in (False, True):
            if unfolded:
                browser.driver.execute_script(OPEN)
            found = browser.driver.execute_async_script(
                "axe.run(document, {resultTypes: ['violations']}).then(arguments[arguments.length - 1])"
            )
            yield {
                "width": width,
                "scheme": scheme,
                "unfolded": unfolded,
                "sticks_out": max(0, browser.ask("document.documentElement.scrollWidth") - width),
                "violations": [
                    {
                        "rule": one["id"],
                        "impact": one["impact"],
                        "places": [node["html"][:160] for node in one["nodes"][:3]],
                    }
                    for one in found["violations"]
                ],
            }


def keyboard(browser: html_pages.Browser, page: str) -> dict[str, Any]:
    """Go through a page by the Tab key, and return how many stops there are and which show no focus."""
    from selenium.webdriver import ActionChains, Keys

    browser.show(page, width=1280, height=HEIGHT)
    stops, hidden = 0, []
    for _ in range(browser.ask(STOPS) + 1):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        at = browser.ask(FOCUS)
        if at is None:
            break
        stops += 1
        hidden += [] if at[1] else [at[0]]
    return {"stops": stops, "without_focus": hidden}


def main(
    axe: Annotated[Path, typer.Argument(help="axe.min.js of the npm package axe-core.")],
    shots: Annotated[Path | None, typer.Option(help="Write a picture of each page there.")] = None,
    only: Annotated[str, typer.Option(help="Pages whose name begins so; nothing is written.")] = "",
) -> None:
    """Check all pages."""
    source = axe.read_text(encoding="utf-8")
    if shots is not None:
        shots.mkdir(parents=True, exist_ok=True)
    pages: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        browser = html_pages.Browser(Path(folder))
        try:
            for name, make in PAGES.items():
                if name.startswith(only):
                    page = make()
                    seen = list(checked(browser, page, source, shots, name))
                    pages[name] = {"seen": seen, "keyboard": keyboard(browser, page)}
                    print(f"{name}: {len(bad(pages[name]))} faults", file=sys.stderr)
            version = browser.driver.capabilities["browserVersion"]
        finally:
            browser.driver.quit()
    for name, found in pages.items():
        for fault in sorted(set(bad(found))):
            print(f"{name}: {fault}")
    if not only:
        made = measuring.begin(threads=1) | {
            "axe-core": source.split("axe v")[1].split()[0],
            "chromium": version,
        }
        RESULTS.write_text(json.dumps({"pages": pages, "made": made}, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(4 if any(map(bad, pages.values())) else 0)


def bad(found: dict[str, Any]) -> list[str]:
    """Return what is wrong with a page."""
    faults = [f"no focus is shown at {place}" for place in found["keyboard"]["without_focus"]]
    for seen in found["seen"]:
        faults += [f"{seen['sticks_out']} px stick out at {seen['width']}"] if seen["sticks_out"] else []
        faults += [
            f"{one['rule']} ({one['impact']}): {one['places'][0]}"
            for one in seen["violations"]
            if one["impact"] in GRAVE
        ]
    return faults


if __name__ == "__main__":
    typer.run(main)
