"""Reporters: every one a pure function of a report."""

from doorward.core.report_json import from_json, schema_text, to_json
from doorward.reports.bom import to_cyclonedx
from doorward.reports.exit_codes import exit_code, not_covered
from doorward.reports.files import write_flagged, write_reports
from doorward.reports.html import to_html
from doorward.reports.sarif import to_sarif
from doorward.reports.text import render, to_text

__all__ = [
    "exit_code",
    "from_json",
    "not_covered",
    "render",
    "schema_text",
    "to_cyclonedx",
    "to_html",
    "to_json",
    "to_sarif",
    "to_text",
    "write_flagged",
    "write_reports",
]
