"""Evasion attacks through the adapter: what they change, and what they leave alone."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from doorward.bench.evasion import ATTACKS, Evaded, evade
from doorward.core.errors import CouldNotTell, InputError, MissingExtra
from doorward.core.seeds import make_generator
from doorward.methods import registry
from doorward.models import InputSpec, TorchClassifier, wrap
from seeds import shifted

pytest.importorskip("art", reason="the extra `evasion` is not installed")

SPEC = InputSpec(channels=1, height=4, width=4, mean=(0.5,), std=(0.5,))
#: Settings with which each attack is quick on images of 4x4 pixels.
QUICK: dict[str, dict[str, Any]] = {
    "fgsm": {"eps": 0.2},
    "bim": {"eps": 0.2, "eps_step": 0.05, "max_iter": 6},
    "cw0": {"max_iter": 5, "binary_search_steps": 3, "initial_const": 10.0, "warm_start": False},
    "cw2": {"max_iter": 10, "binary_search_steps": 5, "initial_const": 1.0},
    "cwinf": {"max_iter": 10, "initial_const": 0.1, "const_factor": 4.0, "learning_rate": 0.05},
    "deepfool": {"epsilon": 0.02},
    "jsma": {"theta": 0.5},
}


def linear(seed: int = 0) -> tuple[TorchClassifier, Tensor]:
    """Return a linear classifier of three classes and its weights (3, 16)."""
    layer = nn.Linear(16, 3)
    with torch.no_grad():
        layer.weight.normal_(0, 1, generator=make_generator(seed, "weights"))
        layer.bias.zero_()
    return TorchClassifier(nn.Sequential(nn.Flatten(), layer), SPEC, ["a", "b", "c"]), layer.weight.detach()


def images(n: int = 12) -> Tensor:
    return 0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=make_generator(0, "images"))


def test_there_are_the_seven_and_none_is_taken_for_a_plant() -> None:
    assert list(ATTACKS) == ["fgsm", "bim", "cw0", "cw2", "cwinf", "deepfool", "jsma"]
    assert "evasion" not in registry.modules("attack")


@cache
def evaded(name: str) -> tuple[Evaded, list[tuple[int, int]]]:
    """Return what an attack makes of the images, for all tests, and the progress that it reported."""
    seen: list[tuple[int, int]] = []
    classifier, _ = linear(shifted(0))
    classifier.module.train()
    made = evade(
        classifier,
        images(),
        name,
        settings=QUICK[name],
        batch_size=5,
        progress=lambda *done: seen.append(done),
    )
    return made, seen


@pytest.mark.trains
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_changes_predictions_and_nothing_else(name: str) -> None:
    made, seen = evaded(name)
    classifier, _ = linear(shifted(0))
    module, x = classifier.module.train(), images()
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert made.seconds > 0
    assert made.images.shape == x.shape
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    flipped = classifier.logits(made.images).argmax(1) != classifier.logits(x).argmax(1)
    assert flipped.float().mean() >= 0.75
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    some = slice(5) if name == "jsma" else slice(10, 12)  # its targets are drawn in the order of images
    again = evade(classifier, x[some], name, settings=QUICK[name], batch_size=5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert module.training
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert torch.equal(again.images, made.images[some])


def test_fgsm_is_one_step_up_the_loss() -> None:
    classifier, _ = linear()
    x = images().requires_grad_()
    z = classifier.logits(x)
    nn.functional.cross_entropy(z, z.argmax(1), reduction="sum").backward()
    assert x.grad is not None
    expected = (x + 0.03 * x.grad.sign()).clamp(0, 1).detach()
    made = evade(classifier, x, "fgsm", settings={"eps": 0.03}).images
    assert torch.allclose(made, expected, atol=1e-6)


def test_deepfool_goes_straight_over_the_nearest_boundary_of_a_linear_model() -> None:
    classifier, weight = linear()
    x = images()
    z = classifier.logits(x).detach()
    own = z.argmax(1)
    slope = 2 * weight  # the model takes (x - 0.5) / 0.5
    gaps = z[torch.arange(len(x)), own][:, None] - z
    lengths = (slope[own][:, None] - slope).norm(dim=2)
    nearest = (gaps / lengths.clamp_min(1e-9) + 1e9 * nn.functional.one_hot(own, 3)).amin(1)
    moved = (evade(classifier, x, "deepfool", settings={"epsilon": 0.02}).images - x).flatten(1).norm(dim=1)
    assert torch.allclose(moved, 1.02 * nearest, rtol=0.02)


@pytest.mark.trains
def test_the_norms_are_what_each_attack_keeps_small() -> None:
    classifier, _ = linear(shifted(0))
    x = images()

    def change(name: str) -> Tensor:
        made = evaded(name)[0].images
        flipped = classifier.logits(made).argmax(1) != classifier.logits(x).argmax(1)
        return (made - x).flatten(1)[flipped].abs()

    sparse, dense = change("cw0"), change("cw2")
    assert (sparse > 1e-3).sum(1).float().mean() < 4, "of 16 values"
    assert (dense > 1e-3).sum(1).float().mean() > 10
    assert change("cwinf").amax(1).mean() < sparse.amax(1).mean()
    assert dense.norm(dim=1).mean() < sparse.norm(dim=1).mean()


def test_targets_of_jsma_come_from_the_seed() -> None:
    classifier, _ = linear()
    made = [
        evade(classifier, images(), "jsma", settings=QUICK["jsma"], seed=seed).images for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_no_images_are_no_work() -> None:
    assert len(evade(linear()[0], images(0), "cw0").images) == 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pgd2", {}, "there is no evasion attack named 'pgd2'; there are: fgsm, bim, cw0, cw2, cwinf, deepf"),
        ("fgsm", {"strength": 1}, "fgsm has no setting 'strength'; its settings are: eps, eps_step, minimal"),
        ("cw2", {"targeted": True}, "cw2 has no setting 'targeted'"),
        ("fgsm", {"eps": -1.0}, "fgsm: .*eps"),
        ("cw2", {"max_iter": -1}, "cw2: The number of iterations must be"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evade(linear()[0], images(), name, settings=settings)


def test_models_and_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"takes float images \(n, 1, 4, 4\)"):
        evade(linear()[0], torch.rand(2, 1, 5, 5), "fgsm")
    blind = wrap(lambda x: x.flatten(1)[:, :3].detach() * 1.0, size=(1, 4, 4))
    with pytest.raises(InputError, match="gives no gradients"):
        evade(blind, images(), "fgsm")
    broken, _ = linear()
    with torch.no_grad():
        next(broken.module.parameters()).fill_(float("nan"))
    with pytest.raises(CouldNotTell, match="not finite"):
        evade(broken, images(), "deepfool")


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("art", "art.attacks"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"pip install 'doorward\[evasion\]'"):
        evade(linear()[0], images(), "fgsm")
