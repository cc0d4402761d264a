"""What the documentation site needs besides mkdocs.yml; MkDocs calls the functions named `on_...`.

The pages are written to be read in the repository too, where links to files outside of docs/ work.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def pages(folder: Path) -> list[str]:
    """Return the methods' pages by name, their overview first."""
    names = sorted(file.name for file in folder.glob("*.md"))
    return sorted(names, key=lambda name: name != "index.md")


def expanded(nav: Any, docs: Path) -> Any:
    """Return a navigation in which `FOLDER/*` stands for all pages of that folder."""
    if isinstance(nav, list):
        return [expanded(one, docs) for one in nav]
    if isinstance(nav, dict):
        return {name: expanded(one, docs) for name, one in nav.items()}
    if isinstance(nav, str) and nav.endswith("/*"):
        return [f"{nav[:-1]}{name}" for name in pages(docs / nav[:-2])]
    return nav


def without_outside_links(text: str, page: str) -> str:
    """Return a page in which links that leave docs/ are the names of files in the repository.

    Args:
        page: where it lies below docs/.

    >>> without_outside_links("see [results](../benchmarks/results) and [CLI](../cli.md)", "results.md")
    'see results (`benchmarks/results` in the repository) and [CLI](../cli.md)'
    """

    def named(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link[2]))
        outside = not place.startswith("docs/") and (Path(__file__).parent.parent / place).exists()
        return f"{link[1]} (`{place}` in the repository)" if outside else link[0]

    return LINK.sub(named, text)


def on_config(config: Any) -> Any:
    """Complete the navigation."""
    config["nav"] = expanded(config["nav"], Path(config["docs_dir"]))
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Make links that leave the site names."""
    return without_outside_links(markdown, page.file.src_uri)
