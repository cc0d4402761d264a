"""What the bench measures of repairs, and what it counts."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bench_examples import DATA, PATCH, TRAINING, result
from doorward.bench import page, results, tables
from doorward.bench.cache import ModelCache
from doorward.bench.mending import Behaviour, MendedModel, Mending, behaviour
from doorward.bench.plan import Sources, plan
from doorward.bench.results import Result, Results
from doorward.bench.suite import (
    Claim,
    Group,
    Measure,
    MethodChoice,
    RepairSettings,
    ScanSettings,
    Suite,
    expand,
    get_suite,
)
from doorward.bench.summary import measure, summarise
from doorward.bench.worker import TrialRunner
from doorward.data import InMemorySamples, Samples
from doorward.methods import registry
from doorward.stats.metrics import rate

METHODS = ("fine-tuning", "auto")
QUICK = MethodChoice(name="max-margin", settings={"starts": 1, "steps": 5})
REPAIRED = RepairSettings(methods=METHODS, share=0.1, epochs=1, detectors=(QUICK,))
CLAIMS: tuple[Measure, ...] = (
    "success_repaired",
    "groups_repaired",
    "accuracy_repaired",
    "success_returned",
    "nothing_found_repaired",
)


def repaired(name: str = "repaired", models: int = 2) -> Group:
    return Group(
        name=name, data=DATA, models=models, attack=PATCH, training=TRAINING, repair_settings=REPAIRED
    )


def suite(*groups: Group) -> Suite:
    claims = (Claim(text=name, source="our bar", measure=name, at_most=0.05) for name in CLAIMS)
    return Suite(
        name="tiny",
        title="Tiny",
        about="Small.",
        scales={"smoke": groups},
        claims=tuple(claims),
        scan_settings=ScanSettings(detectors=None),
    )


def seen(accuracy: int, success: int, right: int = 0) -> Behaviour:
    """Return what was measured on 1000 clean and 900 triggered images."""
    return Behaviour(accuracy=rate(accuracy, 1000), success=rate(success, 900), right=rate(right, 900))


def row(trial: str, group: str, auto: MendedModel, success: float = 1.0) -> Result:
    tuned = MendedModel(reason="too few clean samples")
    mending = Mending(
        clean=50,
        before=seen(900, 890),
        verdict="backdoored",
        repairs={"fine-tuning": tuned, "auto": auto},
    )
    measured = {"verdict": None, "detectors": {}, "plant": (3,), "mending": mending}
    return result(trial, group, attack_success=success, **measured)


GONE = MendedModel(
    done="unlearning",
    after=seen(895, 9, 800),
    later=seen(900, 18, 810),
    verdict="nothing_found",
    parameters=10,
    seconds=50.0,
)
LEFT = MendedModel(
    done="fine-pruning", after=seen(870, 450), later=seen(880, 500), verdict="suspicious", seconds=70.0
)
HELD = Results(
    suite="tiny",
    scale="smoke",
    made_with={"torch": ("2.13",)},
    results=(
        row("repaired-00", "repaired", GONE),
        row("repaired-01", "repaired", GONE, success=0.3),
        row("other-00", "other", LEFT),
    ),
)
SUMMARY = summarise(suite(repaired(), repaired("other", 1)), HELD)


def test_claims_are_about_what_auto_mended() -> None:
    found = {name: measure(name, HELD.results) for name in CLAIMS}
    assert found == {
        "success_repaired": rate(9 + 450, 1800),
        "groups_repaired": rate(1, 2),
        "accuracy_repaired": rate(1, 2),
        "success_returned": rate(18 + 500, 1800),
        "nothing_found_repaired": rate(1, 2),
    }
    assert measure("success_repaired", []) == rate(0, 0)
    assert [claim.reached for claim in SUMMARY.claims] == [False] * 5


def test_each_repair_of_a_group_has_a_line_without_plants_that_did_not_take() -> None:
    tuned, auto, *_ = SUMMARY.mendings
    assert [(one.group, one.repair) for one in SUMMARY.mendings] == [
        (group, name) for group in ("repaired", "other") for name in ("fine-tuning", "auto")
    ]
    assert (tuned.models, tuned.mended, tuned.accuracy, tuned.success) == (1, 0, None, None)
    assert tuned.reasons == ("too few clean samples",)
    assert (auto.models, auto.mended, auto.seconds) == (1, 1, 50.0)
    assert auto.change == pytest.approx(-0.005)
    assert (auto.success_before, auto.success) == (rate(890, 900), rate(9, 900))
    assert (auto.right, auto.returned, auto.nothing_found) == (rate(800, 900), rate(18, 900), rate(1, 1))
    assert SUMMARY.plants == SUMMARY.groups == SUMMARY.inspections == ()


def test_the_tables() -> None:
    text = tables.to_markdown(SUMMARY)
    auto = (
        "| badnets | fashion_mnist | small-cnn | auto | 1 of 1 | 90.0 % | 89.5 % | -0.50 | 98.9 % | 1.0 % |"
    )
    assert f"{auto} 88.9 % | 2.0 % | 1 of 1 | 50 |" in text.splitlines()
    assert "| fine-tuning | 0 of 1 |  |  |  |  |  |  |  |  |  |" in text
    assert "fine-tuning: too few clean samples." in text
    assert "the attack did not take: repaired-01." in text
    assert "P-values" not in text
    first, second, *_ = csv.DictReader(io.StringIO(tables.to_csv(SUMMARY)))
    assert (first["repair"], second["change in points"]) == ("fine-tuning", "-0.50")
    assert "right label again" in page.render(SUMMARY)


def test_results_go_to_a_file_and_come_back(tmp_path: Path) -> None:
    back = results.read_results(results.write_results(HELD, tmp_path))
    again = summarise(suite(repaired(), repaired("other", 1)), back)
    told = [(one.repair, one.success, one.seconds, one.reasons) for one in SUMMARY.mendings]
    assert [(one.repair, one.success, one.seconds, one.reasons) for one in again.mendings] == told


def test_behaviour_counts_triggered_images_of_other_classes_alone() -> None:
    class Told:
        """Answer as it is told, by the mean of an image."""

    samples = InMemorySamples(np.zeros((4, 28, 28), np.uint8), [3, 0, 1, 2], classes="abcd")
    plant = registry.build("attack", "badnets", {"target": 3, "poison_rate": 0.5})(samples, seed=0).plant
    answers = {False: [3, 0, 1, 1], True: [3, 1, 3]}

    def predict(_: object, shown: Samples, **__: object) -> npt.NDArray[np.int64]:
        return np.array(answers[len(shown) == 3])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("doorward.bench.mending.predict", predict)
        patch.setattr("doorward.training.loop.predict", predict)
        found = behaviour(Told(), samples, plant)  # type: ignore[arg-type]
    assert (found.accuracy, found.success, found.right) == (rate(3, 4), rate(2, 3), rate(1, 3))


def test_the_suite_measures_repairs_of_models_of_its_own() -> None:
    one = get_suite("repairs")
    assert not one.scans
    for scale in one.scales:
        for group in one.groups(scale):
            assert group.attack is not None
            assert group.repair_settings is not None
            assert group.repair_settings.methods[-1] == "auto"
            for name in group.repair_settings.methods[:-1]:
                registry.build("repair", name, {})
    others = {t.seed for name in ("attacks", "scan-attacks") for t in expand(get_suite(name), "cpu")}
    assert not others & {t.seed for t in expand(one, "cpu")}


def test_the_key_is_of_repairs_and_of_the_code_that_mends() -> None:
    (trial,) = expand(suite(repaired(models=1)), "smoke")
    planned = plan(trial, Sources(None))
    judging = planned.resolved["judging"]
    assert judging["repairs"]["methods"] == list(METHODS)
    assert {"code", "calibration"} < set(judging)
    assert planned.twin is None, "nothing is compared with a clean counterpart"
    bare = plan(trial.model_copy(update={"repair_settings": None}), Sources(None))
    assert bare.model_key == planned.model_key
    assert bare.work != planned.work


@pytest.mark.trains
def test_a_trial_mends_a_model_by_every_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What unlearning does to weights is tested where it is; here it does nothing, and takes no time."""
    monkeypatch.setattr("doorward.repairs._relearning.relearn", lambda *_, **__: None)
    (trial,) = expand(suite(repaired(models=1)), "smoke")
    planned = plan(trial, Sources(None))
    runner = TrialRunner(ModelCache(tmp_path), Sources(None))
    outcome = runner.judge(planned, cached=runner.make(planned))
    found = outcome.mending
    assert found is not None
    assert found.clean == 40
    assert found.verdict == "could_not_tell", "a detector at other settings is not calibrated"
    assert list(found.repairs) == list(METHODS)
    for one in found.repairs.values():
        assert one.reason is None
        assert one.after is not None
        assert one.later is not None
        assert one.after.success.n == found.before.success.n
    assert found.repairs["auto"].verdict is not None
    assert found.repairs["fine-tuning"].verdict is None
