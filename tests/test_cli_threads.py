from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from doorward.cli.app import main
sys.argv = ["doorward", "--version"]
try:
    main()
except SystemExit:
    print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_somebody_says_otherwise(given: str | None, expected: str) -> None:
    """It has to be said before torch is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == [expected, "False"]
