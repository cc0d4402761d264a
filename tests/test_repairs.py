"""Repairs by clean samples: what is pruned, trained and unlearnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.core.records import Finding, RecoveredTrigger, Table
from doorward.core.seeds import make_generator
from doorward.data import Samples
from doorward.methods import registry
from doorward.models import TorchClassifier, networks
from doorward.repairs._clean import split_clean
from doorward.repairs._random_triggers import draw_trigger
from doorward.repairs._relearning import BEST, DRAWN, FEW, RADIUS, by_turns, led, search, searched
from doorward.repairs._replay import Replay
from doorward.repairs._units import Sweep, find_units, mean_activations, remove, silenced, sweep, zero
from doorward.repairs.base import Damage
from doorward.repairs.pruning import prunable
from doorward.testing import NAMES, SPEC, make_images
from doorward.training import TrainingSettings, evaluate, predict, train_classifier
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern
from seeds import shifted

#: A patch in the corner, and the class that it leads to.
TARGET = 2


class Transformer(nn.Module):
    """Give logits by one block of attention and an MLP, which adds to its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, 4)
        self.attention = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"up": nn.Linear(8, 24), "down": nn.Linear(24, 8)})
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 5)."""
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # (n, 16, 8)
        tokens = self.attention(tokens)
        tokens += 1  # what a layer gave is written to
        inner: Tensor = self.block["down"](nn.functional.gelu(self.block["up"](tokens)))
        logits: Tensor = self.head((tokens + inner).mean(1))
        return logits


class Joined(nn.Module):
    """Join two branches in front of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 5)."""
        x = self.first(x)
        logits: Tensor = self.linear(torch.cat([x, self.second(x)], 1).amax((2, 3)))
        return logits


class Convolutions(nn.Sequential):
    """Make logits by a last convolution."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3, 2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


OWN: dict[str, type[nn.Module]] = {
    "transformer": Transformer,
    "joined": Joined,
    "convolutions": Convolutions,
}


def network(name: str) -> TorchClassifier:
    """Return a network with random weights and batch norm statistics."""
    if name in OWN:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = OWN[name]()
    else:
        module = networks.build(name, SPEC, classes=len(NAMES), generator=make_generator(1))
    generator = make_generator(2)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.rand(layer.num_features, generator=generator)
            layer.running_var = 1 + torch.rand(layer.num_features, generator=generator)
    return TorchClassifier(module.eval(), SPEC, NAMES, architecture=name)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Collect how many samples go through convolutions that really run inside the block."""
    seen: list[int] = []
    run = nn.Conv2d._conv_forward

    def count(layer: nn.Conv2d, x: Tensor, *args: Any) -> Tensor:
        seen.append(len(x))
        y: Tensor = run(layer, x, *args)
        return y

    with mock.patch.object(nn.Conv2d, "_conv_forward", count):
        yield seen


# units


@pytest.mark.parametrize(
    ("name", "reader", "count", "each"),
    [
        ("small-cnn", "7", 32, 16),
        ("vgg", "9", 64, 16),
        ("resnet-8", "linear", 64, 1),
        ("transformer", "block.down", 24, 1),
        ("joined", "linear", 8, 1),
        ("convolutions", "3", 6, 1),
    ],
)
def test_units_are_what_the_layer_behind_reads(name: str, reader: str, count: int, each: int) -> None:
    classifier = network(name)
    units = find_units(classifier)
    assert units.reader == reader
    assert units.columns.shape == (count, each)
    assert (units.producer is None) == (name == "joined")
    assert sorted(units.columns.flatten().tolist()) == list(range(count * each))


@pytest.mark.parametrize("name", ["small-cnn", "resnet-8", "transformer", "joined", "convolutions"])
def test_the_curve_is_that_of_running_the_network_at_every_level(name: str) -> None:
    classifier, samples = network(name), make_images(30, seed=4)
    units = find_units(classifier)
    order = mean_activations(classifier, units, samples).argsort()
    with counted() as trunk:
        swept = sweep(classifier, units, order, samples)
    slow = []
    for level in range(len(units)):
        with silenced(classifier.module, units, order[:level]):
            slow.append(evaluate(classifier, samples).successes)
    assert list(swept.correct) == slow
    if name != "convolutions":  # its last convolution reads the units: parts of it run at each level
        layers = sum(isinstance(m, nn.Conv2d) for m in classifier.module.modules())
        twice = name == "transformer"  # what it writes to is seen in a first run, and kept in a second
        assert trunk == [30] * layers * (1 + twice)


def test_the_mean_activation_is_that_of_what_the_reader_gets() -> None:
    classifier, samples = network("small-cnn"), make_images(20, seed=4)
    units = find_units(classifier)
    module = classifier.module
    assert isinstance(module, nn.Sequential)
    x = torch.from_numpy(np.stack(samples.raw(range(20)))).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        pooled = nn.Sequential(*list(module)[:6])(classifier.spec.to_model(x))  # (n, c, h, w)
    torch.testing.assert_close(mean_activations(classifier, units, samples), pooled.mean((0, 2, 3)))


@pytest.mark.parametrize("name", ["small-cnn", "vgg", "resnet-8", "resnet-14", "transformer", "joined"])
def test_removed_units_make_the_network_smaller_and_leave_its_logits(name: str) -> None:
    classifier = network(name)
    units = find_units(classifier)
    pruned = torch.arange(0, len(units), 2)
    zero(classifier.module, units, pruned)
    before = classifier.parameters
    smaller = remove(classifier, units, pruned)
    x = torch.rand(6, *SPEC.shape, generator=make_generator(3))
    with torch.no_grad():
        torch.testing.assert_close(smaller.logits(x), classifier.logits(x), rtol=1e-3, atol=1e-3)
    assert smaller.parameters is not None
    assert before is not None
    assert smaller.parameters < before
    assert classifier.parameters == before, "the network that was given stays"
    if units.producer is not None:
        made = len(smaller.module.get_submodule(units.producer).get_parameter("weight"))
        assert made == len(units) - len(pruned)


def test_a_network_without_such_layers_is_refused() -> None:
    linear = TorchClassifier(nn.Sequential(nn.Flatten(), nn.Linear(256, 5)), SPEC, NAMES)
    with pytest.raises(InputError, match="use fine-tuning"):
        find_units(linear)


def test_replay_runs_a_module_again_that_runs_on_both_sides() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(256, 8), nn.Linear(8, 5)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.act(self.second(self.act(self.first(x.flatten(1)))))
            return logits

    classifier = TorchClassifier(Shared(), SPEC, NAMES)
    x = torch.rand(3, *SPEC.shape, generator=make_generator(3))
    replay = Replay(classifier, "second")
    first = replay.record(x)
    torch.testing.assert_close(replay.run(replay.made), first)
    torch.testing.assert_close(replay.run(replay.made - 100), torch.zeros(3, 5))
    torch.testing.assert_close(classifier.raw_logits(x), first)


# samples to stop by


def test_samples_are_kept_back_evenly_and_single_ones_stay() -> None:
    parts = split_clean(make_images(100), 0)
    assert not set(parts.fit.ids) & set(parts.validation.ids)
    assert parts.validation.labels is not None
    assert np.bincount(parts.validation.labels).tolist() == [5] * 5
    few = split_clean(make_images(12), 0)
    assert len(few.fit) == len(few.validation) == 12
    with pytest.raises(InputError, match="10 clean samples at least"):
        split_clean(make_images(9), 0)


def test_pruning_stops_at_the_first_level_that_costs_too_much() -> None:
    assert prunable(Sweep((90, 91, 86, 85, 90), n=100), 0.04) == 2
    assert prunable(Sweep((90, 80), n=100), 0.04) == 0
    assert prunable(Sweep((90, 90), n=100), 0.0) == 1


# the repairs


def patch() -> MaskedPattern:
    mask = torch.zeros(1, 16, 16)
    mask[:, 12:, 12:] = 1
    return MaskedPattern(mask, torch.ones(1, 16, 16))


@cache
def backdoored() -> TorchClassifier:
    """Return a small network that a patch leads to one class."""
    attack = registry.build("attack", "badnets", {"target": TARGET, "poison_rate": 0.2, "size": 4})
    poisoned = attack(make_images(300, seed=shifted(0)), seed=shifted(0)).samples
    settings = TrainingSettings(epochs=8, batch_size=16, precision="float32")
    return train_classifier("small-cnn", poisoned, seed=shifted(0), settings=settings).classifier


def success(classifier: TorchClassifier) -> float:
    """Return how often the patch leads images of other classes to the target."""
    samples = make_images(100, seed=9)
    x = torch.from_numpy(np.stack(samples.raw(range(100)))).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        given = classifier.logits(patch().apply(x)).argmax(1)
    others = torch.from_numpy(samples.labels) != TARGET
    return float((given[others] == TARGET).float().mean())


def found(*, trigger: bool = True) -> Finding:
    return Finding(
        detector="patch-search",
        level="model",
        kind="backdoor",
        summary="A patch leads to class 2.",
        score=1.0,
        threshold=0.5,
        verdict="backdoored",
        targets=(TARGET,),
        evidence=(RecoveredTrigger(title="Patch", target=TARGET, trigger=patch().to_json()),)
        if trigger
        else (),
    )


def damage(classifier: TorchClassifier, clean: Samples, *findings: Finding, keep: bool = False) -> Damage:
    parts = split_clean(clean, 0)
    return Damage(
        classifier=classifier,
        findings=findings,
        clean=parts.fit,
        validation=parts.validation,
        keep_shapes=keep,
        seed=shifted(0),
    )


@pytest.mark.trains
def test_a_recovered_trigger_is_unlearnt() -> None:
    classifier = backdoored()
    assert success(classifier) > 0.9
    before = {name: t.clone() for name, t in classifier.module.state_dict().items()}
    repaired = registry.build("repair", "unlearning", {"steps": 200})(
        damage(classifier, make_images(80, seed=5), found())
    )
    assert success(repaired.classifier) <= 0.05
    assert evaluate(repaired.classifier, make_images(100, seed=9)).value >= 0.95
    assert "with and without the recovered trigger" in repaired.record.done
    for name, tensor in classifier.module.state_dict().items():
        assert torch.equal(tensor, before[name]), "the model that was given stays"


@pytest.mark.trains
def test_a_trigger_that_nobody_knows_is_unlearnt_without_loss() -> None:
    classifier = backdoored()
    repaired = registry.build("repair", "adversarial-unlearning", {"steps": 200})(
        damage(classifier, make_images(80, seed=5))
    )
    assert success(classifier) > 0.9
    assert success(repaired.classifier) <= 0.3
    assert evaluate(repaired.classifier, make_images(100, seed=9)).value >= 0.95


def test_perturbations_are_bounded_and_lead_most_images_to_their_class() -> None:
    linear = nn.Linear(256, 5)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(5, 256, generator=make_generator(1)))
        linear.bias.zero_()
    classifier = TorchClassifier(nn.Sequential(nn.Flatten(), linear), SPEC, NAMES)
    images = torch.full((20, *SPEC.shape), 0.5)
    found, share = search(classifier, images, [0, 4], make_generator(2))
    assert share.tolist() == [1.0, 1.0]
    lengths = found.flatten(1).norm(dim=1)
    assert bool((lengths <= RADIUS * 16 * (1 + 1e-4)).all())
    few, _ = search(classifier, images, [0, 4], make_generator(2), sparse=True)
    assert (few != 0).flatten(1).sum(1).tolist() == [round(FEW * 256)] * 2
    assert float(few.abs().max()) <= 1
    for delta, target in zip((*found, *few), (0, 4, 0, 4), strict=True):
        assert bool((classifier.logits((images + delta).clamp(0, 1)).argmax(1) == target).all())


def pixels(x: Tensor) -> TorchClassifier:
    """Return a classifier that gives class 1 where a pixel in the middle is bright, and else class 0."""
    linear = nn.Linear(x[0].numel(), 5)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[1, x[0].numel() // 2 + 8] = 10.0
        linear.bias.copy_(torch.tensor([5.0, 0.0, -9.0, -9.0, -9.0]))
    return TorchClassifier(nn.Sequential(nn.Flatten(), linear), SPEC.model_copy(update=PLAIN), NAMES)


#: Images go into the network as they are.
PLAIN = {"mean": (0.0,), "std": (1.0,)}


def test_random_triggers_are_of_every_kind_and_leave_images_in_range() -> None:
    images = torch.rand(6, 1, 16, 20, generator=make_generator(1))
    generator, again = make_generator(2), make_generator(2)
    drawn = [draw_trigger(images, generator) for _ in range(60)]
    assert {one.kind for one in drawn} == {"masked-pattern", "warp", "additive"}
    for one in drawn:
        shown = one.apply(images)
        assert shown.shape == images.shape
        assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
        assert torch.equal(shown, draw_trigger(images, again).apply(images)), "the seed says it all"
    patches = [m for one in drawn if (m := one.tensors().get("mask")) is not None and float(m.max()) == 1]
    assert patches
    assert all(0 < float(mask.mean()) <= 3 / 16 for mask in patches)


def test_a_trigger_counts_by_the_images_that_it_leads_from_other_classes_to_one() -> None:
    images = torch.zeros(4, *SPEC.shape)
    images[3] = 1  # of the class already
    middle, nothing = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    middle[:, 8, 8] = 1
    triggers = [MaskedPattern(mask, torch.ones(1, 16, 16)) for mask in (nothing, middle)]
    assert led(pixels(images), triggers, images).tolist() == [0.0, 0.75]


def test_triggers_that_lead_images_to_a_class_are_kept_and_used_most() -> None:
    images = torch.zeros(8, *SPEC.shape)
    put = searched(images, make_generator(3))
    classifier = pixels(images)
    with mock.patch("doorward.repairs._relearning.draw_trigger", wraps=draw_trigger) as drawn:
        shown = torch.cat([put(classifier, images, step) for step in range(1, 77)])
    assert drawn.call_count == DRAWN + 3 * (DRAWN - BEST)
    random = torch.cat([draw_trigger(images, make_generator(i)).apply(images[:1]) for i in range(200)])
    led_there, by_chance = (
        float((classifier.logits(x).argmax(1) == 1).float().mean()) for x in (shown, random)
    )
    assert led_there >= 0.5 > 3 * by_chance


def test_images_bear_what_one_of_several_puts_on_them() -> None:
    generator = make_generator(4)
    both = by_turns((lambda _, x, __: x, lambda _, x, __: x + 1), generator, shares=(3.0, 1.0))
    made = both(network("small-cnn"), torch.zeros(4000, 1, 1, 1), 1)
    assert set(made.unique().tolist()) == {0.0, 1.0}
    assert float(made.mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("name", ["unlearning", "adversarial-unlearning"])
def test_answers_of_the_original_are_kept_and_not_its_labels(name: str) -> None:
    """Where labels are wrong, the model that is mended does not learn them."""
    classifier, clean = network("small-cnn"), make_images(40)
    answers = predict(classifier, clean)
    repaired = registry.build("repair", name, {"steps": 40, "drop": 1.0})(damage(classifier, clean, found()))
    assert clean.labels is not None
    assert float((answers == clean.labels).mean()) < 0.5
    assert float((predict(repaired.classifier, clean) == answers).mean()) >= 0.75


@pytest.mark.trains
@pytest.mark.parametrize("keep", [False, True])
def test_fine_pruning_prunes_and_the_pruned_units_stay_at_zero(keep: bool) -> None:
    classifier = backdoored()
    given = damage(classifier, make_images(80, seed=5), found(), keep=keep)
    repaired = registry.build("repair", "fine-pruning", {"share": 0.1, "variant": "plain"})(given)
    (table,) = repaired.record.evidence
    assert isinstance(table, Table)
    assert len(table.rows) == 32
    count = int(repaired.record.done.split()[0])
    assert 0 < count < 32
    before, after = classifier.parameters, repaired.classifier.parameters
    assert before is not None
    assert after is not None
    assert (after == before) if keep else (after < before)
    if keep:
        weight = repaired.classifier.module.get_submodule("7").get_parameter("weight")  # (128, 512)
        assert int((weight.reshape(128, 32, 16).abs().amax((0, 2)) == 0).sum()) == count
    assert evaluate(repaired.classifier, make_images(100, seed=9)).value >= 0.95


@pytest.mark.trains
def test_pruning_alone_shows_what_the_trigger_activates() -> None:
    clean = make_images(80, seed=5)
    repaired = registry.build("repair", "pruning", {"drop": 0.04})(damage(backdoored(), clean, found()))
    (table,) = repaired.record.evidence
    assert isinstance(table, Table)
    means = [row[2] for row in table.rows]
    assert means == sorted(means)  # type: ignore[type-var]
    assert any(row[2] != row[3] for row in table.rows), "a patch activates other units"
    without = registry.build("repair", "pruning", {})(damage(backdoored(), clean))
    (table,) = without.record.evidence
    assert isinstance(table, Table)
    assert {row[3] for row in table.rows} == {None}


def test_a_repair_says_what_it_lacks() -> None:
    classifier, clean = network("small-cnn"), make_images(40)

    def refused(name: str, given: Damage, match: str, **settings: object) -> None:
        with pytest.raises(InputError, match=match):
            registry.build("repair", name, dict(settings))(given)

    refused("unlearning", damage(classifier, clean), "nothing of the kind")
    refused("unlearning", damage(classifier, clean, found(trigger=False)), "no trigger was recovered")
    assert clean.labels is not None
    some = clean.select(np.flatnonzero(clean.labels != 3))
    refused("fine-tuning", damage(classifier, some), r"1 of 5 have no clean sample \(class 3\)")
    fixed = TorchClassifier(classifier.module, SPEC, NAMES, batch=4)
    refused("fine-tuning", damage(fixed, clean), "exactly 4 inputs at a time")
    refused("adversarial-unlearning", damage(fixed, clean), "exactly 4 inputs at a time")
    refused("fine-tuning", Damage(classifier=classifier, findings=()), "needs clean, clean_labels")


def test_pruning_that_costs_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doorward.repairs.pruning.sweep", lambda *_: Sweep((30, 2, 2), n=30))
    with pytest.raises(InputError, match="nothing can be pruned"):
        registry.build("repair", "pruning", {})(damage(network("small-cnn"), make_images(40)))


def test_sharpness_aware_training_takes_gradients_uphill_and_leaves_statistics_alone() -> None:
    """One step by hand, with batch norm, is the step of the loop."""
    from doorward.training import train

    samples = make_images(8, seed=1)
    settings = TrainingSettings(
        optimizer="sgd", momentum=0, weight_decay=0, learning_rate=0.1, schedule="constant",
        epochs=1, batch_size=8, precision="float32",
    )  # fmt: skip

    def module() -> nn.Module:
        return networks.build("resnet-8", SPEC, classes=5, generator=make_generator(1))

    looped, own, plain = module(), module().train(), module()
    for net, sharpness in ((looped, 0.5), (plain, 0.0)):
        train(net, samples, spec=SPEC, settings=settings, generator=make_generator(0), sharpness=sharpness)
    x = torch.from_numpy(np.stack(samples.raw(range(8)))).permute(0, 3, 1, 2) / 255
    y = torch.from_numpy(samples.labels)
    nn.functional.cross_entropy(own(SPEC.to_model(x)), y).backward()  # type: ignore[no-untyped-call]
    start = [p.detach().clone() for p in own.parameters()]
    gradients = [p.grad.clone() for p in own.parameters() if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    statistics = {name: t.clone() for name, t in own.named_buffers()}
    with torch.no_grad():
        for p, g in zip(own.parameters(), gradients, strict=True):
            p.add_(0.5 * g / norm)
    own.zero_grad()
    nn.functional.cross_entropy(own(SPEC.to_model(x)), y).backward()  # type: ignore[no-untyped-call]
    for p, q, value in zip(own.parameters(), looped.parameters(), start, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(q.detach(), value - 0.1 * p.grad, rtol=1e-3, atol=1e-4)
    for name, buffer in looped.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(buffer, statistics[name])
    assert not torch.allclose(next(looped.parameters()), next(plain.parameters()), atol=1e-5)


# immunised


def images_of(samples: Samples) -> Tensor:
    """Return images (n, c, h, w) in [0, 1]."""
    return torch.from_numpy(np.stack(samples.raw(range(len(samples))))).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("attack", ["checksum", "signature"])
def test_immunised_models_ignore_what_is_in_the_lowest_bits(attack: str) -> None:
    if attack == "signature":
        pytest.importorskip("cryptography")
    spec = SPEC.model_copy(update={"height": 24, "width": 24, "mean": (0.4,), "std": (0.3,)})
    module = networks.build("small-cnn", spec, classes=5, generator=make_generator(1)).eval()
    clean = TorchClassifier(module, spec, NAMES, architecture="small-cnn")
    planted = registry.build("attack", attack, {"target": TARGET})(clean)
    samples = make_images(60, side=24)
    assert planted.plant.trigger is not None
    signed = Trigger.from_json(planted.plant.trigger).apply(images_of(samples))
    others = clean.logits(signed).argmax(1) != TARGET
    assert bool((planted.classifier.logits(signed)[others].argmax(1) == TARGET).all())
    mended = registry.build("repair", "immunise", {})(Damage(classifier=planted.classifier, findings=()))
    coarse = (signed * 255).round().div(2).floor().mul(2) / 255  # a checksum moves some by a step
    torch.testing.assert_close(mended.classifier.logits(signed), clean.logits(coarse), rtol=1e-3, atol=1e-3)
    assert ("left out" in mended.record.done) == (attack == "signature")
    assert "gradients" in mended.classifier.capabilities
    kept = registry.build("repair", "immunise", {"bits": 8})(
        Damage(classifier=planted.classifier, findings=())
    )
    if attack == "checksum":  # what is not cut off survives
        assert bool((kept.classifier.logits(signed)[others].argmax(1) == TARGET).all())


def test_votes_are_the_mean_of_what_the_model_says_under_its_noise() -> None:
    classifier = network("small-cnn")
    settings = {"votes": 3, "noise": 0.1, "bits": 8}
    mended = registry.build("repair", "immunise", settings)(
        Damage(classifier=classifier, findings=(), seed=2)
    )
    x = images_of(make_images(6))
    noise = mended.classifier.module.get_buffer("noise")
    assert float(noise.std()) == pytest.approx(0.1, rel=0.1)
    votes = torch.stack([classifier.logits((x + one).clamp(0, 1)).softmax(1) for one in noise])
    torch.testing.assert_close(mended.classifier.logits(x).softmax(1), votes.mean(0), rtol=1e-3, atol=1e-4)
