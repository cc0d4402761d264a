"""One trial: its contents are named, its model made or cached, and the scan sees no more than it may."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench_examples import DATA, PATCH, QUICK, TRAINING, calibration_around, clean, planted, robust, trials
from doorward import bundled
from doorward.attacks.ground_truth import read_plant, triggered
from doorward.bench import fingerprints
from doorward.bench import plan as module
from doorward.bench.cache import ModelCache
from doorward.bench.outcome import Outcome, Truth
from doorward.bench.plan import Planned, Sources, plan
from doorward.bench.suite import Data, Group, MethodChoice, Trial, World
from doorward.bench.worker import TrialRunner
from doorward.core.errors import InputError
from doorward.core.records import Confirmation, Measurement
from doorward.methods.source import score_code
from doorward.models import open_classifier
from doorward.scan.verdict import conclude
from doorward.stats.metrics import rate
from doorward.training import AdversarialSettings, predict, robust_accuracy
from seeds import shifted

SOURCES = Sources(None)


def planned(trial: Trial) -> Planned:
    return plan(trial, SOURCES)


def with_detectors(trial: Trial, *detectors: MethodChoice) -> Trial:
    return trial.model_copy(update={"scan_settings": QUICK.model_copy(update={"detectors": detectors})})


def measurements(outcome: Outcome) -> tuple[Measurement, ...]:
    assert outcome.seen is not None
    return outcome.seen.measurements


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> TrialRunner:
    return TrialRunner(ModelCache(tmp_path_factory.mktemp("cache")), SOURCES)


@pytest.fixture(scope="module")
def outcomes(bench: TrialRunner) -> dict[str, Outcome]:
    found = {}
    for trial in trials(clean(1), planted(1)):
        one = planned(trial)
        found[trial.group] = bench.judge(one, cached=bench.make(one))
    return found


def test_the_truth_is_measured_on_held_out_images(bench: TrialRunner, outcomes: dict[str, Outcome]) -> None:
    (trial,) = trials(planted(1))
    place = bench.cache.get(planned(trial).model_key)
    assert place is not None
    classifier, test = open_classifier(str(place)), bundled.fashion_mnist("test")
    truth = outcomes["planted"].truth
    assert test.labels is not None
    assert truth.clean_accuracy.n == len(test) == 1000
    assert truth.clean_accuracy.successes == int((predict(classifier, test) == test.labels).sum())
    assert (truth.attack, truth.targets, truth.classes) == ("badnets", (3,), 10)
    plant = read_plant(place / "plant.json")
    assert plant.attack_success == truth.attack_success
    assert truth.attack_success is not None
    assert truth.attack_success.n == 500
    everywhere = triggered(test, plant)
    assert everywhere.labels is not None
    whole = float((predict(classifier, everywhere) == 3).mean())
    assert truth.attack_success.value == pytest.approx(whole, abs=0.1)
    assert len(plant.poisoned_ids) == 40
    clean_truth = outcomes["clean"].truth
    assert (clean_truth.attack, clean_truth.targets, clean_truth.attack_success) == (None, (), None)


def test_a_suite_may_give_no_images(bench: TrialRunner) -> None:
    (trial,) = trials(clean(1))
    without = trial.model_copy(update={"scan_settings": QUICK.model_copy(update={"images": 0})})
    one = planned(without)
    seen = bench.judge(one, cached=bench.make(one)).seen
    assert seen is not None
    assert seen.data == ()
    assert [m.detector for m in seen.measurements] == ["max-margin"]
    assert one.model_key == planned(trial).model_key, "it is the same model"
    assert one.work != planned(trial).work


def test_availability_poisoning_has_no_success_to_measure(bench: TrialRunner) -> None:
    flips = MethodChoice(name="label-flipping", settings={"poison_rate": 0.5})
    (trial,) = trials(planted(1, attack=flips))
    one = planned(trial)
    bench.make(one)
    truth = Truth.model_validate(bench.cache.meta(one.model_key)["truth"])
    assert (truth.attack, truth.targets, truth.attack_success) == ("label-flipping", (), None)
    assert truth.clean_accuracy.n == 1000


def test_the_scan_is_the_shipped_one_on_the_images_asked_for(outcomes: dict[str, Outcome]) -> None:
    seen = outcomes["clean"].seen
    assert seen is not None
    (measurement,) = seen.measurements
    assert measurement.detector == "max-margin"
    assert measurement.settings["steps"] == 5
    assert measurement.code == score_code("doorward.detectors.model.max_margin")
    assert [data.used for data in seen.data] == [QUICK.images]
    assert measurement.reason is None
    assert measurement.score == max(s for s in measurement.per_class.values() if s is not None)
    assert seen.subject is not None
    assert seen.subject.clean_accuracy is not None
    assert outcomes["clean"].seconds == pytest.approx(seen.seconds, abs=0.5)
    assert outcomes["clean"].peak_memory is None or 1e8 < outcomes["clean"].peak_memory < 1e10


def test_pictures_and_triggers_stay_out_of_the_store(bench: TrialRunner) -> None:
    fast_inference = MethodChoice(
        name="neural-cleanse", settings={"steps": 60, "restarts": 0, "batch_size": 4}
    )
    (trial,) = trials(clean(1))
    one = planned(with_detectors(trial, fast_inference))
    outcome = bench.judge(one, cached=bench.make(one))
    (measurement,) = measurements(outcome)
    assert measurement.reason is None
    assert len(measurement.per_class) == 10
    assert {evidence.type for evidence in measurement.evidence} <= {"table", "text"}
    assert any(evidence.type == "table" for evidence in measurement.evidence)
    assert len(outcome.model_dump_json()) < 10_000


def test_what_an_earlier_scan_saw_is_not_looked_at_again(bench: TrialRunner) -> None:
    margin, inversion = (
        QUICK.detectors[0],
        MethodChoice(name="neural-cleanse", settings={"steps": 20, "restarts": 0}),
    )
    (trial,) = trials(clean(1))

    bench.make(planned(with_detectors(trial, margin)))
    both, alone = (planned(with_detectors(trial, *some)) for some in ((margin, inversion), (inversion,)))
    fresh, earlier = bench.judge(both, cached=True), bench.judge(alone, cached=True)
    # a scan that had taken an hour and had seen something else: it is the one that counts
    assert earlier.seen is not None
    (inverted,) = earlier.seen.measurements
    tried = Confirmation(target=7, detector="neural-cleanse", success=rate(9, 10))
    stranger = tried.model_copy(update={"detector": "max-margin"})
    high = {"score": 5000.0, "per_class": inverted.per_class | {2: 5000.0}, "seconds": 3600.0}
    marked = earlier.seen.model_copy(
        update={"measurements": (inverted.model_copy(update=high),), "confirmations": (tried, stranger)}
    )
    earlier = earlier.model_copy(update={"seen": marked, "peak_memory": 10**12})
    joined = bench.judge(replace(both, seen={"neural-cleanse": earlier}), cached=True)
    assert joined.seen is not None
    assert [m.detector for m in joined.seen.measurements] == ["max-margin", "neural-cleanse"]
    again, held = joined.seen.measurements
    assert held == marked.measurements[0]
    assert again.score == measurements(fresh)[0].score
    assert joined.seen.confirmations == (tried,), "of the detectors that were not asked again"
    assert 3600 < joined.seconds < 3700
    assert 3600 < joined.seen.seconds < 3700
    assert joined.peak_memory == 10**12
    assert measurements(bench.judge(both, cached=True))[1].score == measurements(fresh)[1].score
    # one verdict is concluded of all that was seen, by whichever scan
    calibrated = calibration_around(measurements(fresh))
    assert conclude(joined.seen, calibrated).verdict == "suspicious"
    assert conclude(joined.seen, calibrated).targets == (2,)
    only = joined.seen.model_copy(update={"measurements": (again,)})
    assert conclude(only, calibrated).verdict == "nothing_found"


def test_a_model_is_made_once(bench: TrialRunner, outcomes: dict[str, Outcome]) -> None:
    (trial,) = trials(clean(1))
    one = planned(trial)
    assert not outcomes["clean"].cached
    assert bench.make(one)
    again = bench.judge(one, cached=True)
    assert again.trained == outcomes["clean"].trained
    assert measurements(again)[0].score == measurements(outcomes["clean"])[0].score


def test_a_broken_model_is_made_again_with_the_same_weights(bench: TrialRunner) -> None:
    (trial,) = trials(clean(1))
    one = planned(trial)
    assert bench.make(one) is True
    file = bench.cache.place(one.model_key) / "model.safetensors"
    weights = file.read_bytes()
    flipped = bytearray(weights)
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    assert bench.make(one) is False
    assert file.read_bytes() == weights


def test_another_seed_and_draw_scan_the_same_model_with_other_images() -> None:
    base, seed, draw = (planned(t) for t in trials(clean(1, seeds=2, draws=2)))
    assert base.model_key == seed.model_key == draw.model_key
    assert len({base.key, seed.key, draw.key}) == 3


@pytest.mark.parametrize(
    "group",
    [
        clean(training={**TRAINING, "epochs": 4}),
        clean(data=DATA.model_copy(update={"rows": 401})),
        clean(data=DATA.model_copy(update={"classes": tuple(range(9))})),
        clean(architectures=("vgg",)),
        robust(2),
        clean(attack=PATCH.model_copy(update={"settings": {**PATCH.settings, "target": 4}})),
    ],
    ids=["training", "rows", "classes", "architecture", "robust", "attack setting"],
)
def test_what_makes_another_model_has_another_key(group: Group) -> None:
    keys = [planned(t).model_key for g in (clean(), planted(2), group) for t in trials(g)]
    assert len(set(keys)) == len(keys)


def test_defaults_that_change_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    (trial,) = trials(clean(1, training={}))
    before = planned(trial)
    assert before.resolved["model"]["training"]["learning_rate"] > 0
    default = module.default_settings
    monkeypatch.setattr(
        module, "default_settings", lambda *a, **k: default(*a, **k).model_copy(update={"epochs": 1})
    )
    assert planned(trial).model_key != before.model_key


def change_code(monkeypatch: pytest.MonkeyPatch, *units: str) -> None:
    """Have these units be of other code."""

    def other(unit: str) -> str:
        return "other" if unit in units else fingerprints.fingerprint(unit)

    monkeypatch.setattr(module, "fingerprint", other)


def test_the_code_that_makes_a_model_is_part_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    (trial,) = trials(planted(1))
    keys = {planned(trial).model_key}
    for units in (("attack badnets",), ("training.loop",), ("models.architectures",)):
        change_code(monkeypatch, *units)
        keys.add(planned(trial).model_key)
    assert len(keys) == 4
    change_code(monkeypatch, "attack blended", "training.adversarial", "models.sequences", "bench.synthetic")
    assert planned(trial).model_key in keys, "what makes other models does not matter"
    for unit, code in planned(trial).resolved["model"]["code"].items():
        assert code == fingerprints.fingerprint(unit)


def test_only_robust_models_depend_on_how_they_are_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    (plain,) = trials(clean(1))
    (one,) = trials(robust(1))
    (other,) = trials(robust(1, robust={"eps": 0.1, "steps": 2}))
    (same,) = trials(robust(1, robust={"eps": 0.1, "norm": "linf", "steps": 1, "variant": "fast"}))
    assert "adversarial" not in planned(plain).resolved["model"]
    keys = [planned(trial).model_key for trial in (plain, one, other)]
    assert len(set(keys)) == 3
    assert planned(same).model_key == keys[1], "what is left out has its default"
    change_code(monkeypatch, "training.adversarial")
    assert planned(plain).model_key == keys[0]
    assert planned(one).model_key not in keys


@pytest.mark.trains
def test_a_robust_model_is_trained_and_measured_under_attack(bench: TrialRunner) -> None:
    truths = []
    models = [planned(trials(make(1, first_seed=shifted(0)))[0]) for make in (clean, robust)]
    for one in models:
        bench.make(one)
        truths.append(Truth.model_validate(bench.cache.meta(one.model_key)["truth"]))
    plain, held = truths[0], truths[1].robust_accuracy
    assert plain.robust_accuracy is None
    assert held is not None
    assert held.n == 200
    attack = AdversarialSettings(eps=0.1, variant="fast").stronger()
    classifier = open_classifier(str(bench.cache.place(models[0].model_key)))
    test = SOURCES.part(DATA, "test").draw(200, np.random.default_rng(0))
    assert robust_accuracy(classifier, test, settings=attack, seed=0).value < held.value - 0.08


def test_code_that_judges_is_part_of_the_result_and_not_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    (trial,) = trials(clean(1))
    before = planned(trial)
    monkeypatch.setattr(module, "detector_fingerprint", lambda name: f"other {name}")
    after = planned(trial)
    assert before.model_key == after.model_key
    assert before.key != after.key
    (detector,) = before.resolved["judging"]["detectors"]
    assert detector["code"] == fingerprints.fingerprint("detector max-margin")


def test_names_of_suite_and_folder_make_no_other_model(tmp_path: Path) -> None:
    shutil.copytree(bundled.FOLDER / "fashion_mnist", tmp_path / "copy")
    (trial,) = trials(clean(1))
    moved = trial.model_copy(update={"suite": "x", "data": DATA.model_copy(update={"name": "copy"})})
    there = plan(moved, Sources(tmp_path))
    assert there.model_key == planned(trial).model_key
    assert there.key != planned(trial).key


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    (trial,) = trials(clean(1, data=Data(name="nowhere")))
    assert "no folder of data sets is given; use --data or DOORWARD_DATA" in str(planned(trial).missing)
    assert f"data set nowhere is not in {tmp_path}" in str(plan(trial, Sources(tmp_path)).missing)
    (few,) = trials(clean(1, data=DATA.model_copy(update={"classes": (3, 12)})))
    assert "has 10 classes, not (3, 12)" in str(planned(few).missing)
    (found,) = trials(clean(1))
    assert planned(found).missing is None


def test_settings_that_are_wrong_are_named() -> None:
    (trial,) = trials(planted(1, attack=MethodChoice(name="badnets", settings={"size": -1})))
    with pytest.raises(InputError, match="badnets: size = -1"):
        planned(trial)


def test_some_classes_are_renumbered() -> None:
    whole = bundled.fashion_mnist("train")
    assert whole.labels is not None
    part = SOURCES.part(Data(name=DATA.name, classes=(2, 7)), "train")
    assert part.classes == (whole.classes[2], whole.classes[7])
    assert part.labels is not None
    wanted = np.flatnonzero((whole.labels == 2) | (whole.labels == 7))
    assert part.labels.tolist() == [0 if y == 2 else 1 for y in whole.labels[wanted]]
    first = wanted[:5]
    assert all((a == b).all() for a, b in zip(part.raw(range(5)), whole.raw(first), strict=True))


def test_generated_data_are_named_without_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Data(name="shapes", rows=300, world=World(classes=4, seed=2))
    (trial,) = trials(clean(1, data=world))
    with monkeypatch.context() as patched:
        patched.setattr(module.synthetic, "open_synthetic", lambda *a, **k: pytest.fail("made"))
        one = plan(trial, Sources(None))
    made = SOURCES.part(trial.data, "train")
    assert one.contents is not None
    assert (one.contents.images, one.contents.classes) == (len(made), len(made.classes)) == (300, 4)
    height, width, channels = made.raw([0])[0].shape
    assert one.contents.shape == (channels, height, width)
    others = [
        plan(t, SOURCES).model_key
        for t in (
            trial,
            trial.model_copy(update={"data": world.model_copy(update={"name": "shapes-hard"})}),
            trial.model_copy(update={"data": world.model_copy(update={"world": World(classes=4, seed=3)})}),
        )
    ]
    assert len(set(others)) == 3


def test_meta_says_how_a_model_came_about(bench: TrialRunner, outcomes: dict[str, Outcome]) -> None:
    (trial,) = trials(clean(1))
    one = planned(trial)
    assert outcomes["clean"].truth.classes == 10
    meta = json.loads((bench.cache.place(one.model_key) / "meta.json").read_text())
    assert meta["resolved"] == one.resolved["model"]
    assert meta["training"]["threads"] == 1
    assert meta["training"]["precision"] == "float32"
    assert meta["training"]["images"] == DATA.rows
