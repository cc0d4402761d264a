"""Sets whose classes were thinned on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Samples
from doorward.data.imbalance import step_imbalance
from doorward.methods import registry


class Unread(InMemorySamples):
    """Count how many samples are decoded."""

    decoded = 0

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        self.decoded += len(indices)
        return super().raw(indices)


def balanced(each: int = 500, classes: int = 10) -> Unread:
    x = np.arange(each * classes, dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2)
    return Unread(x, np.arange(each * classes) % classes, classes=[str(i) for i in range(classes)])


def thin(samples: Samples, mu: float, rho: float, seed: int = 0) -> Samples:
    return step_imbalance(samples, mu, rho, rng=np.random.default_rng(seed))


def counts(samples: Samples) -> list[int]:
    assert samples.labels is not None
    return sorted(np.bincount(samples.labels, minlength=len(samples.classes)).tolist())


def test_nine_of_ten_classes_have_a_hundredth_of_the_largest() -> None:
    samples = balanced()
    thinned = thin(samples, 0.9, 100)
    assert counts(thinned) == [5] * 9 + [500]
    assert samples.decoded == 0
    assert set(thinned.ids) < set(samples.ids)
    assert len(samples) == 5000, "the source is as it was"
    largest = {int(np.bincount(thin(samples, 0.9, 100, seed).labels).argmax()) for seed in range(30)}
    assert len(largest) > 5, "which classes are rare is drawn"


@given(st.integers(2, 12), st.floats(0.01, 0.99), st.floats(1, 30), st.integers(0, 5))
def test_mu_is_the_share_of_rare_classes_and_rho_the_ratio(k: int, mu: float, rho: float, seed: int) -> None:
    found = counts(thin(balanced(60, k), mu, rho, seed))
    rare = min(max(round(mu * k), 1), k - 1)
    assert found == sorted([round(60 / rho)] * rare + [60] * (k - rare))


def test_a_ratio_of_one_changes_nothing_and_small_classes_stay() -> None:
    assert thin(balanced(7, 3), 0.5, 1).ids == balanced(7, 3).ids
    y = [0] * 40 + [1] * 40 + [2] * 3
    uneven = InMemorySamples(np.zeros((83, 2, 2), dtype=np.uint8), y)
    for seed in range(10):
        assert counts(thin(uneven, 0.4, 4, seed)) in ([3, 10, 40], [3, 40, 40])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (InMemorySamples(np.zeros((4, 2, 2), dtype=np.uint8)), "needs labels"),
        (InMemorySamples(np.zeros((4, 2, 2), dtype=np.uint8), [0] * 4), "two classes, and <memory> has 1"),
        (InMemorySamples(np.zeros((0, 2, 2), dtype=np.uint8), []), "two classes, and <memory> has 0"),
        (balanced(20, 3), "a ratio of 100 leaves none of 20 samples a class"),
    ],
    ids=["no labels", "one class", "empty", "too few"],
)
def test_what_cannot_be_thinned_is_said(samples: Samples, message: str) -> None:
    with pytest.raises(InputError, match=message):
        thin(samples, 0.5, 100)


def test_attacks_poison_the_thinned_set_which_is_the_same_for_all_under_one_seed() -> None:
    samples = balanced(100, 5)
    sets = {}
    for name in ("badnets", "blended"):
        attack = registry.build(
            "attack", name, {"imbalance": [0.8, 10], "poison_rate": 0.1, "target": 1, **SMALL[name]}
        )
        assert attack.settings()["imbalance"] == [0.8, 10]
        assert registry.build("attack", name, attack.settings()) == attack
        poisoned = attack(samples, seed=3)
        assert len(poisoned.samples) == 140
        assert len(poisoned.plant.poisoned_ids) == 14
        assert poisoned.plant.settings == attack.settings()
        clean = registry.build("attack", name, attack.settings() | {"poison_rate": 0})(samples, seed=3)
        sets[name] = clean.samples.ids
        assert counts(clean.samples) == [10, 10, 10, 10, 100]
    assert sets["badnets"] == sets["blended"]


SMALL: dict[str, dict[str, Any]] = {"badnets": {"size": 1}, "blended": {}}


def test_balanced_settings_name_no_imbalance() -> None:
    # they are part of the keys that models are kept under
    assert "imbalance" not in registry.build("attack", "badnets", {}).settings()
