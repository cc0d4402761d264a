"""Every kind of page is accessible: axe-core finds nothing serious, and Tab shows where it is."""

from __future__ import annotations

from importlib import resources

import pytest

import accessible_pages
from html_pages import Browser

pytestmark = pytest.mark.browser
#: `benchmarks/accessible_pages.py` looks at all widths in both schemes, by the newest axe-core.
VIEWS = ((390, "dark"), (1280, "light"), (2000, "dark"))


@pytest.fixture(scope="module")
def axe() -> str:
    """Return axe-core."""
    return resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")


def faults(browser: Browser, page: str, axe: str) -> list[str]:
    seen = list(accessible_pages.checked(browser, page, axe, views=VIEWS))
    return accessible_pages.bad({"seen": seen, "keyboard": accessible_pages.keyboard(browser, page)})


@pytest.mark.parametrize("name", accessible_pages.PAGES)
def test_axe_finds_nothing_serious(browser: Browser, name: str, axe: str) -> None:
    assert faults(browser, accessible_pages.PAGES[name](), axe) == []


def test_what_is_wrong_with_a_page_is_found(browser: Browser, axe: str) -> None:
    page = """<!doctype html><html lang="en"><title>t</title><style>:focus { outline: none }</style>
        <main><h1>t</h1><img src="data:,"><p style="color: #ccc; background: #fff">faint</p>
        <div style="width: 3000px">wide</div><a href="#x">there</a></main>"""
    found = " ".join(faults(browser, page, axe))
    for fault in ("image-alt (critical)", "color-contrast (serious)", "px stick out", "no focus is shown"):
        assert fault in found
