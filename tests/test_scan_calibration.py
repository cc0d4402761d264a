from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from doorward.bench.calibrate import calibrated_settings
from doorward.bench.holdout import family, left_out
from doorward.core.errors import InputError
from doorward.core.records import Measurement
from doorward.methods import registry
from doorward.methods.source import score_code
from doorward.scan.calibration import (
    BACKDOORED,
    BUCKETS,
    FEWEST,
    SHIPPED,
    SUSPICIOUS,
    Calibration,
    CalibrationSet,
    CleanModel,
    DetectorResult,
    ScoredModel,
    ScoreScale,
    bucket,
    calibration_file,
    calibrations,
    judge,
    quick_file,
    shipped,
)

NAMES = ("neural-cleanse", "max-margin", "patch-search", "blend-search")
SETTINGS = {name: registry.build("detector", name, {}).score_settings() for name in NAMES}


#: How far all other classes lie below the one that scores highest.
BELOW = 4.0

Table = tuple[float | None, ...]
NUMBERS = itertools.count()


def calibration(models: list[CleanModel], **weights: float) -> CalibrationSet:
    named = {name.replace("_", "-"): weight for name, weight in weights.items()}
    return CalibrationSet(settings=SETTINGS, weights=named, models=tuple(models))


def table(score: float, classes: int, at: int = 3) -> Table:
    """Return scores of all classes, of which one is high."""
    return tuple(score if t == at % classes else score - BELOW for t in range(classes))


def model(classes: int, first: float | None, second: float | None = 0.0, data: str = "a") -> CleanModel:
    scores = {"neural-cleanse": first, "max-margin": second}
    return CleanModel(
        name=f"{next(NUMBERS)}",
        data=data,
        architecture="small-cnn",
        classes=classes,
        shape=(1, 28, 28),
        accuracy=0.9,
        scores={name: None if score is None else table(score, classes) for name, score in scores.items()},
    )


def drawn(n: int, seed: int = 0, classes: tuple[int, ...] = (2, 5, 12, 30)) -> list[CleanModel]:
    """Return models whose scores lie differently by number of classes, and go together somewhat."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        k = classes[i % len(classes)]
        shared = rng.normal()
        first, second = k * 0.1 + rng.gumbel() * (1 + k / 30) + shared, rng.gumbel() + shared
        one = model(k, first, second, "ab"[i % 2])
        # in half of the models the detectors have different classes on top
        apart = {"max-margin": table(second, k, at=int(rng.integers(3, 5)))}
        made.append(one.model_copy(update={"scores": one.scores | apart}))
    return made


def measured(score: float | None, classes: int = 12, name: str = "neural-cleanse", **more) -> Measurement:
    low = None if score is None else min(score, 0.0) - 1.0
    per_class = {t: (score if t == 3 % classes else low) for t in range(classes)}
    base = {
        "detector": name,
        "level": "model",
        "kind": "backdoor",
        "summary": "",
        "atlas": registry.get("detector", name).atlas if name in NAMES else (),
        "settings": SETTINGS.get(name, {}),
    }
    return Measurement(**(base | {"score": score, "per_class": per_class} | more))


def p_of(held: CalibrationSet, score: float, classes: int = 10, name: str = "neural-cleanse") -> float:
    compared = held.compare({name: table(score, classes)})
    assert compared is not None
    assert compared.p_value == compared.standings[name].p_value
    return compared.p_value


def by_hand(held: CalibrationSet, scores: dict[str, Table]) -> float:
    """Return the fused p-value as written in the documentation, without any shortcut."""

    def group(classes: int) -> int:
        return 0 if classes == 2 else 1 if classes < 5 else 2

    joined = [{n: m.scores[n] for n in scores} for m in held.models] + [scores]

    def known(row: Table) -> list[float]:
        return [value for value in row if value is not None]

    def place(name: str, classes: int, score: float | None) -> float:
        if score is None:
            return 0.0
        usual = [max(known(t[name])) for t in joined if group(len(t[name])) == group(classes)]
        middle = float(np.median(usual))
        far = (score - middle) / (2 * sum(max(s - middle, 0) for s in usual) / len(usual))
        return math.copysign(math.log(1 + abs(far)), far)

    sums = [
        max(
            sum(held.weights.get(n, 1.0) * place(n, len(t[n]), t[n][c]) for n in scores)
            for c in range(len(next(iter(t.values()))))
        )
        for t in joined
    ]
    return sum(one >= sums[-1] - 1e-12 for one in sums) / len(sums)


def test_a_p_value_is_the_place_among_clean_models() -> None:
    held = calibration([model(10, float(s)) for s in range(19)])
    assert p_of(held, 18.5) == 1 / 20
    assert p_of(held, 18.0) == 2 / 20
    assert p_of(held, -1.0) == 1.0


def test_scores_are_compared_after_what_the_number_of_classes_does() -> None:
    # the same shape of scores, elsewhere and wider: the same places
    few, many = ([model(k, a + b * s) for s in range(20)] for k, a, b in ((2, 0, 1), (30, 7, 3)))
    held = calibration([*few, *many])
    for s in (3.0, 12.5, 19.5):
        assert p_of(held, s, 2) == p_of(held, 7 + 3 * s, 43)
    assert p_of(held, 1000.0, 25) == 1 / 41


def test_models_of_three_and_four_classes_are_measured_among_each_other() -> None:
    few, many = ([model(k, a + b * s) for s in range(20)] for k, a, b in ((3, 0, 1), (30, 7, 3)))
    held = calibration([*few, *many])
    for s in (3.0, 12.5, 19.5):
        assert p_of(held, s, 4) == p_of(held, 7 + 3 * s, 43)
    # too few of them say nothing of what is usual
    held = calibration([*few[:9], model(5, 3.0), *many])
    for s in (3.0, 12.5, 19.5):
        assert p_of(held, s, 4) == p_of(held, s, 43)


def test_more_than_four_classes_are_compared_as_they_are() -> None:
    held = calibration([model(k, float(s)) for s in range(20) for k in (5, 30)])
    for s in (3.0, 12.5, 19.5):
        assert p_of(held, s, 6) == p_of(held, s, 43)


@pytest.mark.parametrize("weights", [{}, {"neural_cleanse": 2.0, "max_margin": 0.25}])
@pytest.mark.parametrize("names", [NAMES[:2], NAMES[:1]])
def test_the_comparison_is_the_one_by_hand(names, weights) -> None:
    drawn_ones = [*drawn(60), *drawn(20, seed=1, classes=(3, 4))]
    held, rng = calibration(drawn_ones, **weights), np.random.default_rng(3)
    for classes in (2, 4, 7, 20, 90):
        for _ in range(2):
            scores = {name: tuple((rng.normal(size=classes) * 3).tolist()) for name in names}
            scores["neural-cleanse"] = (None, *scores["neural-cleanse"][1:])
            compared = held.compare(scores)
            assert compared is not None
            assert compared.p_value == by_hand(held, scores)


def test_detectors_that_agree_on_a_class_weigh_more() -> None:
    held = calibration(drawn(200))
    agreeing = held.compare({"neural-cleanse": table(5.0, 12), "max-margin": table(3.0, 12)})
    differing = held.compare({"neural-cleanse": table(5.0, 12), "max-margin": table(3.0, 12, at=7)})
    assert agreeing is not None
    assert differing is not None
    assert agreeing.p_value < differing.p_value / 2


def test_the_standard_by_hand() -> None:
    # median 3; above it 0, 1 and 7: their sum over all five, doubled
    found = ScoreScale.among(np.array([[1.0], [2.0], [3.0], [4.0], [10.0]]))
    assert (found.middle[0], found.spread[0]) == (3.0, pytest.approx(2 * 8 / 5))
    assert ScoreScale.among(np.ones((5, 1))).of(np.ones((1, 1))) == 0.0
    # 3.2 above the middle is one spread, 12.8 four
    places = found.of(np.array([[3.0 + 3.2], [3.0 - 12.8]]))
    assert places == pytest.approx(np.log([[2.0], [1 / 5.0]]))
    assert found.at(places) == pytest.approx(np.array([[6.2], [-9.8]]))


def test_buckets_are_those_of_the_design() -> None:
    assert [bucket(k) for k in (2, 3, 9, 10, 20, 21, 100, 1000)] == [0, 1, 1, 2, 2, 3, 3, 3]


def test_a_bucket_with_few_models_says_nothing() -> None:
    held = calibration([model(10, float(s)) for s in range(FEWEST)] + [model(2, 1.0)] * (FEWEST - 1))
    assert held.compare({"neural-cleanse": table(1.0, 10)}) is not None
    assert held.compare({"neural-cleanse": table(1.0, 2)}) is None
    assert held.compare({"strip": table(1.0, 10)}) is None
    assert held.compare({}) is None
    assert calibration([]).compare({"neural-cleanse": table(1.0, 10)}) is None


def test_a_detector_that_the_calibration_does_not_know_is_left_out() -> None:
    held = calibration(drawn(100))
    alone = held.compare({"neural-cleanse": table(2.0, 12)})
    next_to = held.compare({"neural-cleanse": table(2.0, 12), "strip": table(99.0, 12)})
    assert alone == next_to


@pytest.mark.parametrize("weights", [{}, {"neural_cleanse": 2.0, "max_margin": 0.25}])
@pytest.mark.parametrize("names", [NAMES[:2], NAMES[:1]])
def test_clean_models_are_flagged_as_often_as_is_said(names, weights) -> None:
    """Small calibration sets, fresh models: the share at a level is at most the level, and not far below."""
    rates = []
    for seed in range(40):
        held = calibration(drawn(100, seed=2 * seed), **weights)
        found = [
            held.compare({n: one.scores[n] or () for n in names}) for one in drawn(40, seed=2 * seed + 1)
        ]
        rates.append([np.mean([c.p_value <= level for c in found if c]) for level in (0.05, 0.02, 0.3)])
    means, errors = np.mean(rates, axis=0), np.std(rates, axis=0) / np.sqrt(len(rates))
    for mean, error, level in zip(means, errors, (0.05, 0.02, 0.3), strict=True):
        assert mean <= level + 3 * error
        assert mean >= level - 0.02 - 3 * error


def apart(models: list[CleanModel], *, common: bool = True) -> CalibrationSet:
    """Return a calibration in which `max-margin` is a witness of its own, on the same models or on others."""
    if not common:
        one, two = NAMES[:2]
        models = [
            model.model_copy(update={"name": f"{name} of {model.name}", "scores": {name: model.scores[name]}})
            for model in models
            for name in (one, two)
        ]
    return calibration(models).model_copy(update={"witnesses": {"max-margin": "margins"}})


@pytest.mark.parametrize("common", [True, False])
def test_witnesses_share_the_error(common: bool) -> None:
    """Two witnesses together flag clean models as often as one would, less often if they share no models."""
    rates = []
    for seed in range(40):
        held = apart(drawn(100, seed=2 * seed), common=common)
        found = [
            held.compare({n: one.scores[n] or () for n in NAMES[:2]}) for one in drawn(40, seed=2 * seed + 1)
        ]
        rates.append([np.mean([c.p_value <= level for c in found if c]) for level in (0.05, 0.3)])
        for one in found:
            assert one is not None
            alone = min(s.p_value for s in one.standings.values())
            assert one.p_value >= alone
            assert common or one.p_value == pytest.approx(min(1.0, 2 * alone))
            assert any(s.flagged for s in one.standings.values()) == (one.p_value <= SUSPICIOUS)
    means, errors = np.mean(rates, axis=0), np.std(rates, axis=0) / np.sqrt(len(rates))
    assert (means <= np.array([0.05, 0.3]) + 3 * errors).all()
    assert means[1] > (0.25 if common else 0.1)


def test_the_farthest_witness_counts_in_units_of_what_is_usual_for_it() -> None:
    found = []
    for unit in (1.0, 1000.0):
        held = apart([model(12, float(i % 20), unit * (i // 20 % 10 / 10)) for i in range(200)])
        scores = {"neural-cleanse": table(0.0, 12, at=1), "max-margin": (unit * 0.8, *[-unit] * 11)}
        one = held.compare(scores)
        assert one is not None
        # 40 of 200 models have so high a margin; of some others the other witness goes as far
        assert one.standings["max-margin"].p_value == pytest.approx(41 / 201)
        assert 41 / 201 < one.p_value < 82 / 201
        found.append(one.p_value)
    assert found[0] == found[1]


def test_the_only_witness_is_not_outvoted() -> None:
    models = [model(12, float(i % 20), i // 20 % 10 / 10) for i in range(200)]
    scores = {"neural-cleanse": table(0.0, 12, at=1), "max-margin": table(1.2, 12, at=2)}
    together, single = calibration(models).compare(scores), apart(models).compare(scores)
    assert together is not None
    assert single is not None
    assert single.p_value == 1 / 201 < together.p_value
    assert single.standings["max-margin"].targets == (2,)
    assert not single.standings["neural-cleanse"].flagged
    # a witness that says nothing of a model takes no share of the error
    without = apart(models).compare({"neural-cleanse": scores["neural-cleanse"]})
    assert without == calibration(models).compare({"neural-cleanse": scores["neural-cleanse"]})


def as_one_witness(held: CalibrationSet) -> CalibrationSet:
    """Return the calibration with both detectors as one witness."""
    return held.model_copy(update={"witnesses": dict.fromkeys(NAMES[:2], "both")})


def test_of_detectors_of_one_witness_none_is_outvoted() -> None:
    held = calibration([model(12, float(i % 20), i // 20 % 10 / 10) for i in range(200)])
    lone = tuple(6.0 if t == 2 else 0.0 for t in range(12))
    scores = {"neural-cleanse": table(-5.0, 12, at=1), "max-margin": lone}
    summed, found = held.compare(scores), as_one_witness(held).compare(scores)
    assert summed is not None
    assert found is not None
    assert found.p_value < summed.p_value
    assert found.standings["max-margin"].targets == (2,)
    both = as_one_witness(held).compare(scores | {"neural-cleanse": table(19.0, 12, at=2)})
    assert both is not None
    assert both.p_value == 1 / 201, "two that agree are stronger than either"


@pytest.mark.parametrize("weights", [{}, {"neural_cleanse": 2.0, "max_margin": 0.25}])
@pytest.mark.parametrize("together", [lambda held: held, as_one_witness], ids=["sum", "floored"])
@pytest.mark.parametrize("classes", [2, 12])
def test_the_thresholds_part_what_is_flagged_from_what_is_not(classes, together, weights) -> None:
    held, rng = together(calibration(drawn(400), **weights)), np.random.default_rng(5)
    sides = set()
    for _ in range(200):
        scores = {name: tuple((rng.normal(size=classes) * 3 + 2).tolist()) for name in NAMES[:2]}
        compared = held.compare(scores)
        assert compared is not None
        standings = compared.standings.items()
        assert any(s.flagged for _, s in standings) == (compared.p_value <= SUSPICIOUS)
        for name, s in standings:
            assert s.flagged == (max(scores[name]) >= s.threshold)
            assert bool(s.targets) == s.flagged
            sides.add(s.flagged)
    assert len(sides) == 2


def test_a_threshold_is_where_the_flag_begins() -> None:
    held, margins = calibration(drawn(400)), table(0.0, 12)

    def standing(score: float) -> DetectorResult:
        compared = held.compare({"neural-cleanse": table(score, 12), "max-margin": margins})
        assert compared is not None
        return compared.standings["neural-cleanse"]

    low, high = 0.0, 50.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if standing(middle).flagged else (middle, high)
    # the bar moves a little with the score, which counts as one of its bucket
    assert standing(low - 0.5).threshold == pytest.approx(high, abs=0.1)
    assert standing(high + 0.5).threshold == pytest.approx(high, abs=0.1)


def test_no_threshold_is_told_where_no_score_lies() -> None:
    # a detector of little weight would have to go very far alone
    held = calibration(drawn(400), max_margin=0.25)
    compared = held.compare({"neural-cleanse": table(0.0, 12), "max-margin": table(0.0, 12)})
    assert compared is not None
    assert compared.standings["max-margin"].threshold == math.inf
    # of a usual score of what weighs more it is told, in the range of scores
    highest = max(max(s for s in m.scores["neural-cleanse"] if s is not None) for m in held.models)
    assert compared.standings["neural-cleanse"].threshold < 10 * highest
    (_, margins) = judge([measured(0.0), measured(0.0, name="max-margin")], held).findings
    assert margins.threshold is None
    # where the sum is enough all the same, the finding is flagged and has one
    both = held.compare({"neural-cleanse": table(90.0, 12), "max-margin": table(60.0, 12)})
    assert both is not None
    assert all(s.flagged and s.threshold < math.inf for s in both.standings.values())


def test_a_finding_that_speaks_against_the_class_is_not_flagged() -> None:
    held = calibration(drawn(400))
    high = [1_000.0 if t == 3 else -9.0 for t in range(12)]
    compared = held.compare({"neural-cleanse": high, "max-margin": table(-3.0, 12)})
    assert compared is not None
    assert compared.standings["neural-cleanse"].targets == (3,)
    assert not compared.standings["max-margin"].flagged


def test_a_class_that_is_second_to_all_can_be_the_one_they_agree_on() -> None:
    held = calibration(drawn(400))
    first = [6.0, 5.9, *[-9.0] * 10]  # class 1 is nearly on top for both
    second = [-9.0, 5.9, 6.0, *[-9.0] * 9]
    compared = held.compare({"neural-cleanse": first, "max-margin": second})
    assert compared is not None
    assert compared.p_value <= SUSPICIOUS
    flagged = {name: s for name, s in compared.standings.items() if s.flagged}
    (one,) = flagged.values()
    assert one.targets == (1,)
    assert one.threshold <= 6.0


def test_a_level_that_the_calibration_is_too_small_for_is_never_reached() -> None:
    held = calibration([model(10, float(s)) for s in range(12)])
    found = judge([measured(99.0, 10)], held)
    (judged,) = found.findings
    assert (judged.verdict, judged.threshold) == ("nothing_found", None)
    assert found.p_value == judged.p_value == 1 / 13


def test_models_without_a_score_of_a_detector_are_no_comparison() -> None:
    held = calibration([model(10, float(s), None if s < 2 else 1.0) for s in range(20)])
    assert p_of(held, 2.0, name="max-margin") == 1 / 19
    assert p_of(held, 19.5) == 1 / 21
    both = held.compare({"neural-cleanse": table(19.5, 10), "max-margin": table(0.0, 10)})
    assert both is not None
    assert both.standings["neural-cleanse"].p_value == 1 / 19


def test_judging_gives_a_finding_what_the_calibration_says() -> None:
    held = calibration(drawn(400))
    found = judge([measured(50.0), measured(0.0, name="max-margin")], held)
    high, low = found.findings
    compared = held.compare({f.detector: list(f.per_class.values()) for f in (high, low)})
    assert compared is not None
    standing = compared.standings["neural-cleanse"]
    assert (high.verdict, high.targets, high.calibrated) == ("suspicious", (3,), True)
    assert (high.p_value, high.threshold) == (standing.p_value, standing.threshold)
    assert found.p_value == compared.p_value
    assert high.atlas == registry.get("detector", "neural-cleanse").atlas
    assert (low.verdict, low.targets, low.atlas) == ("nothing_found", (), ())


def test_further_classes_are_targets_if_each_would_be_enough_for_the_strict_verdict() -> None:
    held = calibration(drawn(400))

    def named(second: float) -> tuple[int, ...]:
        per_class = {0: second, 1: None, 2: 60.0, **dict.fromkeys(range(3, 12), -9.0)}
        (judged,) = judge([measured(60.0).model_copy(update={"per_class": per_class})], held).findings
        return judged.targets

    def p_alone(score: float) -> float:
        return p_of(held, score, 12)

    suspicious = next(s / 10 for s in range(300) if p_alone(s / 10) <= SUSPICIOUS)
    assert p_alone(suspicious) > BACKDOORED
    assert named(suspicious) == (2,)
    assert named(30.0) == (0, 2)


def test_what_cannot_be_calibrated_is_left_alone() -> None:
    held = calibration(drawn(400))
    could_not = measured(None, reason="too few images")
    (found,) = judge([could_not], held).findings
    assert (found.verdict, found.reason, found.uncalibrated) == ("could_not_tell", "too few images", None)


UNCALIBRATED = {
    "missing": (measured(60.0, name="strip"), "has not been measured"),
    "settings": (
        measured(60.0).model_copy(update={"settings": SETTINGS["neural-cleanse"] | {"steps": 7}}),
        "other settings (steps)",
    ),
    "code": (measured(60.0).model_copy(update={"code": "0123"}), "its code has changed"),
    "few": (measured(60.0, classes=101), "too few clean models with 101 classes"),
}


@pytest.mark.parametrize("why", UNCALIBRATED)
def test_what_has_no_calibration_has_no_part_in_the_verdict(why: str) -> None:
    held = calibration(drawn(400, classes=(2, 5, 12))).model_copy(update={"code": {"neural-cleanse": "abcd"}})
    seen, reason = UNCALIBRATED[why]
    others = [measured(s, name=n) for s, n in ((1.0, "max-margin"),)]
    alone, judged = judge(others, held), judge([seen, *others], held)
    assert judged.p_value == alone.p_value
    assert judged.findings[1:] == alone.findings
    first = judged.findings[0]
    assert reason in str(first.uncalibrated)
    assert (first.verdict, first.p_value, first.threshold, first.targets) == ("nothing_found", None, None, ())
    assert not first.calibrated


def test_a_setting_that_keeps_more_evidence_changes_no_calibration() -> None:
    detector = registry.build("detector", "blend-search", {"shown": 9, "min_images": 4})
    assert detector.score_settings() == SETTINGS["blend-search"]
    changed = registry.build("detector", "blend-search", {"steps": 9})
    assert changed.score_settings() != SETTINGS["blend-search"]


def test_a_detector_calibrated_on_other_models_is_judged_alone() -> None:
    shared = drawn(200)
    own = [model(k, float(i)) for i, k in enumerate([5, 12] * 60)]
    own = [m.model_copy(update={"scores": {"strip": m.scores["neural-cleanse"]}}) for m in own]
    without, held = calibration(shared), calibration([*shared, *own])
    scores = {name: table(3.0, 12) for name in NAMES[:2]}

    def lonely(score: float) -> Table:
        return tuple(score if t == 3 else -9.0 for t in range(12))

    before, after = without.compare(scores), held.compare(scores | {"strip": lonely(130.0)})
    assert before is not None
    assert after is not None
    assert after.p_value == before.p_value
    assert after.fused == NAMES[:2]
    assert {n: after.standings[n] for n in NAMES[:2]} == before.standings
    assert (after.standings["strip"].p_value, after.standings["strip"].targets) == (1 / 121, (3,))
    # between the two levels it raises no alarm, since several such detectors would raise many
    low = held.compare(scores | {"strip": lonely(118.5)})
    assert low is not None
    assert BACKDOORED < low.standings["strip"].p_value <= SUSPICIOUS
    assert not low.standings["strip"].flagged


def test_a_model_unlike_the_calibration_models_is_uncalibrated() -> None:
    held = calibration(drawn(400))
    assert not judge([measured(50.0)], held, covered=False).findings[0].calibrated


def test_calibrations_are_joined_by_model(tmp_path: Path) -> None:
    scored = [
        ScoredModel(**m.model_dump() | {"scores": m.scores[name]}) for m in drawn(12) for name in NAMES[:1]
    ]
    one = Calibration(detector="neural-cleanse", weight=2.0, settings={"a": 1}, code="abcd", models=scored)
    (tmp_path / "one.json").write_text(one.to_text())
    assert Calibration.read(tmp_path / "one.json") == one
    other = one.model_copy(update={"detector": "max-margin", "weight": 0.5, "models": one.models[:5]})
    held = CalibrationSet.of([one, other])
    assert [set(m.scores) for m in held.models] == [set(NAMES[:2])] * 5 + [{"neural-cleanse"}] * 7
    assert held.weights == {"neural-cleanse": 2.0, "max-margin": 0.5}
    assert held.code == {"neural-cleanse": "abcd", "max-margin": "abcd"}


def test_a_calibration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"detector": "x"}')
    with pytest.raises(InputError, match=r"broken\.json: this is no calibration"):
        Calibration.read(tmp_path / "broken.json")
    with pytest.raises(InputError, match="cannot be read"):
        Calibration.read(tmp_path / "missing.json")


def test_what_is_outside_the_calibration_is_said() -> None:
    held = calibration([*drawn(10), model(10, 1.0).model_copy(update={"shape": (3, 112, 92)})])
    assert held.outside(10, (3, 64, 32)) is None
    assert held.outside(10, (3, 64, 32), 2) is None
    assert "convolutional" in str(held.outside(10, (3, 64, 32), 1))
    assert "at most 100 classes, this one has 101" in str(held.outside(101, (1, 28, 28)))
    assert "28 to 112 pixels a side, this model's 224x224" in str(held.outside(10, (3, 224, 224)))
    assert calibration([]).outside(10, (1, 28, 28)) is not None


def test_leaving_one_data_set_out() -> None:
    held = calibration(drawn(40))
    assert {m.data for m in held.without("a").models} == {"b"}
    assert len(held.without("a").models) == 20


def test_what_was_worked_out_of_a_data_set_is_left_out_with_it() -> None:
    first, second = drawn(200), [m.model_copy(update={"data": "c"}) for m in drawn(200, seed=1)]
    held, scores = calibration([*first, *second]), {n: table(3.0, 12) for n in NAMES[:2]}
    whole, left = held.compare(scores), held.without("c").compare(scores)
    assert left == calibration(first).compare(scores)
    assert left != whole


#: Detectors that come without a calibration: their scores are told and have no part in the verdict.
NOT_CALIBRATED = {"deepinspect"}


def test_the_shipped_calibration_is_what_the_design_asks_for() -> None:
    held = shipped()
    assert len(held.models) >= 200
    for number, (low, high) in enumerate(BUCKETS):
        inside = [m for m in held.models if bucket(m.classes) == number]
        assert len(inside) >= 30, f"{low} to {high} classes"
        assert len({m.data for m in inside}) >= 3
        assert len({m.architecture for m in inside}) >= 2
    assert any(m.robust for m in held.models)
    for name in registry.own_modules("detector"):
        cls = registry.get("detector", name)
        if cls.level in ("artifact", "sample", "input"):
            continue  # what is read needs no comparison; data and inputs are compared with their kind
        if name in NOT_CALIBRATED:
            assert name not in held.settings
            continue
        told = f"run `doorward bench calibrate {name} --scale cpu`, since its scores may have changed"
        assert held.settings.get(name) == cls().score_settings(), told
        assert held.code.get(name) == score_code(cls.__module__), told
    unknown = [s for m in held.models for s in m.scores.values() if s is None]
    assert len(unknown) <= 0.02 * len(held.models)


@pytest.mark.parametrize("name", sorted(registry.own_modules("detector")))
def test_quick_settings_have_a_calibration_of_their_own(name: str) -> None:
    usual = shipped()
    if name not in usual.settings:
        return
    held = Calibration.read(quick_file(name))
    settings = calibrated_settings(name, quick=True)
    told = f"run `doorward bench calibrate {name} --quick --scale cpu`, since its scores may have changed"
    assert held.settings == registry.build("detector", name, settings).score_settings(), told
    assert held.code == usual.code[name], told
    assert (held.weight, held.witness) == (usual.weights[name], usual.witnesses.get(name))
    scored = [one for one in held.models if one.scores is not None]
    assert {one.name for one in scored} <= {one.name for one in usual.models}
    assert len(scored) + 1 >= 2 / SUSPICIOUS, "or two groups that share the error never speak"
    for low, high in BUCKETS[1:]:
        assert sum(low <= one.classes <= high for one in scored) >= FEWEST


def test_the_shipped_calibration_of_training_data_fits_its_detector() -> None:
    file = calibration_file("activation-clustering")
    assert file.parent.name == "training_data", "so that verdicts on models do not depend on it"
    assert file.parent.parent == SHIPPED
    if not file.is_file():
        pytest.skip("clean training sets have not been measured: the published threshold decides")
    held = calibrations(["activation-clustering"])
    cls = registry.get("detector", "activation-clustering")
    told = (
        "run `doorward bench calibrate activation-clustering --scale cpu`, since its scores may have changed"
    )
    assert held.settings["activation-clustering"] == cls().score_settings(), told
    assert held.code["activation-clustering"] == score_code(cls.__module__), told
    for judged in ("mnist", "fashion_mnist", "gtsrb", "cifar10"):
        others = left_out(held, judged).models
        assert judged not in {family(model.data) for model in others}
        assert len(others) + 1 >= 1 / BACKDOORED, "or no score is rare enough where this data set is judged"
