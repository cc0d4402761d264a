"""The measurements of kinds of attack and of robust models: how they count, and what they call a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import attack_kinds
import measured_pages
import measuring
import robust_representations as robust

Results = dict[str, Any]


def attack(name: str, seed: int, **more: Any) -> Results:
    return {"attack": name, "seed": seed, "kind": "", "phase": "", "accuracy by class": [0.8, 1.0]} | more


def kinds() -> Results:
    """Return results as `attack_kinds` writes them, of two seeds."""
    sizes = {"L2": 0.06, "Linf": 1 / 255, "least L2": 0.05, "most L2": 0.07, "least Linf": 1 / 255}
    rows = []
    for seed in (0, 1):
        rows.append(attack("none", seed, **{"clean accuracy": 0.9}))
        rows += [
            attack(
                name,
                seed,
                **{"clean accuracy": 0.9, "success": 1.0, "milliseconds per input": 0.1 + 0.2 * seed},
                **sizes,
                **{"most Linf": 1 / 255},
            )
            for name in attack_kinds.IMPLANTS
        ]
    return {"rows": rows}


def test_rows_of_several_seeds_become_one() -> None:
    results = kinds()
    results["rows"][2]["most Linf"], results["rows"][2]["least L2"] = 0.5, 0.01
    results["rows"][0]["accuracy by class"] = [0.6, 1.0]
    none, _, signed = attack_kinds.averaged(results)
    assert none["accuracy by class"] == pytest.approx([0.7, 1.0])
    assert (signed["most Linf"], signed["least L2"]) == (0.5, 0.01)
    assert signed["milliseconds per input"] == pytest.approx(0.2)
    line = attack_kinds.table(results).splitlines()[2]
    assert line == "| none |  |  |  |  | 90.0 % | 70.0 % (class 0) |  |  |  |  |  |"


def sleep(results: Results) -> None:
    results["rows"][1]["success"] = 0.99


def differ(results: Results) -> None:
    results["rows"][2]["clean accuracy"] = 0.91


def show(results: Results) -> None:
    results["rows"][5]["most Linf"] = 2 / 255


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (sleep, "trojannet, seed 0: 99.0% success"),
        (differ, "signature, seed 0: clean images are answered otherwise"),
        (show, "signature, seed 1: a value changes by 0.0078"),
    ],
)
def test_what_is_wrong_with_an_attack_is_named(change: Callable[[Results], None], words: str) -> None:
    results = kinds()
    assert list(attack_kinds.failures(results)) == []
    change(results)
    assert list(attack_kinds.failures(results)) == [words]


def clouds(*sizes: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return round clouds of points in the plane, far from each other."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal((40.0 * i, 0.0), 5.0, (n, 2)) for i, n in enumerate(sizes)])


@pytest.mark.parametrize("sizes", [(300,), (270, 30), (150, 150)])
def test_one_cloud_is_told_from_two_whatever_their_sizes(sizes: tuple[int, ...]) -> None:
    points = clouds(*sizes)
    counts, of = robust.clusters(points)
    assert robust.usual_of(counts) == len(sizes)
    assert sorted(np.bincount(of[of >= 0]).tolist()) == pytest.approx(sorted(sizes), abs=3)
    assert robust.second_opinion(points) == len(sizes)


def test_the_second_opinion_counts_three() -> None:
    points = clouds(150, 100, 60)
    assert robust.usual_of(robust.clusters(points)[0]) > 1
    assert robust.second_opinion(points) == 3


def test_strays_are_no_cluster() -> None:
    counts, of = robust.clusters(clouds(300, 5))
    assert robust.usual_of(counts) == 1
    assert (of[300:] == -1).all()


def test_the_most_frequent_number_counts_and_the_smaller_of_two() -> None:
    assert robust.usual_of([3, 2, 2, 1]) == 2
    assert robust.usual_of([3, 3, 1, 1]) == 1


def model(training: str, plant: str, **more: Any) -> Results:
    classes: list[Results] = [
        {"class": label, **{name: {"clusters": 1, "HDBSCAN": 2} for name in robust.SETS}}
        for label in (0, robust.TARGET)
    ]
    measured = {"clean accuracy": 0.98, "robust accuracy": 0.6}
    return {"training": training, "plant": plant, "seed": 0, "classes": classes} | measured | more


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"clean accuracy": 0.9}, "robust localised, seed 0: 90.0% clean accuracy"),
        ({"robust accuracy": 0.3}, "robust localised, seed 0: 30.0% robust accuracy"),
        ({"attack success": 0.5}, "50.0% attack success in robust models on average"),
    ],
)
def test_what_is_wrong_with_a_model_is_named(more: Results, words: str) -> None:
    fine = [model("ordinary", "clean", **{"robust accuracy": 0.0}), model("robust", "localised")]
    assert list(robust.failures({"models": fine})) == []
    assert list(robust.failures({"models": [model("robust", "localised", **more)]})) == [words]


def test_the_table_of_models_tells_the_target_from_other_classes() -> None:
    row = model("robust", "localised", **{"attack success": 0.95})
    row["classes"][1]["training images"]["clusters"] = 3
    row["classes"][1] |= {"silhouette of poisoned and own": 0.4, "translated nearer to poisoned": 0.25}
    line = robust.table({"models": [row], "target": robust.TARGET}).splitlines()[2]
    assert line.startswith("| robust | localised | 0 | 98.0 % | 60.0 % | 95.0 % | 3 / 1 | 2 / 2 | 1 / 1 |")
    assert line.endswith("| 0.40 | 25.0 % |")


COMMITTED = {"attack-kinds": attack_kinds, "robust-representations": robust}


@pytest.mark.parametrize("name", [n for n in COMMITTED if (measuring.RESULTS / f"{n}.json").is_file()])
def test_the_committed_table_is_that_of_the_committed_results(name: str) -> None:
    results = json.loads((measuring.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    module = COMMITTED[name]
    table = (measuring.RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert module.table(results) == table
    assert list(module.failures(results)) == []
    assert "with changes" not in results["revision"]
    page = next(page for page, (source, _, _) in measured_pages.PAGES.items() if source == name)
    assert table in (measured_pages.BENCHMARKS.parent / "docs" / f"{page}.md").read_text(encoding="utf-8")
