"""The report as one HTML page that loads nothing and runs no script."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from doorward.core import formatting
from doorward.core.records import Finding, Picture, Report
from doorward.core.report_json import dump
from doorward.reports import atlas, next_steps, phrases
from doorward.reports.chart import per_class_chart

#: Pictures lower than this many pixels are enlarged, by a whole factor, to about `PICTURE_HEIGHT`.
SMALL = 100
PICTURE_HEIGHT = 168


@dataclass(frozen=True)
class Figure:
    """One picture as the page shows it; without `source` the PNG file is damaged."""

    title: str
    alt: str
    source: str | None = None
    width: int = 0
    height: int = 0
    enlarged: bool = False

    @property
    def wide(self) -> bool:
        """Return whether it is a strip of several images rather than one."""
        return self.width > 2 * self.height


def to_html(report: Report) -> str:
    """Write a report as one self-contained HTML page."""
    classes = phrases.class_names(report)
    findings = phrases.by_severity(report.findings)
    charts = [(finding, per_class_chart(finding, classes)) for finding in findings]
    settings = {one.detector: {"seed": one.seed, "settings": one.settings} for one in report.findings}
    return _template().render(
        report=report,
        words=phrases,
        formats=formatting,
        classes=classes,
        steps=next_steps.next_steps(report),
        findings=findings,
        shown=[(one, rows) for one in findings if one.flagged and (rows := gallery(one))],
        charts=[(finding, chart) for finding, chart in charts if chart],
        gallery=gallery,
        planted=[_figure(one.picture) for one in report.positive_control.controls if one.picture],
        atlas=atlas,
        details=[
            ("Settings of every detector", dump(settings)),
            ("What was asked for", dump(report.request)),
            ("Environment", dump(report.environment.model_dump(mode="json"))),
        ],
    )


def gallery(finding: Finding) -> list[list[list[Figure]]]:
    """Return a finding's pictures in rows: single images, then the strips that belong to them."""
    rows: list[list[list[Figure]]] = []
    for evidence in finding.evidence:
        if isinstance(evidence, Picture):
            figure = _figure(evidence)
            if not rows or (rows[-1][1] and not figure.wide):
                rows.append([[], []])
            rows[-1][figure.wide].append(figure)
    return rows


def _figure(picture: Picture) -> Figure:
    try:
        data = base64.b64decode(picture.png, validate=True)
        signature, width, height = struct.unpack(">8s8xII", data[:24])
    except (ValueError, struct.error):
        return Figure(picture.title, picture.alt)
    if signature != b"\x89PNG\r\n\x1a\n" or not width or not height:
        return Figure(picture.title, picture.alt)
    factor = max(1, PICTURE_HEIGHT // height) if height < SMALL else 1
    source = f"data:image/png;base64,{picture.png}"
    return Figure(picture.title, picture.alt, source, width * factor, height * factor, factor > 1)


def _whole_words(text: str) -> Markup:
    """Keep words with hyphens in one piece if they fit a line: browsers break `--mean` behind its dashes."""
    words = (formatting.plain(word) for word in text.split(" "))
    return Markup(" ").join(
        Markup('<span class="whole">{}</span>').format(word) if "-" in word else word for word in words
    )


def _harmless(value: Any) -> Any:
    """Pass every string that the template prints through `plain`; autoescaping follows."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return formatting.plain(value, lines=True)
    return value


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("doorward.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["atlas"] = atlas.lookup
    environment.filters["sentence"] = formatting.sentence
    environment.filters["whole_words"] = _whole_words
    return environment.get_template("report.html.j2")
