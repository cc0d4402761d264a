"""The documentation site: every page can be reached, and none names what is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

import docs_site

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def named(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation."""
    if isinstance(nav, str):
        yield nav
        return
    for one in nav.values() if isinstance(nav, dict) else nav:
        yield from named(one)


def test_every_page_is_in_the_navigation_once() -> None:
    pages = sorted(named(docs_site.expanded(SITE["nav"], DOCS)))
    assert pages == sorted(file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md"))


def test_the_overview_of_methods_comes_first() -> None:
    assert docs_site.expanded(["methods/*"], DOCS)[0][0] == "methods/index.md"


def test_links_that_leave_the_site_become_names() -> None:
    text = "[a](../README.md), [b](cli.md), [c](methods/strip.md#x), [d](../benchmarks/results)"
    assert docs_site.without_outside_links(text, "index.md") == (
        "a (`README.md` in the repository), [b](cli.md), [c](methods/strip.md#x), "
        "d (`benchmarks/results` in the repository)"
    )
    assert docs_site.without_outside_links("[a](../cli.md#x)", "methods/strip.md") == "[a](../cli.md#x)"
    assert docs_site.without_outside_links("[a](../gone.py)", "index.md") == "[a](../gone.py)", (
        "strict finds it"
    )


def test_what_the_reference_names_is_there() -> None:
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_the_site_is_strict_and_loads_nothing_from_elsewhere() -> None:
    assert (SITE["strict"], SITE["theme"]["font"]) == (True, False)
    assert set(SITE["validation"]["links"].values()) == {"warn"}, "a warning fails a strict build"
    assert not {"extra_javascript", "extra_css"} & set(SITE)
