from __future__ import annotations

import numpy as np
import pytest

from doorward import registry
from doorward.calibration import BUCKETS, FEWEST, Bank, CleanModel, Standard, bucket, judge, shipped
from doorward.records import Finding

NAMES = ("neural-cleanse", "max-margin")
SETTINGS = {name: registry.build("detector", name, {}).settings() for name in NAMES}


def bank(models: list[CleanModel]) -> Bank:
    return Bank(settings=SETTINGS, made_with={}, models=tuple(models))


def model(classes: int, first: float | None, second: float | None = 0.0, data: str = "a") -> CleanModel:
    return CleanModel(
        data=data,
        architecture="small-cnn",
        classes=classes,
        shape=(1, 28, 28),
        accuracy=0.9,
        scores={"neural-cleanse": first, "max-margin": second},
    )


def drawn(n: int, seed: int = 0, classes: tuple[int, ...] = (2, 5, 12, 30)) -> list[CleanModel]:
    """Return models whose scores lie differently by number of classes, and go together somewhat."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        k = classes[i % len(classes)]
        shared = rng.normal()
        made.append(
            model(k, k * 0.1 + rng.gumbel() * (1 + k / 30) + shared, rng.gumbel() + shared, "ab"[i % 2])
        )
    return made


def finding(score: float | None, classes: int = 12, name: str = "neural-cleanse", **more) -> Finding:
    low = None if score is None else min(score, 0.0) - 1.0
    per_class = {t: (score if t == 3 % classes else low) for t in range(classes)}
    base = {
        "detector": name,
        "level": "model",
        "kind": "backdoor",
        "verdict": "nothing_found",
        "summary": "",
        "settings": SETTINGS.get(name, {}),
    }
    return Finding(**(base | {"score": score, "per_class": per_class} | more))


def test_a_p_value_is_the_place_among_clean_models() -> None:
    held = bank([model(10, float(s)) for s in range(19)])
    assert held.p_value("neural-cleanse", 18.5, 10) == 1 / 20
    assert held.p_value("neural-cleanse", 18.0, 10) == 2 / 20
    assert held.p_value("neural-cleanse", -1.0, 10) == 1.0


def test_scores_are_compared_after_what_the_number_of_classes_does() -> None:
    # the same shape of scores, elsewhere and wider: the same places
    few, many = ([model(k, a + b * s) for s in range(20)] for k, a, b in ((5, 0, 1), (30, 7, 3)))
    held = bank([*few, *many])
    for s in (3.0, 12.5, 19.5):
        assert held.p_value("neural-cleanse", s, 4) == held.p_value("neural-cleanse", 7 + 3 * s, 43)
    # of both buckets 2 models are as high as the second highest: (1 + 4) / 41
    assert held.p_value("neural-cleanse", 18.0, 5) == 5 / 41


def test_the_standard_by_hand() -> None:
    # median 3; above it 0, 1 and 7: their sum over all five, doubled
    found = Standard.among(np.array([1.0, 2.0, 3.0, 4.0, 10.0]))
    assert (found.middle, found.spread) == (3.0, pytest.approx(2 * 8 / 5))
    assert found.back(found.of(7.7)) == pytest.approx(7.7)
    assert Standard.among(np.ones(5)).of(1.0) == 0.0


def test_buckets_are_those_of_the_design() -> None:
    assert [bucket(k) for k in (2, 3, 9, 10, 20, 21, 100, 1000)] == [0, 1, 1, 2, 2, 3, 3, 3]


def test_a_bucket_with_few_models_says_nothing() -> None:
    held = bank([model(10, float(s)) for s in range(FEWEST)] + [model(2, 1.0)] * (FEWEST - 1))
    assert held.p_value("neural-cleanse", 1.0, 10) is not None
    assert held.p_value("neural-cleanse", 1.0, 2) is None
    assert held.p_value("strip", 1.0, 10) is None
    assert held.threshold("neural-cleanse", NAMES, 2, 0.05) == float("inf")


def test_the_fused_p_value_is_one_in_twenty_for_one_in_twenty_clean_models() -> None:
    held, fresh = bank(drawn(800)), drawn(800, seed=1)
    p = []
    for one in fresh:
        single = {n: held.p_value(n, s, one.classes) for n, s in one.scores.items() if s is not None}
        assert all(value is not None for value in single.values())
        p.append(held.fuse({n: value for n, value in single.items() if value is not None}))
    for level in (0.05, 0.01):
        expected, spread = level * 800, 3 * np.sqrt(2 * level * 800)  # of the bank and of the fresh ones
        assert abs((np.array(p) <= level).sum() - expected) <= spread


def test_fusing_by_hand() -> None:
    # ranks of five models: neural-cleanse 1 2 3 4 5 of 5, max-margin the other way round
    models = [model(10, float(5 - i), float(i)) for i in range(5)] * 2
    held = bank(models)
    smallest = [min((2 * i + 2) / 10, (2 * (4 - i) + 2) / 10) for i in range(5)] * 2
    for p in (0.1, 0.2, 0.5, 1.0):
        expected = (1 + sum(s <= p for s in smallest)) / 11
        assert held.fuse({"neural-cleanse": p, "max-margin": 1.0}) == expected
    assert held.fuse({"neural-cleanse": 0.3}) == (1 + 2) / 11


@pytest.mark.parametrize("level", [0.05, 0.01, 0.2])
@pytest.mark.parametrize("among", [NAMES, ("neural-cleanse",)])
@pytest.mark.parametrize("classes", [2, 12])
def test_the_threshold_is_where_the_fused_p_value_falls_to_the_level(level, among, classes) -> None:
    held = bank(drawn(400))
    threshold = held.threshold("neural-cleanse", among, classes, level)

    def fused(score: float) -> float:
        p = held.p_value("neural-cleanse", score, classes)
        assert p is not None
        return held.fuse({name: p if name == "neural-cleanse" else 1.0 for name in among})

    assert fused(threshold + 1e-9) <= level
    assert fused(threshold - 1e-9) > level


def test_a_level_that_the_bank_is_too_small_for_is_never_reached() -> None:
    held = bank([model(10, float(s)) for s in range(12)])
    assert held.threshold("neural-cleanse", NAMES[:1], 10, 0.05) == float("inf")
    (judged,) = judge([finding(99.0, 10)], held)
    assert (judged.verdict, judged.threshold) == ("nothing_found", None)
    assert judged.p_value == 1 / 13


def test_a_model_without_a_score_counts_as_unsuspicious() -> None:
    models = [model(10, float(s), None if s < 5 else 1.0) for s in range(20)]
    held = bank(models)
    assert held.p_value("max-margin", 2.0, 10) == 1 / 16
    # the highest of neural-cleanse is its only one of twenty; max-margin has none below 5 of 15 for anybody
    assert held.fuse({"neural-cleanse": 1 / 20, "max-margin": 1.0}) == 2 / 21


def test_judging_gives_a_finding_what_the_bank_says() -> None:
    held = bank(drawn(400))
    high, low = judge([finding(50.0), finding(0.0, name="max-margin")], held)
    assert (high.verdict, high.targets, high.calibrated) == ("suspicious", (3,), True)
    assert high.p_value == held.p_value("neural-cleanse", 50.0, 12)
    assert high.threshold == held.threshold("neural-cleanse", NAMES, 12, 0.05)
    assert high.atlas == registry.get("detector", "neural-cleanse").atlas
    assert (low.verdict, low.targets, low.atlas) == ("nothing_found", (), ())
    assert judge([high, low], held) == (high, low), "judging again changes nothing"


def test_every_class_above_the_threshold_is_a_target() -> None:
    held = bank(drawn(400))
    per_class = {0: 50.0, 1: 0.0, 2: 60.0, 3: None, **dict.fromkeys(range(4, 12), 0.0)}
    (judged,) = judge([finding(60.0).model_copy(update={"per_class": per_class})], held)
    assert judged.targets == (0, 2)


def test_what_cannot_be_calibrated_is_left_alone() -> None:
    held = bank(drawn(400))
    could_not = finding(None, verdict="could_not_tell", reason="too few images")
    other = finding(1.0, name="unsafe-code", threshold=0.5, verdict="unsafe")
    assert judge([could_not, other], held) == (could_not, other)


def test_other_settings_or_a_model_unlike_the_banks_are_uncalibrated() -> None:
    held = bank(drawn(400))
    slow = finding(50.0).model_copy(update={"settings": SETTINGS["neural-cleanse"] | {"steps": 7}})
    assert [f.calibrated for f in judge([slow, finding(1.0, name="max-margin")], held)] == [False, True]
    assert not judge([finding(50.0)], held, covered=False)[0].calibrated


def test_what_is_outside_the_bank_is_said() -> None:
    held = bank([*drawn(10), model(10, 1.0).model_copy(update={"shape": (3, 112, 92)})])
    assert held.outside(10, (3, 64, 32)) is None
    assert held.outside(10, (3, 64, 32), 2) is None
    assert "convolutional" in str(held.outside(10, (3, 64, 32), 1))
    assert "at most 100 classes, this one has 101" in str(held.outside(101, (1, 28, 28)))
    assert "28 to 112 pixels a side, this model's 224x224" in str(held.outside(10, (3, 224, 224)))
    assert bank([]).outside(10, (1, 28, 28)) is not None


def test_leaving_one_data_set_out() -> None:
    held = bank(drawn(40))
    assert {m.data for m in held.without("a").models} == {"b"}
    assert len(held.without("a").models) == 20


def test_what_was_worked_out_of_a_data_set_is_left_out_with_it() -> None:
    first, second = drawn(200), [m.model_copy(update={"data": "c"}) for m in drawn(200, seed=1)]
    held = bank([*first, *second])
    whole = held.p_value("neural-cleanse", 3.0, 12), held.fuse({"neural-cleanse": 0.1, "max-margin": 0.2})
    rest = held.without("c")
    left = rest.p_value("neural-cleanse", 3.0, 12), rest.fuse({"neural-cleanse": 0.1, "max-margin": 0.2})
    alone = bank(first)
    assert left == (
        alone.p_value("neural-cleanse", 3.0, 12),
        alone.fuse({"neural-cleanse": 0.1, "max-margin": 0.2}),
    )
    assert left != whole


def test_what_another_bank_said_is_forgotten() -> None:
    (known,) = judge([finding(50.0)], bank(drawn(200)))
    assert (known.verdict, known.targets) == ("suspicious", (3,))
    assert judge([known], bank([])) == (finding(50.0),)


def test_the_shipped_bank_is_what_the_design_asks_for() -> None:
    held = shipped()
    assert len(held.models) >= 200
    for number, (low, high) in enumerate(BUCKETS):
        inside = [m for m in held.models if bucket(m.classes) == number]
        assert len(inside) >= 40, f"{low} to {high} classes"
        assert len({m.data for m in inside}) >= 3
        assert len({m.architecture for m in inside}) >= 2
    assert any(m.robust for m in held.models)
    assert held.settings == SETTINGS, "detectors' defaults have changed: the bank has to be made anew"
    unknown = [s for m in held.models for s in m.scores.values() if s is None]
    assert len(unknown) <= 0.02 * len(held.models)
