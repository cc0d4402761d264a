"""What all HTML pages share: one style, pictures that can be enlarged, strings made harmless.

A page loads nothing and runs no script.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from doorward.core import formatting
from doorward.core.records import Evidence, Picture
from doorward.reports import atlas, phrases

#: Pictures lower than this many pixels are enlarged, by a whole factor, to about `PICTURE_HEIGHT`; a trigger
#: alone to about `TRIGGER_HEIGHT`.
SMALL = 150
PICTURE_HEIGHT, TRIGGER_HEIGHT = 168, 280


@dataclass(frozen=True)
class Figure:
    """One picture as a page shows it; without `source` the PNG file is damaged."""

    title: str
    alt: str
    source: str | None = None
    width: int = 0
    height: int = 0
    enlarged: bool = False
    role: str = "picture"

    @property
    def wide(self) -> bool:
        """Return whether it is a strip of several images rather than one."""
        return self.width > 2 * self.height and self.role != "example"


@dataclass(frozen=True)
class Gallery:
    """Pictures that belong together: single ones, inputs without and with a trigger, strips of several."""

    singles: list[Figure] = field(default_factory=list)
    examples: list[Figure] = field(default_factory=list)
    strips: list[Figure] = field(default_factory=list)


def galleries(evidence: Iterable[Evidence]) -> list[Gallery]:
    """Return the pictures among some evidence in groups; each begins with its single pictures."""
    groups: list[Gallery] = []
    for one in evidence:
        if not isinstance(one, Picture):
            continue
        drawn = figure(one)
        single = drawn.role != "example" and not drawn.wide
        if not groups or (single and (groups[-1].examples or groups[-1].strips)):
            groups.append(Gallery())
        last = groups[-1]
        (last.singles if single else last.examples if drawn.role == "example" else last.strips).append(drawn)
    return groups


def figure(picture: Picture) -> Figure:
    """Lay out one picture."""
    try:
        data = base64.b64decode(picture.png, validate=True)
        signature, width, height = struct.unpack(">8s8xII", data[:24])
    except (ValueError, struct.error):
        return Figure(picture.title, picture.alt)
    if signature != b"\x89PNG\r\n\x1a\n" or not width or not height:
        return Figure(picture.title, picture.alt)
    wanted = TRIGGER_HEIGHT if picture.role == "trigger" else PICTURE_HEIGHT
    factor = max(1, wanted // height) if height < SMALL else 1
    source = f"data:image/png;base64,{picture.png}"
    return Figure(
        picture.title, picture.alt, source, width * factor, height * factor, factor > 1, picture.role
    )


#: Blanks inside a percentage, such as `> 99.9 %`.
_PERCENT = re.compile(r"(?<=[<>]) (?=\d)|(?<=\d) (?=%)")


@cache
def template(name: str, packages: tuple[str, ...] = ()) -> Template:
    """Return a template of a package, or of the reports, whose macros and style it may use."""
    loaders = [PackageLoader(package) for package in (*packages, "doorward.reports")]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["atlas"] = atlas.lookup
    environment.filters["sentence"] = formatting.sentence
    environment.filters["whole_words"] = _whole_words
    environment.globals |= {"words": phrases, "formats": formatting, "atlas": atlas}
    return environment.get_template(name)


def _whole_words(text: str) -> Markup:
    """Keep words with hyphens in one piece if they fit a line: browsers break `--mean` behind its dashes."""
    words = (formatting.plain(word) for word in text.split(" "))
    return Markup(" ").join(
        Markup('<span class="whole">{}</span>').format(word) if "-" in word else word for word in words
    )


def _harmless(value: Any) -> Any:
    """Pass every string that a template prints through `plain`; autoescaping follows.

    A percentage keeps its signs on its line.
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return _PERCENT.sub("\N{NO-BREAK SPACE}", formatting.plain(value, lines=True))
    return value
