"""What planting does: measured on the whole test split next to clean twins, and counted by hand here."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench_examples import DATA, clean, planted, result, suite
from doorward import bundled
from doorward.attacks.ground_truth import attack_success, read_plant
from doorward.bench import page, results, tables
from doorward.bench.cache import ModelCache
from doorward.bench.estimate import estimate
from doorward.bench.plan import Planned, Sources, plan
from doorward.bench.planting import Planting, kept, pooled
from doorward.bench.results import Result, Results
from doorward.bench.runner import RunSettings, run
from doorward.bench.store import Store
from doorward.bench.suite import Claim, Data, Group, MethodChoice, ScanSettings, Suite, Trial, expand
from doorward.bench.summary import Summary, measure, summarise
from doorward.bench.worker import TrialRunner
from doorward.models import open_classifier
from doorward.stats.metrics import rate
from doorward.training import evaluate

SOURCES = Sources(None)
pytestmark = pytest.mark.usefixtures("preloaded_workers")
TROJAN = MethodChoice(name="trojannet", settings={"target": 3})


def unscanned(*groups: Group, claims: tuple[Claim, ...] = ()) -> Suite:
    return suite(*groups, claims=claims).model_copy(update={"scan_settings": ScanSettings(detectors=None)})


def trials(*groups: Group) -> tuple[Trial, ...]:
    return expand(unscanned(*groups), "smoke")


def planned(*groups: Group) -> list[Planned]:
    return [plan(trial, SOURCES) for trial in trials(*groups)]


TROJANS = planted(1, name="trojans", attack=TROJAN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planting")


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    with closing(Store(f"sqlite:///{folder / 'results.sqlite'}")) as opened:
        run(planned(planted(1), TROJANS), opened, RunSettings(cache=folder / "cache"))
        yield opened


@pytest.fixture(scope="module")
def found(store: Store) -> dict[str, Planting]:
    held = results.collect(unscanned(planted(1), TROJANS), "smoke", store)
    assert [one.status for one in held.results] == ["done", "done"], held.results
    return {one.group: one.planting for one in held.results if one.planting is not None}


# --- one trial -------------------------------------------------------------------------------------


def test_a_suite_that_scans_nothing_makes_the_models_that_others_do() -> None:
    (ours,) = planned(planted(1))
    (theirs,) = (plan(trial, SOURCES) for trial in expand(suite(planted(1)), "smoke"))
    (twin,) = (plan(trial, SOURCES) for trial in expand(suite(clean(1)), "smoke"))
    assert ours.model_key == theirs.model_key
    assert ours.work != theirs.work
    assert ours.twin is not None
    assert ours.twin.model_key == twin.model_key
    assert theirs.twin is None, "a scan needs none"
    (implanted,) = (plan(trial, SOURCES) for trial in expand(suite(TROJANS), "smoke"))
    assert implanted.twin is not None, "what changes a model needs it"
    assert implanted.twin.model_key == twin.model_key


def test_planted_models_are_measured_on_all_test_images_beside_their_twins(
    folder: Path, found: dict[str, Planting]
) -> None:
    bench = TrialRunner(ModelCache(folder / "cache"), SOURCES)
    (one,) = planned(planted(1))
    assert bench.make(one), "both are in the cache"
    assert one.twin is not None
    test, place = bundled.fashion_mnist("test"), bench.cache.place(one.model_key)
    classifier, plant = open_classifier(str(place)), read_plant(place / "plant.json")
    ours = found["planted"]
    assert ours.accuracy == evaluate(classifier, test)
    assert ours.twin == evaluate(open_classifier(str(bench.cache.place(one.twin.model_key))), test)
    assert ours.success == attack_success(classifier, test, plant)
    assert (ours.accuracy.n, ours.success.n) == (1000, 900)
    assert ours.accuracy != ours.twin
    assert ours.poison_rate == 0.1
    assert ours.planted is not None
    assert 0 < ours.planted < 10
    assert ours.trained > 0


def test_a_model_attack_is_planted_in_the_twin_from_the_cache(
    folder: Path, found: dict[str, Planting]
) -> None:
    ours = found["trojans"]
    assert ours.accuracy == ours.twin == found["planted"].twin
    assert ours.success is not None
    assert (ours.success.successes, ours.success.n) == (900, 900)
    assert ours.poison_rate is None
    assert len(list((folder / "cache").glob("models/*/*/meta.json"))) == 3, "the twin is trained once"


def test_random_features_are_measured_beside_honest_ones(tmp_path: Path) -> None:
    data = DATA.model_copy(update={"classes": (0, 1)})
    attack = MethodChoice(name="random-features", settings={"features": 200})
    (one,) = planned(planted(1, data=data, attack=attack))
    bench = TrialRunner(ModelCache(tmp_path), SOURCES)
    outcome = bench.judge(one, cached=bench.make(one))
    assert one.twin is not None
    assert outcome.planting is not None
    network = evaluate(
        open_classifier(str(bench.cache.place(one.twin.model_key))), SOURCES.part(data, "test")
    )
    assert outcome.planting.twin.n == 200
    assert outcome.planting.twin != network, "the twin is one of random features too"
    assert outcome.planting.twin.value > 0.7


def test_poisoning_without_a_trigger_has_no_success(tmp_path: Path) -> None:
    flips = MethodChoice(name="label-flipping", settings={"poison_rate": 0.5})
    (one,) = planned(planted(1, attack=flips, data=DATA.model_copy(update={"rows": 100})))
    bench = TrialRunner(ModelCache(tmp_path), SOURCES)
    outcome = bench.judge(one, cached=bench.make(one))
    assert outcome.planting is not None
    assert outcome.planting.success is None
    assert (outcome.seen, outcome.truth.attack_success) == (None, None)


def test_a_setting_can_name_a_data_set(tmp_path: Path) -> None:
    shutil.copytree(bundled.FOLDER / "fashion_mnist", tmp_path / "clothes")
    attack = MethodChoice(name="reflection", settings={"reflections": "data:clothes"})
    (trial,) = trials(planted(1, attack=attack))
    sources = Sources(tmp_path)
    made = plan(trial, sources).resolved["model"]["attack"]
    assert made["settings"]["reflections"] == "data:clothes", "the key is the same wherever the data lie"
    assert made["data"] == {"reflections": sources.contents(Data(name="clothes")).test}
    assert sources.given(attack) == {"reflections": str(tmp_path / "clothes")}
    assert "no folder of data sets is given" in str(plan(trial, SOURCES).missing)
    assert f"data set clothes is not in {tmp_path / 'clothes'}" in str(
        plan(trial, Sources(tmp_path / "clothes")).missing
    )


def test_twins_count_in_an_estimate_and_scans_do_not(tmp_path: Path) -> None:
    guess = estimate(planned(planted(1), TROJANS), ModelCache(tmp_path), workers=1, threads=1, device="cpu")
    assert guess.models == 3
    assert guess.scanning == 0


def test_no_calibration_has_a_say(store: Store) -> None:
    held = results.collect(unscanned(planted(1)), "smoke", store)
    assert "calibration" not in held.made_with
    assert held.made_with["torch"]
    assert held.left_out == ()
    assert held.results[0].verdict is None


# --- tables ----------------------------------------------------------------------------------------


def one(accuracy: int, twin: int, success: int | None = None, **more: object) -> Planting:
    """Return a planting measured on 1000 images."""
    values = {
        "accuracy": rate(accuracy, 1000),
        "twin": rate(twin, 1000),
        "success": None if success is None else rate(success, 900),
        "poison_rate": 0.1,
        "planted": 0.5,
        "trained": 10.0,
    }
    return Planting.model_validate(values | more)


def row(trial: str, group: str, planting: Planting) -> Result:
    measured = {"verdict": None, "detectors": {}, "plant": (3,), "planting": planting}
    return result(trial, group, accuracy=planting.accuracy.value, **measured)


CLAIMS = (
    Claim(text="all stay", source="our bar", measure="accuracy_kept", at_least=1.0),
    Claim(text="95 %", source="our bar", measure="attack_success", groups=("planted",), at_least=0.95),
    Claim(text="99 %", source="A paper, 2024", measure="attack_success", groups=("planted",)),
)
FLIPS = planted(1, name="flips", attack=MethodChoice(name="label-flipping"), excluded_from_claims=True)
SUITE = unscanned(planted(2, about="4x4"), TROJANS, FLIPS, claims=CLAIMS)
HELD = Results(
    suite="tiny",
    scale="smoke",
    made_with={"torch": ("2.13",)},
    results=(
        row("planted-00", "planted", one(980, 990, 882)),
        row("planted-01", "planted", one(970, 980, 846, planted=1.5, poison_rate=0.2)),
        row("trojans-00", "trojans", one(979, 990, 900, poison_rate=None)),
        row("flips-00", "flips", one(800, 990, planted=None, robust_accuracy=rate(1, 4))),
    ),
)
SUMMARY: Summary = summarise(SUITE, HELD)


def test_a_line_holds_means_and_counts_images_together() -> None:
    patch, trojan, flips = SUMMARY.plants
    assert (patch.models, patch.attack, patch.about, patch.data) == (2, "badnets", "4x4", "fashion_mnist")
    assert (patch.accuracy, patch.twin, patch.change) == pytest.approx((0.975, 0.985, -0.01))
    assert patch.success == rate(1728, 1800)
    assert patch.lowest == 0.94
    assert (patch.poison_rate, patch.planted, patch.trained) == pytest.approx((0.15, 1.0, 10.0))
    assert trojan.poison_rate is None
    assert (flips.success, flips.lowest, flips.planted) == (None, None, None)
    assert flips.robust_accuracy == rate(1, 4)
    assert SUMMARY.groups == ()


def test_a_point_is_kept_on_average() -> None:
    assert kept([one(980, 990), one(970, 980)])
    assert not kept([one(979, 990)])
    assert kept([one(960, 980), one(990, 980)])
    assert pooled([None, None]) is None
    assert pooled([rate(1, 2), None, rate(3, 8)]) == rate(4, 10)
    counted = measure("accuracy_kept", HELD.results)
    assert (counted.successes, counted.n) == (1, 3)
    assert measure("attack_success", HELD.results) == rate(1728 + 900, 2700)


def test_claims_of_one_group_stand_in_its_line_and_others_above() -> None:
    patch, trojan, _ = SUMMARY.plants
    assert [(claim.text, claim.reached) for claim in patch.claims] == [("95 %", True), ("99 %", None)]
    assert trojan.claims == ()
    (kept_by_all,) = SUMMARY.claims
    # what is apart is left out: one of two groups loses more than a point
    assert (kept_by_all.ours.successes, kept_by_all.ours.n, kept_by_all.reached) == (1, 2, False)


def test_the_table_in_markdown() -> None:
    lines = tables.to_markdown(SUMMARY).splitlines()
    assert "| all stay | our bar | 1 of 2 (1.3 % to 98.7 %) | **not reached** |" in lines
    (patch,) = (line for line in lines if line.startswith("| badnets"))
    assert patch.startswith("| badnets (4x4) | fashion_mnist | small-cnn | 2 | 15.0 % | 97.5 % | 98.5 % |")
    assert "| -1.00 | 96.0 % (95.0 % to 96.9 %) | 94.0 % | 1.0 s |" in patch
    assert patch.endswith("| 95 % (our bar): reached; 99 % (A paper, 2024) |")
    (flips,) = (line for line in lines if line.startswith("| label-flipping"))
    assert "| 80.0 % (under attack 25.0 %) | 99.0 % | -19.00 |  |  |  |  |" in flips
    assert not any("one scan" in line or "P-values" in line for line in lines)


def test_the_table_as_csv_and_page() -> None:
    first, *_ = csv.DictReader(io.StringIO(tables.to_csv(SUMMARY)))
    assert (first["group"], first["success_successes"], first["success_n"]) == ("planted", "1728", "1800")
    assert float(first["change"]) == pytest.approx(-0.01)
    text = page.render(SUMMARY)
    assert "label-flipping" in text
    assert "(under attack" not in text, "what stands in brackets is set apart"
    assert "under attack 25.0\N{NO-BREAK SPACE}%" in text
    assert "planted-01" in text


def test_results_go_to_a_file_and_come_back(tmp_path: Path) -> None:
    back = results.read_results(results.write_results(HELD, tmp_path))
    assert summarise(SUITE, back).plants[0].success == rate(1728, 1800)
    assert [r.trial for r in back.results] == [r.trial for r in HELD.results]
