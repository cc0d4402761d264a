"""Reporters: every one a pure function of a report."""

from doorward.reports.files import write_reports
from doorward.reports.html import to_html
from doorward.reports.json_report import from_json, schema_text, to_json
from doorward.reports.sarif import to_sarif
from doorward.reports.text import render, to_text
from doorward.reports.wording import exit_code

__all__ = [
    "exit_code",
    "from_json",
    "render",
    "schema_text",
    "to_html",
    "to_json",
    "to_sarif",
    "to_text",
    "write_reports",
]
