"""HTML pages in tests: as markup, and as a browser shows them."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """Collect a page's elements and its text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(markup)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._silent = tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """Show reports in headless Chromium and ask what came of it."""

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (
            "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
            "disable-background-networking", "disable-component-update", "hide-scrollbars",
            f"user-data-dir={folder / 'profile'}",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=str(DRIVER))
        self.folder = folder
        self.driver = webdriver.Chrome(options=options, service=service)

    def command(self, name: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, parameters)

    def show(
        self, page: str, *, width: int = 1400, height: int = 900, scheme: str = "light", media: str = ""
    ) -> None:
        file = self.folder / "report.html"
        file.write_text(page, encoding="utf-8")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media=media, features=features)
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # empties it
        self.driver.get(file.as_uri())

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self) -> bytes:
        return base64.b64decode(self.command("Page.captureScreenshot")["data"])


#: For every visible text: contrast of its colour with what lies behind it (WCAG 2.2), the lowest first.
CONTRAST = """(() => {
  const numbers = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = numbers(c).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    const n = numbers(c); if (n.length < 4 || n[3] > 0) return c; } return "rgb(255, 255, 255)"; };
  const found = [];
  document.querySelectorAll("details").forEach(d => d.open = true);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, e = node.parentElement;
    if (!node.data.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), ink = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    found.push([Math.round((a + .05) / (b + .05) * 100) / 100, node.data.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()"""
