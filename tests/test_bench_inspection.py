"""What the bench counts of inspected training sets, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from doorward.bench.inspection import (
    ClassCounts,
    Inspection,
    Scored,
    compared,
    counted,
    flagged_counts,
    raw_baseline,
)
from doorward.bench.plan import Sources, merged, unmerged
from doorward.bench.results import DetectorOutcome, Result, Results
from doorward.bench.suite import Data, World, get_suite
from doorward.bench.summary import measure, summarise
from doorward.bench.tables import to_csv, to_markdown
from doorward.core.records import Measurement
from doorward.data import InMemorySamples
from doorward.stats.metrics import ranking
from poisoned_sets import images

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
POISONED = np.array([1, 1, 0, 0, 0, 0, 0, 0], dtype=bool)


def test_flagged_samples_are_counted_by_class() -> None:
    found = counted(LABELS, POISONED, {0: np.array([0, 2]), 1: np.array([4])})
    assert found[0] == ClassCounts(samples=4, poisoned=2, hit=1, wrong=1)
    assert found[1] == ClassCounts(samples=4, poisoned=0, hit=0, wrong=1)
    assert found[0].f1 == pytest.approx(2 * 1 / (2 + 2))
    assert found[0].accuracy == pytest.approx(0.5)
    assert found[1].f1 is None
    assert found[1].accuracy == pytest.approx(0.75)


def test_what_no_class_flags_is_not_flagged() -> None:
    found = counted(LABELS, POISONED, {0: np.array([0, 1]), 1: np.array([4])})
    nothing = flagged_counts([(found, ())])
    assert (nothing.tpr.successes, nothing.fpr.successes, nothing.f1_least) == (0, 0, 0.0)
    assert (nothing.tpr.n, nothing.fpr.n) == (2, 6)
    right = flagged_counts([(found, (0,))])
    assert (right.tpr.value, right.fpr.value, right.f1_least, right.accuracy_least) == (1.0, 0.0, 1.0, 1.0)
    both = flagged_counts([(found, (0, 1)), (found, ())])
    assert (both.tpr.successes, both.tpr.n, both.fpr.successes, both.fpr.n) == (2, 4, 1, 12)
    assert both.f1_mean == pytest.approx(0.5)
    clean = flagged_counts([(counted(LABELS, POISONED & False, {}), ())])
    assert (clean.f1_least, clean.f1_mean, clean.accuracy_least) == (None, None, None)


def test_a_measurement_is_compared_with_the_truth() -> None:
    samples = InMemorySamples(np.arange(8 * 4, dtype=np.uint8).reshape(8, 2, 2), LABELS)
    ids = samples.ids
    scores = dict(zip(ids, [0.9, 0.8, 0.7, 0.1, 0.2, 0.3, 0.0, 0.0], strict=True))
    seen = Measurement(
        detector="activation-clustering",
        level="sample",
        kind="poison",
        summary="",
        score=1.0,
        per_class={0: 1.0, 1: 0.0},
        scores=scores,
        suspects={0: (ids[0], ids[1], ids[2])},
    )
    found = compared(seen, samples, POISONED)
    assert found.ranking.auroc == 1.0
    assert found.classes[0] == ClassCounts(samples=4, poisoned=2, hit=2, wrong=1)
    reason = compared(seen.model_copy(update={"scores": None, "reason": "why"}), samples, POISONED)
    assert (reason.reason, reason.classes) == ("why", {})


def test_the_raw_baseline_clusters_pixels() -> None:
    case = images(300, 0.2)
    assert case.subject.train is not None
    found = raw_baseline(case.subject.train, case.poisoned, 0)
    assert sum(one.poisoned for one in found.values()) == int(case.poisoned.sum())
    assert found[0].f1 is not None
    assert found[0].f1 > 0.9, "a bright corner is plain to see in the pixels themselves"
    differing = InMemorySamples([np.zeros((4, 4, 1), np.uint8), np.zeros((5, 5, 1), np.uint8)], [0, 1])
    assert raw_baseline(differing, np.array([False, True]), 0) == {}


def test_joined_classes_are_other_contents_than_the_files_they_come_from() -> None:
    """Else a model of the one is taken for one of the other."""
    whole, joined, fewer = (
        Sources(None).contents(Data(name=f"{how}reference:fashion_mnist"))
        for how in ("", "merged:5:", "merged:2:")
    )
    assert len({whole.train, joined.train, fewer.train}) == 3
    assert len({whole.test, joined.test, fewer.test}) == 3
    assert (whole.classes, joined.classes, fewer.classes) == (10, 5, 2)


def test_classes_are_joined() -> None:
    assert unmerged("merged:2:glyphs-hard") == ("glyphs-hard", 2)
    samples = merged(InMemorySamples(np.zeros((4, 2, 2), np.uint8), [0, 1, 2, 3], classes="abcd"), 2)
    assert samples.classes == ("a+c", "b+d")
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 0, 1]
    data = Data(name="merged:2:glyphs", rows=40, world=World(classes=4, size=28))
    sources = Sources(None)
    assert sources.contents(data).classes == 2
    assert len(sources.part(data, "train").classes) == 2


def result(
    trial: str, group: str, *, plant: tuple[int, ...] | None, targets: tuple[int, ...], hit: int
) -> Result:
    classes = {
        0: ClassCounts(samples=100, poisoned=20 if plant else 0, hit=hit, wrong=0),
        1: ClassCounts(samples=100, poisoned=0, hit=0, wrong=0),
    }
    scored = Scored(
        ranking=ranking([1.0] * 20 + [0.0] * 180, [plant is not None] * 20 + [False] * 180), classes=classes
    )
    return Result(
        trial=trial,
        group=group,
        status="done",
        data="reference:fashion_mnist",
        architecture="small-cnn",
        classes=2,
        attack_success=1.0 if plant else None,
        plant=plant,
        verdict="suspicious" if targets else "nothing_found",
        targets=targets,
        seconds=1.5,
        inspection=Inspection(
            samples=200, poisoned=20 if plant else 0, detectors={"activation-clustering": scored}
        ),
        detectors={
            "activation-clustering": DetectorOutcome(
                verdict="suspicious" if targets else "nothing_found",
                score=0.9,
                p_value=None,
                targets=targets,
                seconds=1,
            )
        },
    )


def test_a_suite_of_training_data_has_its_own_table() -> None:
    suite = get_suite("training-data")
    planted, clean = suite.groups("smoke")
    held = Results(
        suite=suite.name,
        scale="smoke",
        made_with={"torch": ("2",)},
        results=(
            result("a", planted.name, plant=(0,), targets=(0,), hit=20),
            result("b", clean.name, plant=None, targets=(), hit=0),
        ),
    )
    shown = summarise(suite, held)
    assert shown.groups == ()
    row, other = shown.inspections
    assert (row.alarms.successes, row.exact.successes, row.found.tpr.value) == (1, 1, 1.0)
    assert row.rankings["activation-clustering"].tpr_at_5 == 1.0
    assert (other.alarms.successes, other.exact.n, other.found.fpr.value) == (0, 0, 0.0)
    text = to_markdown(shown)
    assert (
        "| badnets (white 3x3 patch) | fashion_mnist | 1 | 200 | 10.0 % | 100 % | 1 of 1 | 1 of 1 |" in text
    )
    assert "| clean | fashion_mnist | 1 | 200 |" in text
    assert to_csv(shown).startswith("suite,scale,group")
    done = list(held.results)
    assert measure("samples_found", done).successes == 20
    assert measure("samples_ranked", done).value == 1.0
    assert (measure("classes_right", done).successes, measure("classes_right", done).n) == (1, 1)
    assert (measure("alarm_on_clean", done).successes, measure("alarm_on_clean", done).n) == (0, 1)
    missed = [result("a", planted.name, plant=(0,), targets=(), hit=20)]
    assert measure("samples_found", missed).successes == 0
    assert measure("classes_right", missed).successes == 0
