"""The scan: from a request to evidence, findings and one verdict."""

import doorward.core.packages
import doorward.reports  # with it, a notebook shows a report as its page

doorward.core.packages.make_callable(__name__)
