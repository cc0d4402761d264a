"""The scan: from a request to evidence, findings and one verdict."""

import doorward.reports  # noqa: F401 - with it, a notebook shows a report as its page
