"""The HTML report: as markup, and as a browser shows it."""

from __future__ import annotations

import base64
import html
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from doorward.core.records import Picture
from doorward.reports import to_html
from doorward.reports.page import figure, galleries
from doorward.reports.phrases import TITLES
from html_pages import CONTRAST, Browser, Page
from report_examples import (
    EXAMPLES,
    backdoored,
    could_not_tell,
    hostile,
    nothing_found,
    png,
    suspicious,
    trigger_pictures,
    unsafe,
)

every_example = pytest.mark.parametrize("name", EXAMPLES)


# The markup


@every_example
def test_the_page_loads_nothing_and_runs_nothing(name: str) -> None:
    page = Page(to_html(EXAMPLES[name]()))
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags.keys() & {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "audio",
        "video",
        "input",
    }
    assert (tags["style"], tags["link"], tags["h1"]) == (1, 1, 1)
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], "CSP would block it"
        for key in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
            value = attributes.get(key)
            if value is None:
                continue
            link = tag == "a" and re.fullmatch(r"#\w+|https://atlas\.mitre\.org/[\w./]+", value)
            assert link or value.startswith("data:"), (tag, key, value)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert "url(" not in to_html(EXAMPLES[name]()).split("</style>")[0]


@every_example
def test_the_page_is_accessible(name: str) -> None:
    page = Page(to_html(EXAMPLES[name]()))
    assert page.all("html") == [{"lang": "en"}]
    assert all(image.get("alt") for image in page.all("img"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    assert all("aria-hidden" in svg or svg.get("role") == "img" or "width" in svg for svg in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels)), "no level is skipped"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_verdict_comes_first_and_the_rest_in_order() -> None:
    text = " ".join(Page(to_html(backdoored())).text.split())
    order = [
        "Doorward report models/garments.onnx Backdoored A hidden trigger makes this model answer",
        "Do not deploy this model.",
        "Target class 3 (Dress)",
        "p = 0.0033 About 3 in 1,000 clean models",
        "97.2 %",
        "The recovered trigger",
        "Coat \N{RIGHTWARDS ARROW} 3 (Dress)",
        "Class by class neural-cleanse",
        "threshold 2.00",
        "What to do next",
        "What this verdict does not mean",
        "What each detector found, and cannot see",
        "Limits. Triggers that change the whole image",
        "AML.T0043.004 Craft Adversarial Data: Insert Backdoor Trigger",
        "What was tested",
        "range 0 to 1 (assumed)",
        "91.3 % (1,826 of 2,000; 95 % interval",
        "What did not run",
        "Needs the training data",
        "What it cost",
        "61,440",
        "learning_rate",
        '"torch": "2.13.0"',
        "doorward verify report.json: it scans the same files again",
    ]
    place = 0
    for part in order:
        assert part in text[place:], f"{part!r} is missing, or comes too early"
        place = text.index(part, place) + len(part)


def test_an_uncalibrated_result_says_so_in_words() -> None:
    text = " ".join(Page(to_html(suspicious())).text.split())
    assert "How sure Uncalibrated" in text
    assert "The most suspicious class first. Uncalibrated." in text


def test_a_class_above_the_threshold_that_is_not_named_is_explained() -> None:
    """The threshold is that of the highest class; more is asked of any other."""
    report = backdoored()
    finding = report.findings[1]
    second = sorted(finding.per_class, key=lambda c: -(finding.per_class[c] or 0))[1]
    why = "The threshold is that of the first class"
    assert why not in to_html(report)
    higher = finding.model_copy(update={"per_class": finding.per_class | {second: finding.score}})
    findings = tuple(higher if f == finding else f for f in report.findings)
    assert why in to_html(report.model_copy(update={"findings": findings}))


def test_hostile_strings_are_text() -> None:
    markup = to_html(hostile())
    page = Page(markup)
    assert "<script>document.title='owned'</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert not [
        c for c in markup if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c == "\u202e"
    ]
    assert len(page.all("img")) == 1, "a damaged picture is told, not drawn"
    assert "This picture is damaged." in page.text


def test_pictures_stand_in_groups_in_their_order() -> None:
    twice = galleries((*trigger_pictures("3"), *trigger_pictures("5")))
    groups = [[one.title for one in (*group.singles, *group.examples, *group.strips)] for group in twice]
    arrow = "\N{RIGHTWARDS ARROW}"
    assert groups == [
        [f"Recovered trigger, target {t}", *[f"Bag {arrow} {t}", f"Coat {arrow} {t}"] * 3] for t in "35"
    ]
    assert [len(group.examples) for group in twice] == [6, 6]
    alone, example = twice[0].singles[0], twice[0].examples[0]
    assert (alone.width, alone.height, alone.enlarged) == (280, 280, True), "ten times 28"
    assert (example.width, example.height) == (342, 168), "six times 57 and 28"


def test_a_strip_stands_apart_from_single_pictures() -> None:
    import numpy as np

    mean = Picture(title="mean", alt="a", png=png(np.zeros((28, 28), np.uint8)))
    strip = Picture(title="strip", alt="a", png=png(np.zeros((28, 280), np.uint8)))
    drawn = galleries((mean, strip, mean, strip))
    assert [(len(one.singles), len(one.examples), len(one.strips)) for one in drawn] == [(1, 0, 1)] * 2


@pytest.mark.parametrize(
    "data", ["", "AAAA", "not base64!", base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 40).decode()]
)
def test_damaged_pictures_are_told(data: str) -> None:
    finding = backdoored().findings[1]
    bad = finding.model_copy(update={"evidence": (Picture(title="t", alt="a white square", png=data),)})
    page = Page(to_html(backdoored().model_copy(update={"findings": (bad,)})))
    assert page.all("img") == []
    assert "It should show: a white square" in page.text


def test_large_pictures_are_not_enlarged() -> None:
    import numpy as np

    large = figure(Picture(title="t", alt="a", png=png(np.zeros((224, 200), np.uint8))))
    assert (large.width, large.height, large.enlarged) == (200, 224, False)


def folded(markup: str) -> str:
    """Return the text of a page that a reader sees only after unfolding something."""

    class Folded(HTMLParser):
        depth, summary, text = 0, 0, ""

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.depth += tag == "details" and "open" not in dict(attributes)
            self.summary += tag == "summary"

        def handle_endtag(self, tag: str) -> None:
            self.depth -= tag == "details"
            self.summary -= tag == "summary"

        def handle_data(self, data: str) -> None:
            self.text += data if self.depth and not self.summary else ""

    parser = Folded()
    parser.feed(markup)
    return " ".join(parser.text.split())


def test_what_found_nothing_is_folded_away_but_for_a_line() -> None:
    page = to_html(nothing_found())
    inside = folded(page)
    for part in ("Triggers that change the whole image", "Anomaly index: 0.67", "threshold 2.0"):
        assert part in inside
    for part in ("No small pattern turns other images", "What to do next", "max-margin alone points"):
        assert part in Page(page).text
        assert part not in inside
    assert "Smallest pattern for each class" not in folded(to_html(backdoored())), "alarms are not folded"


def test_the_finding_whose_trigger_works_best_is_drawn_first_and_the_others_are_folded() -> None:
    report = backdoored()
    first, second = report.findings[1:]
    both = second.model_copy(update={"evidence": trigger_pictures("3, by max-margin")})
    better = report.confirmations[0].model_copy(update={"detector": "max-margin"})
    worse = better.success.model_copy(update={"successes": 200, "value": 0.8, "low": 0.745, "high": 0.848})
    works = (report.confirmations[0].model_copy(update={"success": worse}), better)
    page = to_html(report.model_copy(update={"findings": (first, both), "confirmations": works}))
    inside = folded(page)
    assert "Recovered trigger, target 3 (Dress)" in inside
    assert "Recovered trigger, target 3, by max-margin" not in inside
    assert page.count("<h2>The recovered trigger</h2>") == 1


def test_a_reason_is_told_once() -> None:
    report = could_not_tell()
    why = str(report.reason)
    first = report.findings[0].model_copy(update={"reason": why, "summary": f"Could not tell: {why}"})
    other = first.model_copy(update={"detector": "max-margin"})
    text = Page(to_html(report.model_copy(update={"findings": (first, other), "not_run": ()}))).text
    assert text.count(why) == 1
    assert text.count("It could not tell, for the reason above.") == 2


def test_a_notebook_shows_the_page_and_a_console_no_pictures() -> None:
    report = backdoored()
    shown = report._repr_html_()
    assert shown
    assert shown.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert 'sandbox=""' in shown
    assert shown.count("<") == 2, "the page is text of an attribute"
    assert html.unescape(shown.split('srcdoc="')[1].split('" sandbox')[0]) == to_html(report)
    assert report.findings[1].evidence[0].png not in repr(report)


def test_reports_of_a_scan_can_be_shown() -> None:
    code = "from doorward.scan.verdict import Report; assert Report.page is not None"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The page in a browser


@pytest.mark.browser
@every_example
def test_a_browser_reports_no_error_and_sends_no_request(browser: Browser, name: str) -> None:
    browser.show(to_html(EXAMPLES[name]()))
    assert browser.driver.get_log("browser") == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [
        (browser.folder / "report.html").as_uri()
    ]
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    title = TITLES[EXAMPLES[name]().verdict]
    assert browser.driver.title.startswith(f"{title}: Doorward report on "), "no hostile string changed it"


@pytest.mark.browser
@every_example
@pytest.mark.parametrize("width", [320, 360, 700, 1400])
def test_nothing_sticks_out(browser: Browser, name: str, width: int) -> None:
    browser.show(to_html(EXAMPLES[name]()), width=width)
    assert browser.ask("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
@every_example
@pytest.mark.parametrize(("width", "height"), [(360, 640), (1400, 800)])
def test_the_verdict_is_in_the_first_view(browser: Browser, name: str, width: int, height: int) -> None:
    browser.show(to_html(EXAMPLES[name]()), width=width, height=height)
    box = browser.ask("document.querySelector('h1').getBoundingClientRect().toJSON()")
    assert 0 < box["top"] < box["bottom"] < height
    if name != "hostile":
        assert browser.ask("document.querySelector('.act strong').getBoundingClientRect().bottom") < height


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["backdoored", "nothing_found", "could_not_tell", "suspicious", "hostile"])
def test_every_text_has_contrast(browser: Browser, name: str, scheme: str) -> None:
    browser.show(to_html(EXAMPLES[name]()), scheme=scheme)
    found = browser.ask(CONTRAST)
    assert len(found) > 50
    assert found[0][0] >= 4.5, found[:3]


@pytest.mark.browser
def test_the_contrast_check_can_fail(browser: Browser) -> None:
    browser.show(to_html(backdoored()))
    browser.ask("document.querySelector('.lead').style.color = '#d99'")
    assert browser.ask(CONTRAST)[0][0] < 4.5


@pytest.mark.browser
def test_light_and_dark_follow_the_reader(browser: Browser) -> None:
    def page_colour(scheme: str) -> list[int]:
        browser.show(to_html(backdoored()), scheme=scheme)
        return [
            int(v) for v in re.findall(r"\d+", browser.ask("getComputedStyle(document.body).backgroundColor"))
        ]

    assert min(page_colour("light")) > 230
    assert max(page_colour("dark")) < 40


@pytest.mark.browser
def test_without_scripts_the_page_is_the_same(browser: Browser) -> None:
    browser.show(to_html(backdoored()))
    with_scripts = browser.screenshot()
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(to_html(backdoored()))
        assert browser.screenshot() == with_scripts
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)
    browser.show(to_html(unsafe()))
    assert browser.screenshot() != with_scripts, "screenshots can differ"


@pytest.mark.browser
def test_bars_are_as_long_as_the_scores(browser: Browser) -> None:
    browser.show(to_html(nothing_found()))
    browser.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    bars = browser.ask(
        "[...document.querySelectorAll('.track .bar')].map(bar => bar.getBoundingClientRect().toJSON())"
    )
    limit = browser.ask("document.querySelector('.track .limit').getBoundingClientRect().x")
    zero = bars[0]["left"]
    assert bars[1]["right"] == pytest.approx(zero, abs=1)
    assert bars[0]["width"] == pytest.approx(bars[1]["width"], abs=1), "0.67 and -0.67"
    assert (limit - zero) / bars[0]["width"] == pytest.approx(2.0 / 0.67, rel=0.02)


@pytest.mark.browser
def test_a_picture_is_enlarged_without_a_script(browser: Browser) -> None:
    browser.show(to_html(backdoored()))
    first = "document.querySelector('.example')"
    width = f"{first}.querySelector('img').getBoundingClientRect().width"
    before = browser.ask(width)
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        browser.driver.find_element(By.CSS_SELECTOR, ".example summary").send_keys(Keys.ENTER)
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.ask(f"{first}.querySelector('details').open")
    assert browser.ask(width) > 2 * before
    assert browser.ask("document.documentElement.scrollWidth") <= 1400


@pytest.mark.browser
def test_print_shows_what_is_folded(browser: Browser) -> None:
    browser.show(to_html(backdoored()), media="print")
    shown = "[...document.querySelectorAll('details pre')].map(pre => pre.checkVisibility())"
    assert browser.ask(shown) == [True] * 3
    assert browser.ask("[...document.querySelectorAll('.limits')].every(one => one.checkVisibility())")
    pdf = base64.b64decode(browser.command("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    browser.show(to_html(backdoored()))
    assert browser.ask(shown) == [False] * 3
