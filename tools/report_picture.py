"""Make the README's picture: scan the embedded backdoored model and photograph the report's upper part.

    python tools/report_picture.py

Needs Debian's chromium.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from doorward import reports
from doorward.bench.demo import clean_images, ready_made, scan_twin

OUT = Path(__file__).parent.parent / "docs" / "report.png"
WIDTH, HEIGHT = 1000, 1420


def main() -> None:
    """Write docs/report.png."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("chromium is not there: on Debian, apt-get install chromium")
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # so that the report shows short paths
        out = Path("doorward-demo")
        backdoored = ready_made(out)[0]
        report = scan_twin(backdoored, clean_images(out), seed=0, progress=lambda _: None)
        page = reports.write_reports(report, Path("report"))["html"].resolve()
        subprocess.run(
            [
                *(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--disable-background-networking", "--no-first-run", f"--user-data-dir={name}/profile"),
                *(f"--window-size={WIDTH},{HEIGHT}", "--screenshot=shot.png", page.as_uri()),
            ],
            check=True,
            capture_output=True,
        )
        with Image.open("shot.png") as shot:
            shot.convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
