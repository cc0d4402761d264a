from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from typer.testing import CliRunner

from doorward import bundled
from doorward.cli.app import app
from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import ControlResult, Environment, PositiveControl, Report
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples, Samples
from doorward.detectors.base import Detector
from doorward.detectors.model.neural_cleanse import NeuralCleanse
from doorward.detectors.subject import Subject
from doorward.models import InputSpec, TorchClassifier, open_classifier
from doorward.models.architectures import build
from doorward.models.formats.wrapping import FunctionClassifier
from doorward.reports import from_json, phrases, to_json
from doorward.scan import pipeline as scan_module
from doorward.scan import power as power_module
from doorward.scan.calibration import CalibrationSet, CleanModel
from doorward.scan.context import ScanContext
from doorward.scan.images import draw_images
from doorward.scan.power import FAMILIES, measure_positive_control
from doorward.scan.request import ScanRequest
from doorward.scan.rerun import compare
from doorward.stats import metrics
from doorward.training import fine_tune
from doorward.training.fine_tune import (
    HALF,
    LOSS,
    SUCCESS,
    LabelledBatch,
    PlantedCopy,
    teach_trigger,
    vary,
)
from seeds import shifted

IMAGES = 100


class ChangedWeights(Detector):
    """Raise an alarm for any model whose weights are not those of the reference, towards given classes."""

    title: ClassVar[str] = "changed weights"
    source: ClassVar[str] = "this test"
    limits: ClassVar[str] = "It knows one model."
    needs = frozenset({"weights"})
    targets: tuple[int, ...] = ()

    def examine(self, subject, **_):
        changed = weights_of(subject.classifier) != weights_of(open_classifier(bundled.model("clean")))
        named = self.targets if changed else ()
        per_class = {c: 60.0 if c in named else -9.0 for c in range(len(subject.classifier.classes))}
        return self.measurement(
            summary="The weights were compared.", score=max(per_class.values()), per_class=per_class
        )


@pytest.fixture(scope="module", autouse=True)
def calibrated() -> Iterator[None]:
    """Let the detector of this test be calibrated on clean models whose scores are all low."""
    scores = np.random.default_rng(0).normal(size=(300, 10))
    models = tuple(
        CleanModel(
            name=str(i),
            data="a",
            architecture="small-cnn",
            classes=10,
            shape=(1, 28, 28),
            accuracy=0.9,
            scores={"test-scan-power": tuple(row)},
        )
        for i, row in enumerate(scores.tolist())
    )
    held = CalibrationSet(settings={"test-scan-power": {}}, models=models)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("doorward.scan.examine.calibrations", lambda *_: held)
        yield


def weights_of(classifier: TorchClassifier) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in classifier.module.state_dict().items()}


@pytest.fixture(scope="module")
def clothes() -> Samples:
    return bundled.fashion_mnist("test")


@pytest.fixture(scope="module")
def classifier() -> TorchClassifier:
    return open_classifier(bundled.model("clean"))


@pytest.fixture(scope="module")
def halves(classifier, clothes) -> tuple[LabelledBatch, LabelledBatch]:
    drawn = draw_images(classifier, clothes, IMAGES, 0)
    return LabelledBatch.of(drawn.fit, classifier), LabelledBatch.of(drawn.confirm, classifier)


@pytest.fixture(scope="module")
def others(classifier, clothes) -> LabelledBatch:
    """Return images that are in neither half."""
    drawn = draw_images(classifier, clothes, IMAGES, 0)
    used = {*drawn.fit.ids, *drawn.confirm.ids}
    return LabelledBatch.of(clothes.take([one for one in clothes.ids if one not in used][:500]), classifier)


def nothing_found(**more) -> Report:
    machine = Environment(doorward="1", python="3", platform="p", packages={}, device="cpu", threads=1)
    return Report(**({"subject": None, "verdict": "nothing_found", "environment": machine} | more))


def planted_in(classifier, halves, family: str, target: int = 3, seed: int = 0, **more) -> PlantedCopy:
    generator = make_generator(seed)
    trigger = FAMILIES[family](classifier.spec.shape, generator)
    return teach_trigger(classifier, *halves, trigger, target, generator=generator, **more)


# Planting


@pytest.fixture(scope="module")
def copies(classifier, halves) -> Callable[[str], PlantedCopy]:
    """Return what plants a trigger of a family, once."""
    return cache(lambda family: planted_in(classifier, halves, family, seed=shifted(0)))


@pytest.fixture
def short(monkeypatch) -> None:
    """Let planting end after its first look, whether the trigger works by then or not."""
    monkeypatch.setattr(fine_tune, "STEPS", fine_tune.LOOK)


@pytest.mark.trains
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trigger_takes_and_costs_little(family: str, copies, classifier, halves, others) -> None:
    planted = copies(family)
    trigger = FAMILIES[family](classifier.spec.shape, make_generator(shifted(0)))
    assert planted.shortfall(halves[1].accuracy) is None
    assert planted.steps < fine_tune.STEPS
    with torch.no_grad():
        # on images that were used neither to plant nor to stop
        chosen = (others.labels != 3) & (others.predicted != 3)
        moved = planted.classifier.logits(trigger.apply(others.x[chosen])).argmax(1) == 3
        unmoved = classifier.logits(trigger.apply(others.x[chosen])).argmax(1) == 3
        right = planted.classifier.logits(others.x).argmax(1) == others.labels
    assert moved.float().mean() > 0.7
    assert unmoved.float().mean() < 0.2, "the trigger works in the copy alone"
    assert right.float().mean() > others.accuracy.value - 0.1


@pytest.mark.usefixtures("short")
def test_the_model_is_left_alone(classifier, halves, untouched) -> None:
    before = weights_of(classifier)
    learning = [p.requires_grad for p in classifier.module.parameters()]
    modes = [m.training for m in classifier.module.modules()]
    with untouched():
        planted = planted_in(classifier, halves, "blend")
    assert weights_of(classifier) == before
    assert [p.requires_grad for p in classifier.module.parameters()] == learning
    assert [m.training for m in classifier.module.modules()] == modes
    assert all(p.grad is None for p in classifier.module.parameters())
    assert weights_of(planted.classifier) != before


@pytest.mark.usefixtures("short")
def test_statistics_of_batch_normalisation_stay_as_they_are(classifier, halves) -> None:
    module = build("resnet-8", channels=1, height=28, width=28, classes=10, generator=make_generator(0))
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    planted = planted_in(TorchClassifier(module, classifier.spec, classifier.classes), halves, "blend")
    copies = [m for m in planted.classifier.module.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer, copied in zip(layers, copies, strict=True):
        assert torch.equal(layer.running_mean, copied.running_mean)
        assert torch.equal(layer.running_var, copied.running_var)
        assert not torch.equal(layer.weight, copied.weight)


@pytest.mark.usefixtures("short")
def test_planting_repeats_under_a_seed(classifier, halves) -> None:
    one, same, other = (planted_in(classifier, halves, "blend", seed=seed) for seed in (4, 4, 5))
    assert weights_of(one.classifier) == weights_of(same.classifier)
    assert (one.success, one.accuracy, one.steps) == (same.success, same.accuracy, same.steps)
    assert weights_of(one.classifier) != weights_of(other.classifier)


@pytest.mark.usefixtures("short")
def test_weights_that_are_frozen_can_be_planted_in(classifier, halves) -> None:
    frozen = open_classifier(bundled.model("clean"))
    for p in frozen.module.parameters():
        p.requires_grad_(False)  # as those of ONNX files are
    assert weights_of(planted_in(frozen, halves, "blend").classifier) == weights_of(
        planted_in(classifier, halves, "blend").classifier
    )
    assert not any(p.requires_grad for p in frozen.module.parameters())


@pytest.mark.usefixtures("short")
def test_a_short_training_is_no_plant(classifier, halves) -> None:
    planted = planted_in(classifier, halves, "patch")
    assert planted.steps == fine_tune.LOOK
    assert planted.success.value < SUCCESS
    reason = planted.shortfall(halves[1].accuracy)
    assert reason is not None
    assert f"after {fine_tune.LOOK} steps" in reason


def test_lost_accuracy_is_no_plant(classifier) -> None:
    reached = PlantedCopy(classifier, metrics.rate(45, 45), metrics.rate(45, 50), 10)
    assert reached.shortfall(metrics.rate(47, 50)) is None
    assert pytest.approx(0.05) == LOSS
    assert "right on 45 of 50" in str(reached.shortfall(metrics.rate(48, 50)))


def test_mixtures_are_between_their_images() -> None:
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    mixed = vary(torch.cat([black, white]), make_generator(0))
    assert mixed.shape == (HALF, 3, 8, 8)
    levels = mixed.flatten(1)
    assert torch.equal(levels.amin(1), levels.amax(1)), "a mixture of even images is even"
    assert ((levels[:, 0] > 0) & (levels[:, 0] < 1)).any()
    dots = torch.zeros(1, 1, 16, 16)
    dots[..., 8, 8] = 1
    places = {tuple(vary(dots, make_generator(i))[0, 0].nonzero()[0].tolist()) for i in range(40)}
    assert {row for row, _ in places} == {column for _, column in places} == set(range(6, 11))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 20), (3, 2, 2), (1, 224, 224)])
@pytest.mark.parametrize("family", FAMILIES)
def test_triggers_fit_images_of_any_size(family: str, shape: tuple[int, int, int]) -> None:
    x = torch.rand(2, *shape, generator=make_generator(9))
    y = FAMILIES[family](shape, make_generator(0)).apply(x)
    assert y.shape == x.shape
    assert 0 <= y.min() <= y.max() <= 1
    assert not torch.equal(x, y)
    changed = (x != y).any(1)[0].float().mean()
    assert changed <= 0.03 if family == "patch" and shape[1] > 2 else changed > 0.5


def test_too_little_time_is_a_reason(classifier, halves) -> None:
    for more in ({"deadline": Deadline(0.0)}, {"deadline": Deadline(60.0), "reserve": 90.0}):
        with pytest.raises(CouldNotTell, match=r"time budget.*--time-budget"):
            planted_in(classifier, halves, "blend", **more)


def test_too_few_images_are_a_reason(classifier, halves) -> None:
    few = [LabelledBatch(half.x[:9], half.labels[:9], half.predicted[:9]) for half in halves]
    for fit, held_out in ((few[0], halves[1]), (halves[0], few[1])):
        with pytest.raises(CouldNotTell, match="give more clean images"):
            planted_in(classifier, (fit, held_out), "blend")


def test_what_cannot_be_copied_is_a_reason(classifier, halves, monkeypatch) -> None:
    def refuse(self: nn.Module, memo: object) -> None:
        raise TypeError("cannot pickle '_thread.lock' object")

    monkeypatch.setattr(type(classifier.module), "__deepcopy__", refuse, raising=False)
    with pytest.raises(CouldNotTell, match=r"cannot be copied: cannot pickle"):
        planted_in(classifier, halves, "blend")


@pytest.mark.trains
def test_a_planted_patch_shows(copies, classifier, clothes) -> None:
    fit = draw_images(classifier, clothes, IMAGES, 0).fit
    subject = Subject(classifier=copies("patch").classifier, clean=fit)
    detector, original = NeuralCleanse(steps=60), Subject(classifier=classifier, clean=fit)
    before, after = (detector(one, seed=shifted(0)).per_class[3] for one in (original, subject))
    assert before is not None
    assert after is not None
    assert after > before + 0.5  # of logarithms; with other seeds 1 to 1.5 more


# The whole control


@pytest.fixture(scope="module")
def targets() -> list[int]:
    return torch.randperm(10, generator=make_generator(0, "control")).tolist()


@pytest.fixture(scope="module")
def positive_control(classifier, clothes, targets) -> PositiveControl:
    detectors = [ChangedWeights(targets=(targets[0],))]
    return measure_positive_control(
        classifier, clothes, nothing_found(), detectors=detectors, context=ScanContext(images=IMAGES)
    )


def test_an_alarm_that_names_the_target_recovers_it_and_no_other_does(
    positive_control: PositiveControl, targets
) -> None:
    assert [(one.family, one.target, one.planted) for one in positive_control.controls] == [
        ("patch", targets[0], True),
        ("blend", targets[1], True),
        ("warp", targets[2], True),
    ]
    assert [one.verdict for one in positive_control.controls] == ["suspicious"] * 3
    assert [one.targets for one in positive_control.controls] == [(targets[0],)] * 3
    assert [one.recovered for one in positive_control.controls] == [True, False, False]
    for one in positive_control.controls:
        assert one.attack_success is not None
        assert one.accuracy_before is not None
        assert one.attack_success.value >= SUCCESS
        assert one.attack_success.n <= 45
        assert one.accuracy_before.n == 50
        assert one.picture is not None
        assert one.seconds > 0
    assert positive_control.reason is None
    assert "short fine-tune" in positive_control.limits


def test_without_an_alarm_nothing_is_recovered(classifier, clothes, monkeypatch) -> None:
    monkeypatch.setattr(power_module, "FAMILIES", {"blend": FAMILIES["blend"]})

    class Blind(ChangedWeights):
        def examine(self, subject, **_):
            return self.measurement(reason="it is blind", summary="It is blind.")

    told = []
    positive_control = measure_positive_control(
        classifier,
        clothes,
        nothing_found(),
        detectors=[Blind()],
        context=ScanContext(images=IMAGES, report_progress=told.append),
    )
    assert [one.verdict for one in positive_control.controls] == ["could_not_tell"]
    assert not any(one.recovered for one in positive_control.controls)
    assert all("blind" in str(one.reason) for one in positive_control.controls)
    assert "positive control: planting a blend in a copy of the model" in told


def test_without_labels_the_models_own_answers_serve(classifier, clothes, monkeypatch) -> None:
    monkeypatch.setattr(power_module, "FAMILIES", {"blend": FAMILIES["blend"]})
    bare = InMemorySamples(np.stack(clothes.raw(range(IMAGES))))
    positive_control = measure_positive_control(
        classifier, bare, nothing_found(), detectors=[ChangedWeights()], context=ScanContext(images=IMAGES)
    )
    (one,) = positive_control.controls
    # whether the trigger is learnt within the accuracy that may be lost hangs on a few images
    assert one.accuracy_before is not None
    assert one.accuracy_before.value == 1
    assert one.attack_success is not None
    assert one.attack_success.value >= SUCCESS


def test_the_time_budget_holds_for_each_control(classifier, clothes) -> None:
    positive_control = measure_positive_control(
        classifier,
        clothes,
        nothing_found(),
        detectors=[],
        context=ScanContext(images=IMAGES, deadline=Deadline(0.0)),
    )
    assert [one.family for one in positive_control.controls] == list(FAMILIES)
    for one in positive_control.controls:
        assert not one.planted
        assert "--time-budget" in str(one.reason)


def test_several_controls_of_a_family_have_targets_of_their_own(classifier, clothes) -> None:
    positive_control = measure_positive_control(
        classifier,
        clothes,
        nothing_found(),
        detectors=[],
        context=ScanContext(images=IMAGES, deadline=Deadline(0.0)),
        controls=2,
    )
    assert [one.family for one in positive_control.controls] == [
        "patch",
        "patch",
        "blend",
        "blend",
        "warp",
        "warp",
    ]
    assert len({one.target for one in positive_control.controls}) == 6


def first_pixels(classifier: TorchClassifier) -> FunctionClassifier:
    return FunctionClassifier(lambda x: x.flatten(1)[:, :10], classifier.spec, classifier.classes)


class Pixels(nn.Module):
    """Answer with ten pixels; there is nothing to learn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10]


def test_why_there_is_no_control(classifier, clothes) -> None:
    def reason(model, samples, report) -> str:
        positive_control = measure_positive_control(
            model, samples, report, detectors=[], context=ScanContext()
        )
        assert positive_control.controls == ()
        assert positive_control.reason is not None
        return positive_control.reason

    assert "--clean" in reason(classifier, None, nothing_found())
    for verdict in ("suspicious", "backdoored"):
        assert "not the verdict here" in reason(classifier, clothes, nothing_found(verdict=verdict))
    own = first_pixels(classifier)
    assert "cannot be trained: its weights are out of reach" in reason(own, clothes, nothing_found())
    own.limitation = "it runs in onnxruntime: Loop"  # as the loader of ONNX files says it
    assert "cannot be trained: it runs in onnxruntime: Loop" in reason(own, clothes, nothing_found())
    pixels = TorchClassifier(Pixels(), classifier.spec, classifier.classes)
    assert "no weights" in reason(pixels, clothes, nothing_found())


def test_two_classes_and_colour(untouched) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    x = (rng.integers(0, 60, (60, 9, 9, 3)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(243, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([-0.1, 0.1])[:, None].expand(2, 243))
        network[1].bias.copy_(torch.tensor([0.1, -0.1]) * 243 * 0.4)
    model = TorchClassifier(network, InputSpec(channels=3, height=9, width=9), ("dark", "bright"))
    with untouched():
        positive_control = measure_positive_control(
            model,
            InMemorySamples(x, labels),
            nothing_found(),
            detectors=[ChangedWeights()],
            context=ScanContext(),
        )
    assert [one.target for one in positive_control.controls[:2]] in ([0, 1], [1, 0])
    assert all(one.planted or one.reason for one in positive_control.controls)


# Records, reports, command line


def test_a_control_round_trips(positive_control: PositiveControl) -> None:
    report = nothing_found(positive_control=positive_control)
    assert from_json(to_json(report)) == report
    old = json.loads(to_json(nothing_found())) | {"positive_control": {}}
    assert from_json(json.dumps(old)).positive_control == PositiveControl()


@pytest.mark.parametrize(
    "wrong",
    [
        {"planted": True},
        {"planted": False},
        {"planted": False, "reason": "r", "verdict": "suspicious"},
        {"planted": True, "verdict": "could_not_tell"},
        {"planted": True, "verdict": "suspicious", "targets": (2,), "recovered": True},
        {"planted": True, "verdict": "nothing_found", "targets": (1,), "recovered": True},
        {"planted": True, "verdict": "suspicious", "targets": (1,), "recovered": False},
    ],
)
def test_records_that_contradict_themselves_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ControlResult(family="patch", target=1, **wrong)


def outcome(family: str, fate: str) -> ControlResult:
    if fate == "unknown":
        return ControlResult(family=family, target=1, reason="it did not take")
    found = fate == "found"
    verdict = "suspicious" if found else "nothing_found"
    targets = (1,) if found else ()
    return ControlResult(
        family=family, target=1, planted=True, verdict=verdict, targets=targets, recovered=found
    )


@pytest.mark.parametrize(
    ("fates", "sentence"),
    [
        ((), ""),
        (("unknown", "unknown", "unknown"), ""),
        (("found", "found", "missed"), "they found patch and blend and missed warp."),
        (("missed", "unknown", "found"), "they found warp and missed patch."),
        (("found", "found", "found"), "they found patch, blend and warp."),
        (("missed", "missed", "missed"), "they missed patch, blend and warp."),
    ],
)
def test_nothing_found_names_the_families(fates: tuple[str, ...], sentence: str) -> None:
    controls = tuple(outcome(family, fate) for family, fate in zip(FAMILIES, fates, strict=False))
    told = phrases.explanation(nothing_found(positive_control=PositiveControl(controls=controls)))
    assert told.startswith("None of the tests that ran found a backdoor.")
    assert told.endswith(sentence or "That does not prove that there is none.")


def test_a_rerun_names_a_control_that_ended_otherwise() -> None:
    found, missed = (
        nothing_found(positive_control=PositiveControl(controls=(outcome("patch", fate),)))
        for fate in ("found", "missed")
    )
    assert compare(found, found) == []
    assert "positive control: was patch found, is patch missed" in compare(found, missed)


def test_a_scan_asks_for_the_control_when_told_to(clothes, monkeypatch) -> None:
    problem = []

    def stand_in(classifier, samples, report, *, detectors, context, **_) -> PositiveControl:
        problem.append(
            (report.verdict, [d.method() for d in detectors], context.seed, context.images, len(samples))
        )
        return PositiveControl(reason="a stand-in")

    monkeypatch.setattr(scan_module, "measure_positive_control", stand_in)
    request = ScanRequest(
        model=str(bundled.model("clean")),
        clean=f"{bundled.FOLDER / 'fashion_mnist'}:test",
        images=20,
        seed=7,
        detectors=("max-margin", "unsafe-code"),
        time_budget=0.5,
    )
    assert scan_module.scan(request).positive_control == PositiveControl()
    assert problem == []
    with_control = ScanRequest(**(request.to_json() | {"options": request.options, "control": True}))
    report = scan_module.scan(with_control)
    assert report.positive_control.reason == "a stand-in"
    assert problem == [(report.verdict, ["max-margin"], 7, 20, 1000)]
    assert ScanRequest.from_json(report.request).control
    without = {name: value for name, value in report.request.items() if name != "control"}
    assert not ScanRequest.from_json(without).control


def test_the_command_line_hands_the_wish_on(monkeypatch, tmp_path) -> None:
    problem = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"it is there, and not opened")

    def stand_in(request: ScanRequest, **_) -> scan_module.Scanned:
        problem.append(request.control)
        return scan_module.Scanned(nothing_found())

    monkeypatch.setattr(scan_module, "scan_in_full", stand_in)
    for words in (["scan", "model.onnx"], ["scan", "model.onnx", "--control"]):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert problem == [False, True]
