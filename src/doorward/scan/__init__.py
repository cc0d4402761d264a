"""The scan: from a request to evidence, findings and one verdict."""

import doorward.reports  # noqa: F401 - with it, a notebook shows a report as its page
from doorward.core.packages import make_callable

make_callable(__name__)
