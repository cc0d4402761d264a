from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from documents import run_readme
from doorward import bundled, reports
from doorward.core.budget import Deadline
from doorward.core.errors import InputError
from doorward.core.records import Report
from doorward.data import InMemorySamples
from doorward.detectors.model.aegis import Aegis
from doorward.detectors.model.deepinspect import DeepInspect
from doorward.models import LoadOptions, TorchClassifier
from doorward.models.spec import InputSpec
from doorward.scan.behaviour import choose
from doorward.scan.confirmation import PICTURES
from doorward.scan.context import ScanContext
from doorward.scan.examine import examine, examine_in
from doorward.scan.images import affordable, draw_images, match_labels, unmatched_note
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest
from doorward.scan.rerun import compare, verify

CLEAN = f"{bundled.FOLDER / 'fashion_mnist'}:test"


def request(name: str, **more) -> ScanRequest:
    return ScanRequest(**({"model": str(bundled.model(name)), "clean": CLEAN, "images": 100} | more))


@pytest.fixture(scope="module")
def backdoored(shared_folder: Path) -> Report:
    return run_readme(shared_folder).report("backdoored")


@pytest.fixture(scope="module")
def clean(shared_folder: Path) -> Report:
    return run_readme(shared_folder).report("clean")


@pytest.mark.trains
def test_the_planted_target_is_found_and_confirmed(backdoored: Report) -> None:
    assert backdoored.verdict == "backdoored"
    assert backdoored.targets == (0,)
    assert backdoored.calibrated
    assert backdoored.p_value is not None
    assert backdoored.p_value <= 0.01
    named = [c for c in backdoored.confirmations if c.target == 0]
    confirmed = {c.detector: c.success for c in named}
    # a picture all over the image is no trigger of this model, but any class has one that works
    assert sorted(c.detector for c in named) == [
        "aegis",
        "blend-search",
        "neural-cleanse",
        "patch-search",
        "trigger-families",
        "trigger-families",
    ]
    for detector in ("neural-cleanse", "patch-search"):
        assert confirmed[detector].low >= 0.75
        assert confirmed[detector].n <= 250
    assert {f.detector for f in backdoored.findings if f.flagged} == {
        "aegis",
        "neural-cleanse",
        "patch-search",
        "trigger-families",
    }


@pytest.mark.trains
def test_a_detector_without_calibration_is_told_and_has_no_part_in_the_verdict() -> None:
    report, without = (
        scan(request("backdoored", detectors=names, settings=settings))
        for names, settings in (
            # how well it is measured does not matter here
            (("max-margin", "deepinspect"), ("deepinspect.inversion_steps=10", "deepinspect.steps=30")),
            (("max-margin",), ()),
        )
    )
    (own,) = [f for f in report.findings if f.detector == "deepinspect"]
    assert own.uncalibrated is not None
    assert (own.verdict, own.p_value, own.targets) == ("nothing_found", None, ())
    assert own.score is not None
    titles = [one.title for one in own.evidence if one.type == "picture"]
    assert any("→" in title for title in titles), "drawn on real images"
    assert report.covered.behaviour == ("max-margin",)
    assert (report.verdict, report.targets, report.p_value) == (
        without.verdict,
        without.targets,
        without.p_value,
    )


@pytest.mark.trains
def test_nothing_is_found_in_the_clean_twin(clean: Report) -> None:
    assert clean.verdict == "nothing_found"
    assert clean.targets == ()
    assert clean.p_value is not None
    assert clean.p_value > 0.1


@pytest.mark.trains
def test_the_planted_model_scores_above_its_twin(backdoored: Report, clean: Report) -> None:
    def score(report: Report) -> float:
        (found,) = [f for f in report.findings if f.detector == "neural-cleanse"]
        assert found.score is not None
        return found.score

    assert score(backdoored) > score(clean)


def test_clean_accuracy_is_measured_on_all_images_drawn(clean: Report) -> None:
    assert clean.subject is not None
    accuracy = clean.subject.clean_accuracy
    assert accuracy is not None
    assert accuracy.n == 300 == clean.data[0].used
    assert accuracy.value > 0.8
    assert clean.data[0].rows == 1000


def test_what_it_cost_is_counted(clean: Report) -> None:
    by_name = {f.detector: f for f in clean.findings}
    settings = by_name["max-margin"].settings
    assert by_name["max-margin"].cost.gradients == 10 * settings["starts"] * settings["steps"]
    settings = by_name["neural-cleanse"].settings
    # four of ten go on after the first steps, three are run again twice, one is run to confirm
    first, whole = settings["first_steps"], settings["steps"]
    steps = 10 * first + 4 * (whole - first) + 3 * 2 * whole + whole
    assert by_name["neural-cleanse"].cost.gradients == steps * settings["batch_size"]
    assert by_name["neural-cleanse"].cost.forwards > 0
    assert by_name["unsafe-code"].cost.gradients == 0


def test_pictures_show_the_trigger_on_unseen_images(backdoored: Report) -> None:
    (found,) = [f for f in backdoored.findings if f.detector == "neural-cleanse"]
    trigger, *examples = [e for e in found.evidence if e.type == "picture"]
    assert trigger.title == f"Recovered trigger for {backdoored.class_name(backdoored.targets[0])}"
    assert len(examples) == PICTURES
    answers = [one.title.split(" → ")[1] for one in examples]
    assert answers.count(backdoored.class_name(backdoored.targets[0])) >= PICTURES - 1


def test_the_report_round_trips_and_says_how_to_rerun(backdoored: Report) -> None:
    again = Report.model_validate_json(backdoored.model_dump_json())
    assert again == backdoored
    asked = ScanRequest.from_json(json.loads(json.dumps(backdoored.request)))
    demo = ScanRequest(model="doorward-demo/backdoored", clean="doorward-demo/images")
    assert replace(asked, folder=None) == demo


def test_verify_reruns_to_the_same_verdict(tmp_path) -> None:
    paths = reports.write_reports(scan(request("clean", detectors=("max-margin",))), tmp_path)
    assert verify(paths["json"]) == []


def test_compare_names_what_differs(backdoored: Report, clean: Report) -> None:
    assert compare(clean, clean) == []
    told = "\n".join(compare(clean, backdoored))
    for what in ("model sha256", "verdict", "targets", "neural-cleanse"):
        assert what in told


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"schema_version": "1.0"}', "\x00\xff"])
def test_verify_refuses_what_is_no_report(content: str, tmp_path) -> None:
    path = tmp_path / "report.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"no Doorward report|does not fit its schema|cannot be read"):
        verify(path)
    with pytest.raises(InputError, match=r"missing\.json: no such file; expected the report\.json"):
        verify(tmp_path / "missing.json")


def test_without_images_the_data_free_detectors_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepInspect, "examine", lambda self, *_, **__: self.measurement(summary="It ran."))
    report = scan(request("clean", clean=None))
    assert [f.detector for f in report.findings if f.level == "model"] == ["max-margin", "deepinspect"]
    assert [skipped.detector for skipped in report.not_run] == [
        "trigger-families",
        "patch-search",
        "blend-search",
        "aegis",
        "neural-cleanse",
    ]
    assert all("--clean" in skipped.reason for skipped in report.not_run)
    assert report.subject is not None
    assert report.subject.clean_accuracy is None


@pytest.mark.trains
def test_training_images_serve_where_no_clean_ones_are() -> None:
    train = f"{bundled.FOLDER / 'fashion_mnist'}:train"
    quick = tuple(f"aegis.{name}={value}" for name, value in Aegis.quick.items())
    report = scan(request("backdoored", clean=None, train=train, detectors=("aegis",), settings=quick))
    assert report.data[0].role == "train"
    assert report.targets == (0,)


def test_a_named_detector_runs_alone() -> None:
    report = scan(request("clean", detectors=("max-margin",)))
    assert [f.detector for f in report.findings] == ["max-margin"]
    assert report.not_run == ()
    with pytest.raises(InputError, match=r"no detector named 'nope'.*neural-cleanse"):
        scan(request("clean", detectors=("nope",)))


def test_too_little_time_is_a_reason_not_a_result() -> None:
    report = scan(request("backdoored", time_budget=0.001))
    assert report.verdict == "could_not_tell"
    assert report.reason is not None
    assert "time budget" in report.reason


def test_accuracy_no_better_than_chance_is_noticed() -> None:
    from doorward.models import open_classifier

    names = open_classifier(str(bundled.model("backdoored"))).classes
    report = scan(request("backdoored", options=LoadOptions(labels=names[1:] + names[:1])))
    assert report.verdict == "could_not_tell"
    assert report.reason is not None
    assert "no better than chance" in report.reason
    assert {n.detector for n in report.not_run} == {
        "max-margin",
        "neural-cleanse",
        "patch-search",
        "blend-search",
        "trigger-families",
        "aegis",
        "first-layer",
        "hidden-branch",
    }
    assert report.subject is not None
    assert report.subject.clean_accuracy is not None


class Fixed(nn.Module):
    """Gives the same logits for every image, NaN if asked."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.register_buffer("answer", torch.tensor(logits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer.expand(len(x), -1) + 0 * x.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize(
    ("logits", "why"),
    [([0.0], "needs at least two"), ([1.0, 2.0, 0.0], "same output"), ([1.0, float("nan")], "not finite")],
)
def test_models_that_cannot_be_judged(logits: list[float], why: str) -> None:
    spec = InputSpec(channels=1, height=8, width=8)
    classifier = TorchClassifier(Fixed(logits), spec, [str(i) for i in range(len(logits))])
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    for samples in (None, InMemorySamples(images, np.zeros(12), classes=classifier.classes)):
        report = examine(classifier, samples)
        assert report.verdict == "could_not_tell"
        assert why in (report.reason or "")
        assert report.findings == ()


def twin() -> TorchClassifier:
    from doorward.models import open_classifier

    classifier = open_classifier(str(bundled.model("clean")))
    assert isinstance(classifier, TorchClassifier)
    return classifier


def test_labels_are_matched_by_name_and_refused_outside() -> None:
    classifier, samples = twin(), bundled.fashion_mnist("test").select(np.arange(60))
    turned = classifier.classes[::-1]
    renamed = samples.relabel(np.arange(9, -1, -1), turned)
    detectors: list = []
    same = examine(classifier, renamed, detectors=detectors)
    assert same.subject is not None
    assert same.subject.clean_accuracy is not None
    assert same.subject.clean_accuracy.value > 0.8
    x = np.stack(samples.raw(range(60)))
    with pytest.raises(InputError, match="labels up to 11, the model 10 classes"):
        examine(classifier, InMemorySamples(x, np.arange(60) % 12), detectors=detectors)


def test_images_of_another_size_are_refused_with_what_fits() -> None:
    x = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=r"takes 28x28 images with 1 channel.*this one is 32x32 with 3"):
        examine(twin(), InMemorySamples(x, [0, 1, 2, 3]), detectors=[])


def test_every_class_is_in_both_halves() -> None:
    evidence = draw_images(twin(), bundled.fashion_mnist("test"), 40, seed=0)
    assert evidence.fit.labels is not None
    assert evidence.confirm.labels is not None
    assert sorted(evidence.fit.labels) == sorted(evidence.confirm.labels) == sorted([*range(10)] * 2)
    assert not set(evidence.fit.ids) & set(evidence.confirm.ids)


@pytest.mark.parametrize(("images", "to_confirm"), [(10, 5), (15, 7), (20, 10), (25, 10)])
def test_some_images_are_kept_back_even_if_a_class_has_only_one(images: int, to_confirm: int) -> None:
    evidence = draw_images(twin(), bundled.fashion_mnist("test"), images, seed=0)
    assert len(evidence.confirm) == to_confirm
    assert len(evidence.fit) == images - to_confirm


def test_triggers_are_fitted_to_as_many_images_as_in_the_bank() -> None:
    hundred, many = (draw_images(twin(), bundled.fashion_mnist("test"), n, seed=0) for n in (100, 300))
    assert (len(hundred.fit), len(many.fit)) == (50, 50)
    assert (len(hundred.confirm), len(many.confirm)) == (50, 250)
    assert hundred.fit.ids == many.fit.ids


def test_a_model_too_slow_for_its_images_is_given_up_at_once(monkeypatch) -> None:
    """300 images at 10 s each do not go into a minute; the first ones tell."""
    classifier = twin()
    logits = classifier.raw_logits
    clock, seen = [0.0], []

    def slow(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        clock[0] += 10.0 * len(x)
        return logits(x)

    monkeypatch.setattr("doorward.core.budget.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("doorward.models.batching.CHUNK_ELEMENTS", 2 * 28 * 28)
    monkeypatch.setattr(classifier, "raw_logits", slow)
    samples = bundled.fashion_mnist("test")
    report = examine_in(
        ScanContext(deadline=Deadline(60.0, started=0.0)),
        classifier,
        samples,
        [d for d in choose(()) if d.level == "model"],
    )
    assert report.verdict == "could_not_tell"
    assert seen == [1, 2]
    assert report.reason is not None
    assert "on 40 images would take 7 minutes more, and 30 seconds of the time budget" in report.reason
    assert report.warnings[0] == "40 of 300 images were used, so that the scan ends in time"
    assert "fewer --images" in report.reason
    assert {"max-margin", "neural-cleanse"} <= {skipped.detector for skipped in report.not_run}


@pytest.mark.parametrize(
    ("seconds", "each", "used"),
    [(900.0, 0.01, 300), (900.0, 1.0, 74), (60.0, 0.1, 49), (60.0, 0.2, 40), (None, 9.0, 300)],
)
def test_as_many_images_are_used_as_the_time_allows(
    seconds: float | None, each: float, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times through the model in a quarter of the time, and never fewer than searches want."""
    classifier, clock = twin(), [0.0]
    logits = classifier.raw_logits

    def slow(x: torch.Tensor) -> torch.Tensor:
        clock[0] += each * len(x)
        return logits(x)

    monkeypatch.setattr("doorward.core.budget.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(classifier, "raw_logits", slow)
    drawn = draw_images(classifier, bundled.fashion_mnist("test"), 300, seed=0)
    assert affordable(classifier, drawn, Deadline(seconds, started=0.0)) == used
    assert clock[0] <= 9 * each


def test_class_folders_are_matched_by_number_and_whatever_their_capitals() -> None:
    classifier, pixels = twin(), np.zeros((3, 28, 28, 1), np.uint8)

    def labels(names: list[str]) -> list[int]:
        samples = InMemorySamples(pixels, np.arange(3), classes=names)
        matched = match_labels(samples, classifier).labels
        assert matched is not None
        return [int(label) for label in matched]

    assert "Ankle boot" in classifier.classes
    assert labels(["ANKLE-boot", "bag", "coat"]) == [
        classifier.classes.index(name) for name in ("Ankle boot", "Bag", "Coat")
    ]
    assert labels(["ankle boot", "hat", "coat"]) == [0, 1, 2], "names that are none of the model's"
    classifier.classes = tuple(map(str, range(10)))
    assert labels(["000", "003", "009"]) == [0, 3, 9], "there are no images of the other classes"
    assert labels(["003", "3", "4"]) == [0, 1, 2], "twice the same number"
    assert labels(["1", "2", "10"]) == [0, 1, 2], "beyond the last class"


def test_labels_that_are_taken_in_order_are_told() -> None:
    classifier, pixels = twin(), np.zeros((3, 28, 28, 1), np.uint8)
    own, other, numbers = (
        InMemorySamples(pixels, np.arange(3), classes=names)
        for names in (["Coat", "Bag", "Dress"], ["Coat", "Hat", "Dress"], ["0", "1", "2"])
    )
    told = unmatched_note(other, classifier)
    assert told is not None
    assert told.startswith("the model has no class named 'Hat': the labels of the images are taken in order")
    assert unmatched_note(own, classifier) is None
    assert unmatched_note(numbers, classifier) is None


def test_one_detector_that_could_not_tell_is_not_outvoted(clean: Report) -> None:
    few = scan(request("clean", images=20))  # ten to fit on, which neural-cleanse finds too few
    assert few.verdict == "could_not_tell"
    assert few.reason == (
        "trigger-families, patch-search, blend-search, aegis and neural-cleanse: 10 clean images are too "
        "few; give at least 20"
    )


@pytest.mark.trains
def test_what_stands_out_is_looked_at_again_on_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doorward.scan.second_look.BEYOND", float("inf"))
    report = scan(request("backdoored", detectors=("max-margin", "neural-cleanse")))
    assert report.verdict in ("backdoored", "suspicious")
    assert report.targets == (0,)
    assert [one.margin > 0 for one in report.looks] == [True, True]
    assert len({one.margin for one in report.looks}) == 2, "other starts give other scores"
    assert compare(report, report) == []
