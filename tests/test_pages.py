"""The pages of a repair and of a guard: what they say, and how a browser shows them."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from doorward.core.records import DataRecord, NotRun, Rate, SubjectRecord, Table
from doorward.data import InMemorySamples
from doorward.guard import rendering
from doorward.guard.records import FilterRecord, GuardReport, InputVerdict
from doorward.repair import RepairReport, TriggerRecord
from doorward.repair.page import accuracy_curve, to_html
from doorward.repairs.base import RepairRecord
from html_pages import CONTRAST, Browser, Page
from report_examples import ENVIRONMENT, GARMENTS, HOSTILE

BAD = " ".join(HOSTILE[:7])


def rate(successes: int, n: int) -> Rate:
    value = successes / n
    return Rate(
        successes=successes, n=n, value=value, low=max(0.0, value - 0.05), high=min(1.0, value + 0.05)
    )


PRUNED = Table(
    title="Pruning of 64 channels: the first 3 are pruned",
    columns=("pruned", "unit", "accuracy"),
    rows=tuple((k, 7 * k % 64, 0.9 - 0.001 * k * k) for k in range(12)),
)


def repaired(model: str = "models/garments.onnx") -> RepairReport:
    return RepairReport(
        model=model,
        before="backdoored",
        after="nothing_found",
        accuracy_before=rate(91, 100),
        accuracy_after=rate(89, 100),
        measured_on="clean samples kept back",
        triggers=(
            TriggerRecord(detector="patch-search", target=3, before=rate(97, 100), after=rate(2, 100)),
        ),
        parameters_before=1000,
        parameters_after=990,
        repair=RepairRecord(
            repair="pruning",
            settings={"most": 0.1},
            seed=0,
            done="3 of 64 channels were pruned",
            evidence=(PRUNED,),
            seconds=3.2,
        ),
        not_run=(NotRun(detector="relabelling", reason="it needs train"),),
        seconds=61.0,
    )


def guarded(n: int = 40, path: str = "models/garments.onnx") -> tuple[GuardReport, InMemorySamples]:
    pixels = np.random.default_rng(0).integers(0, 255, (n, 28, 28, 1), dtype=np.uint8)
    samples = InMemorySamples(list(pixels))
    verdicts = tuple(
        InputVerdict(
            id=identity,
            prediction=i % 10,
            accepted=i % 3 > 0,
            reasons=() if i % 3 else ("strip: the mean entropy of 20 blends is 0.02",),
            scores={"strip": 0.3 if i % 3 else 0.9},
        )
        for i, identity in enumerate(samples.ids)
    )
    rejected = sum(not one.accepted for one in verdicts)
    report = GuardReport(
        subject=SubjectRecord(path=path, format="ONNX", classes=GARMENTS),
        data=(DataRecord(role="clean", path="trusted", rows=500, used=300, labelled=True),),
        false_rejection_rate=0.01,
        rule="conformal",
        filters=(FilterRecord(name="strip", title="STRIP", settings={}, threshold=0.5, limits="It sees."),),
        verdicts=verdicts,
        rejected=rate(rejected, n) if n else Rate(successes=0, n=0, value=0.0, low=0.0, high=1.0),
        alarm="more are rejected" if rejected else None,
        seed=0,
        seconds=1.0,
        environment=ENVIRONMENT,
    )
    return report, samples


@pytest.mark.parametrize("works", [True, False])
def test_a_page_never_says_nothing_found_first_where_a_trigger_still_works(works: bool) -> None:
    trigger = TriggerRecord(
        detector="patch-search", target=3, before=rate(97, 100), after=rate(96 if works else 2, 100)
    )
    markup = to_html(repaired().model_copy(update={"triggers": (trigger,)}))
    headline = re.search("<h1.*?</h1>", markup)[0]
    assert ("The backdoor is not gone" in headline) == works
    assert ("Nothing found after the repair" in headline) != works


PAGES = {
    "repair": lambda: to_html(repaired()),
    "repair, nothing done": lambda: to_html(
        RepairReport(model="m", before="nothing_found", after="nothing_found")
    ),
    "repair, hostile": lambda: to_html(repaired(BAD)),
    "guard": lambda: rendering.to_html(*guarded()),
    "guard, hostile": lambda: rendering.to_html(*guarded(path=BAD)),
    "guard, none": lambda: rendering.to_html(*guarded(1)),
}
every_page = pytest.mark.parametrize("name", PAGES)


@every_page
def test_a_page_loads_nothing_runs_nothing_and_can_be_read_aloud(name: str) -> None:
    markup = PAGES[name]()
    page = Page(markup)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"]
        for key in ("src", "href"):
            value = attributes.get(key)
            assert value is None or value.startswith("data:"), (tag, key)
    assert "default-src 'none'" in markup
    assert page.all("html") == [{"lang": "en"}]
    assert all(image.get("alt") for image in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert "\x1b" not in markup


def test_a_repair_says_what_was_and_what_is() -> None:
    text = " ".join(Page(to_html(repaired())).text.split())
    for part in (
        "Nothing found after the repair",
        "pruning: 3 of 64 channels were pruned.",
        "Before Backdoored",
        "After Nothing found",
        "Trigger for class 3 that patch-search recovered, success on samples kept back before 97.0 %",
        "after 2.0 % (2 of 100",
        "Accuracy on clean samples kept back before 91.0 %",
        "Parameters: 1,000 before, 990 after.",
        "does not prove that the model is safe",
        "relabellingIt needs train.",
    ):
        assert part in text, part
    assert repaired()._repr_html_().startswith("<iframe srcdoc=")


def test_the_curve_goes_down_as_the_accuracy_does() -> None:
    curve = accuracy_curve(PRUNED)
    assert curve
    heights = [float(point.split(",")[1]) for point in curve.points.split()]
    assert (heights[0], heights[-1]) == (0.0, 100.0)
    assert heights == sorted(heights)
    assert accuracy_curve(PRUNED.model_copy(update={"columns": ("pruned", "unit", "share")})) is None
    assert accuracy_curve(PRUNED.model_copy(update={"rows": PRUNED.rows[:2]})) is None


def test_a_guard_lists_every_verdict_and_draws_what_it_rejects() -> None:
    report, samples = guarded()
    page = Page(rendering.to_html(report, samples))
    text = " ".join(page.text.split())
    bad = [one for one in report.verdicts if not one.accepted]
    assert len(page.all("img")) == len(bad) == 14
    assert all(f"{one.id}rejected" in text for one in bad)
    assert f"{report.verdicts[1].id}accepted1 (Trouser)0.3" in text
    assert "14 of 40 rejected More are rejected." in text
    assert "300 clean inputs" in text


def test_a_long_guard_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "IN_SHEET", 10)
    page = Page(rendering.to_html(*guarded()))
    text = " ".join(page.text.split())
    assert len(page.all("img")) == 10
    assert "4 more are in verdicts.csv." in text
    assert "10 verdicts of 40; all are in verdicts.csv" in text


@pytest.mark.browser
@every_page
@pytest.mark.parametrize("width", [320, 390, 1280, 2000])
def test_nothing_sticks_out(browser: Browser, name: str, width: int) -> None:
    browser.show(PAGES[name](), width=width)
    assert browser.driver.get_log("browser") == []
    assert browser.ask("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["repair", "guard", "guard, none"])
def test_every_text_has_contrast(browser: Browser, name: str, scheme: str) -> None:
    browser.show(PAGES[name](), scheme=scheme)
    found = browser.ask(CONTRAST)
    assert len(found) > 20
    assert found[0][0] >= 4.5, found[:3]
