"""Suites are data: they expand to the same trials everywhere, and what they name exists."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest

from bench_examples import clean, planted, suite, trials
from doorward.bench import synthetic
from doorward.bench.holdout import family, left_out
from doorward.bench.plan import detectors_of, unmerged
from doorward.bench.suite import (
    Between,
    Data,
    MethodChoice,
    OneOf,
    Scale,
    ScanSettings,
    Suite,
    Trial,
    World,
    content_key,
    expand,
    get_suite,
    matching,
    suite_names,
)
from doorward.bench.suites.null import FIRST, NEWEST
from doorward.bench.suites.scan_population import UNSEEN
from doorward.core.errors import InputError
from doorward.methods import registry
from doorward.models.networks import NAMES
from doorward.scan.calibration import shipped
from doorward.training import AdversarialSettings, TrainingSettings

SUITES = [get_suite(name) for name in suite_names()]
EXPANDED = [(one, scale) for one in SUITES for scale in one.scales]
IDS = [f"{one.name}-{scale}" for one, scale in EXPANDED]


def test_listing_suites_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom doorward.bench.suite import expand, get_suite, suite_names\n"
        "[expand(get_suite(name), scale) for name in suite_names() for scale in get_suite(name).scales]\n"
        "print(*{'torch', 'numpy', 'sqlalchemy', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(("one", "scale"), EXPANDED, ids=IDS)
def test_what_a_suite_names_exists(one: Suite, scale: Scale) -> None:
    found = expand(one, scale)
    assert len({t.name for t in found}) == len(found)
    assert {t.suite for t in found} == {one.name}
    for trial in found:
        assert trial.architecture in NAMES
        TrainingSettings.model_validate(trial.training)
        if trial.robust is not None:
            AdversarialSettings.model_validate(trial.robust)
        if trial.attack is not None:
            registry.build("attack", trial.attack.name, trial.attack.settings)
        for detector in trial.scan_settings.detectors or ():
            registry.build("detector", detector.name, detector.settings)
        if trial.data.world is not None:
            name = unmerged(trial.data.name).name
            family = synthetic.FAMILIES[name.split("-")[0]]
            assert name in synthetic.names()
            assert trial.data.world.classes <= family.limit
    names = {group.name for groups in one.scales.values() for group in groups}
    assert {group for claim in one.claims for group in claim.groups} <= names
    by_name = {group.name: group for group in one.groups(scale)}
    for group in by_name.values():
        whole = by_name[group.first_of or group.name]
        own = {"name", "models", "seeds", "draws", "excluded_from_claims", "first_of"}
        assert group.model_dump(exclude=own) == whole.model_dump(exclude=own)
        assert group.models <= whole.models


@pytest.mark.parametrize(("one", "scale"), EXPANDED, ids=IDS)
def test_a_suite_expands_to_the_same_trials_in_every_process(one: Suite, scale: str) -> None:
    assert expand(one, scale) == expand(one, scale)
    if scale == "smoke":
        code = (
            "from doorward.bench.suite import *\n"
            f"print(content_key([t.key for t in expand(get_suite({one.name!r}), 'smoke')]))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == content_key([t.key for t in expand(one, "smoke")])


def test_what_is_calibrated_on_is_judged_by_no_model_of_its_own_data() -> None:
    judged = {
        g.data.name
        for s in SUITES
        if s.scans
        and s.name
        not in ("calibration", "tuning", "training-calibration", "training-data", "imbalanced-data")
        for groups in s.scales.values()
        for g in groups
    }
    groups = [g for scale in get_suite("calibration").scales.values() for g in scale]
    for data in judged:
        left = {family(model.data) for model in left_out(shipped(), data).models}
        assert len(left) >= 8
        assert family(data) not in left
        # of what is judged the calibration knows some classes alone
        assert all(max(g.class_counts) < g.out_of for g in groups if family(g.data.name) == family(data))
    assert all(g.attack is None for name in ("calibration", "null") for g in get_suite(name).scales["cpu"])


def test_the_scan_population_is_what_it_says() -> None:
    found = expand(get_suite("scan-population"), "cpu")
    pooled = [t for t in found if t.group.endswith("-badnets")]
    counts = Counter(t.group for t in found)
    for data, least in (("fashion_mnist", 20), ("mnist", 20), ("gtsrb", 10)):
        assert counts[f"{data}-clean"] >= least
        assert counts[f"{data}-badnets"] >= least
    assert all((t.data.rows or 0) <= 20_000 for t in found)
    settings = [t.attack.settings for t in pooled if t.attack]
    assert {s["size"] for s in settings} == {2, 3, 4, 5}
    rates = sorted(s["poison_rate"] for s in settings)
    assert rates[0] >= 0.01
    assert rates[-1] <= 0.05
    assert rates[0] < 0.015 < 0.045 < rates[-1]
    assert {t.architecture for t in pooled} == {"small-cnn", "resnet-8", "vgg", "resnet-14"}
    for group in ("fashion_mnist", "mnist"):
        assert {
            s["target"] for t, s in zip(pooled, settings, strict=True) if t.group.startswith(group)
        } == set(range(10))


def test_planted_models_have_clean_twins() -> None:
    found = trials(
        clean(3, architectures=("small-cnn", "vgg")), planted(3, architectures=("small-cnn", "vgg"))
    )
    surrogates = [(t.seed, t.architecture, t.data, t.training) for t in found]
    assert surrogates[:3] == surrogates[3:]


def test_values_are_dealt_out_alike() -> None:
    dealt = OneOf(values=(1, 2, 3)).deal(8, random.Random(0))
    assert sorted(Counter(dealt).values()) == [2, 3, 3]
    assert sorted(dealt[:3]) == sorted(dealt[3:6]) == [1, 2, 3]


def test_a_range_is_covered_evenly() -> None:
    drawn = sorted(Between(low=2, high=4).deal(4, random.Random(0)))
    assert [int((value - 2) / 0.5) for value in drawn] == [0, 1, 2, 3]


def test_settings_vary_by_group_and_not_by_what_else_varies() -> None:
    first = MethodChoice(name="badnets", settings={"target": OneOf(values=tuple(range(10)))})
    second = MethodChoice(name="badnets", settings={**first.settings, "size": OneOf(values=(2, 3))})
    targets = [
        [t.attack.settings["target"] for t in trials(planted(10, attack=attack)) if t.attack]
        for attack in (first, second)
    ]
    assert targets[0] == targets[1]
    assert sorted(targets[0]) == list(range(10))
    other = [t.attack.settings["target"] for t in trials(planted(10, attack=first, name="b")) if t.attack]
    assert other != targets[0]


def test_the_first_models_of_a_group_are_its_own() -> None:
    varied = {"target": OneOf(values=(1, 2, 3)), "poison_rate": Between(low=0.1, high=0.2)}
    whole = planted(6, attack=MethodChoice(name="badnets", settings=varied), class_counts=(4, 5), out_of=10)
    part = whole.model_copy(update={"name": "part", "first_of": "planted", "models": 2, "seeds": 2})
    found = trials(whole, part)
    named = {"name", "group", "scan_settings"}
    assert [t.model_dump(exclude=named) for t in found[6::2]] == [
        t.model_dump(exclude=named) for t in found[:2]
    ]
    assert [(t.name, t.scan_settings.seed) for t in found[6:8]] == [
        ("part-00-seed0-draw0", 0),
        ("part-00-seed1-draw0", 1),
    ]
    alone = trials(whole.model_copy(update={"models": 2, "name": "part"}))
    assert [t.attack for t in alone] != [t.attack for t in found[:2]], "it is no matter of chance"


def test_models_that_are_repeated_are_those_of_the_claims() -> None:
    for name in ("null", "scan-population"):
        found = expand(get_suite(name), "cpu")
        repeated = [t for t in found if t.group.endswith("-repeated")]
        others = {content_key(_model(t)) for t in found if t not in repeated}
        assert repeated
        assert {content_key(_model(t)) for t in repeated} <= others


def _model(trial: Trial) -> dict[str, object]:
    return trial.model_dump(mode="json", exclude={"name", "group", "scan_settings"})


def test_classes_and_worlds_are_drawn() -> None:
    found = trials(clean(4, class_counts=(2, 3), out_of=10))
    assert sorted(len(t.data.classes or ()) for t in found) == [2, 2, 3, 3]
    for trial in found:
        classes = trial.data.classes or ()
        assert list(classes) == sorted(set(classes))
        assert set(classes) <= set(range(10))
    assert len({t.data.classes for t in found}) > 2
    made = trials(clean(3, data=Data(name="glyphs", rows=100, world=World()), class_counts=(5,)))
    assert [t.data.world for t in made] == [World(classes=5, seed=i) for i in range(3)]


def test_models_from_another_first_seed_on_are_others() -> None:
    varied = {"target": OneOf(values=tuple(range(10))), "poison_rate": Between(low=0.1, high=0.2)}
    groups = [
        planted(
            6, attack=MethodChoice(name="badnets", settings=varied), class_counts=(4, 5), out_of=10, **more
        )
        for more in ({}, {"first_seed": 0}, {"first_seed": 100})
    ]
    usual, same, unseen = (trials(group) for group in groups)
    assert usual == same
    assert [t.seed for t in unseen] == list(range(100, 106))
    assert [t.attack for t in unseen] != [t.attack for t in usual], "other settings are dealt"
    assert [t.data for t in unseen] != [t.data for t in usual], "and other classes"
    worlds = trials(clean(3, data=Data(name="glyphs", rows=100, world=World()), first_seed=100))
    assert [t.data.world.seed for t in worlds if t.data.world] == [100, 101, 102]


def test_judged_models_have_seeds_of_their_own() -> None:
    """docs/results.md says which rules came after a look at which seeds."""
    assert (FIRST, UNSEEN, NEWEST) == (100, 200, 300)
    for name, first in (("null", FIRST), ("scan-population", UNSEEN)):
        assert min(t.seed for t in expand(get_suite(name), "cpu")) == first
    newest = [t.seed for t in expand(get_suite("null"), "cpu") if t.group.endswith("-newest")]
    assert min(newest) == NEWEST


def test_seeds_and_draws_vary_one_at_a_time() -> None:
    found = trials(clean(2, seeds=3, draws=2))
    assert [(t.scan_settings.seed, t.scan_settings.draw) for t in found[:4]] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
    ]
    assert [t.seed for t in found] == [0] * 4 + [1] * 4, "the model stays the same"
    assert found[1].name == "clean-00-seed1-draw0"


def test_the_key_is_of_the_content() -> None:
    one, two = trials(clean(2))
    assert one.key != two.key
    assert one.key == trials(clean(2))[0].key
    assert one.key != trials(clean(2, training={"epochs": 2}))[0].key
    assert content_key({"a": 1, "b": [1.5, None]}) == content_key({"b": [1.5, None], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    with pytest.raises(ValueError, match="Out of range"):
        content_key(float("nan"))


def test_trials_are_picked_by_name_or_group() -> None:
    found = trials(clean(3), planted(2))
    assert [t.name for t in matching(found, "planted")] == ["planted-00", "planted-01"]
    assert [t.name for t in matching(found, "clean-0[12]")] == ["clean-01", "clean-02"]
    assert matching(found, None) == found
    with pytest.raises(InputError, match="no trial matches 'x'; groups are: clean, planted"):
        matching(found, "x")


def test_trials_that_name_no_detector_are_judged_by_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else is installed has no say in results."""
    plain = registry.modules
    monkeypatch.setattr(registry, "modules", lambda kind: {**plain(kind), "stranger": "somewhere.stranger"})
    own = {d.method() for d in detectors_of(ScanSettings(detectors=()))}
    assert {"max-margin", "patch-search", "blend-search", "neural-cleanse"} <= own
    assert "stranger" not in own


def test_unknown_suites_and_scales_are_named() -> None:
    with pytest.raises(
        InputError, match=r"there is no suite named .nonsense.; there are: .*calibration.*null"
    ):
        get_suite("nonsense")
    with pytest.raises(InputError, match="suite tiny has no scale 'full'; it has: smoke"):
        expand(suite(clean()), "full")


def test_deepinspect_is_judged_without_images_and_on_models_of_its_own() -> None:
    one = get_suite("deepinspect")
    assert one.scan_settings.images == 0
    found = expand(one, "cpu")
    counts = Counter((t.data.name, t.attack is not None) for t in found)
    assert counts == {(name, side): 10 for name in ("mnist", "fashion_mnist", "gtsrb") for side in (0, 1)}
    others = {t.seed for other in SUITES if other.name != one.name for t in expand(other, "cpu")}
    assert not others & {t.seed for t in found}


def test_the_adversarially_trained_models_are_what_they_say() -> None:
    aegis, *others = (get_suite(name) for name in ("aegis", "attacks", "scan-attacks"))
    found, elsewhere = expand(aegis, "cpu"), [t for other in others for t in expand(other, "cpu")]
    counts = Counter((t.data.name, t.architecture, t.attack and t.attack.name) for t in found)
    networks = ("small-cnn", "resnet-8", "resnet-14")
    kinds = (None, "badnets", "distributed")
    assert set(counts) == set(product(("mnist", "fashion_mnist"), networks, kinds))
    assert all(count == (10 if key[1] == "small-cnn" else 4) for key, count in counts.items())
    assert {(t.robust or {}).get("eps") for t in found} == {0.5, 2.0}
    assert {t.attack.settings["target"] for t in found if t.attack} == {7}
    assert not {t.seed for t in found} & {t.seed for t in elsewhere}
    assert aegis.least_success == 0.8
