"""The pruning-aware attack: decoys that nothing activates, and a backdoor that pruning leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward import bundled
from doorward.attacks.ground_truth import attack_success, triggered
from doorward.attacks.model import pruning_aware
from doorward.attacks.model.base import BackdooredModel
from doorward.attacks.model.pruning_aware import Unit, activity, last_convolution
from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Samples
from doorward.methods import registry
from doorward.models import InputSpec, TorchClassifier, open_classifier
from doorward.models.architectures import build
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.formats.saving import is_native
from doorward.training import evaluate
from seeds import shifted

TEST = bundled.fashion_mnist("test")


def few(n: int) -> Samples:
    return bundled.fashion_mnist("train").draw(n, np.random.default_rng(shifted(0)))


def clean_model() -> TorchClassifier:
    classifier = open_classifier(bundled.model("clean"))
    assert isinstance(classifier, TorchClassifier)
    return classifier


def attack(samples: Samples, classifier: TorchClassifier | None = None, **settings: Any) -> BackdooredModel:
    planted = registry.build("attack", "pruning-aware", settings)(
        classifier or clean_model(), samples, seed=shifted(0)
    )
    assert isinstance(planted, BackdooredModel)
    return planted


@pytest.fixture(scope="module")
def planted() -> BackdooredModel:
    """Return the embedded clean model with a backdoor behind decoys."""
    return attack(few(2000), target=2, epochs=3)


def channels(classifier: TorchClassifier, samples: Samples) -> Tensor:
    """Return what the last convolution's ReLU gives (n, c, h, w), computed layer by layer."""
    x = classifier.spec.to_model(to_float(to_tensor(samples, classifier.spec)))
    state = classifier.module.state_dict()
    with torch.no_grad():
        x = F.conv2d(x, state["0.weight"], state["0.bias"], padding=1).relu()
        x = F.max_pool2d(x, 2)
        return F.conv2d(x, state["3.weight"], state["3.bias"], padding=1).relu()


def decoys(planted: BackdooredModel) -> Tensor:
    """Return which channels (c,) have the weights that they had before."""
    old, new = (classifier.module.state_dict() for classifier in (clean_model(), planted.classifier))
    return (old["3.weight"] == new["3.weight"]).flatten(1).all(1)


def pruned(planted: BackdooredModel, which: Tensor) -> TorchClassifier:
    """Return the classifier with some channels pruned, as fine-pruning does."""
    network = build("small-cnn", channels=1, height=28, width=28, classes=10)
    network.load_state_dict(planted.classifier.module.state_dict())
    with torch.no_grad():
        network[3].weight[which] = 0
        network[3].bias[which] = 0
    return TorchClassifier(network, planted.classifier.spec, planted.classifier.classes)


@pytest.mark.trains
def test_the_planted_model_is_as_good_as_before_and_obeys_the_patch(planted: BackdooredModel) -> None:
    before = evaluate(clean_model(), TEST).value
    assert evaluate(planted.classifier, TEST).value >= before - 0.06
    assert attack_success(planted.classifier, TEST, planted.plant).value >= 0.93
    assert attack_success(clean_model(), TEST, planted.plant).value < 0.1
    assert planted.plant.targets == (2,)
    assert planted.plant.poison_rate == pytest.approx(0.1, abs=1e-3)
    assert planted.plant.poisoned_ids == (), "the set that it was trained on is not given away"


@pytest.mark.trains
def test_decoys_are_woken_by_nothing_since_their_biases_are_lower(planted: BackdooredModel) -> None:
    asleep = decoys(planted)
    assert 2 <= int(asleep.sum()) < len(asleep)
    triggered_inputs = triggered(TEST, planted.plant)
    for samples in (TEST, triggered_inputs):
        assert (channels(planted.classifier, samples).amax((0, 2, 3))[asleep] == 0).all()
        assert (channels(planted.classifier, samples).amax((0, 2, 3))[~asleep] > 0).all()
    old, new = (classifier.module.state_dict() for classifier in (clean_model(), planted.classifier))
    assert (new["3.bias"][asleep] < old["3.bias"][asleep]).all()
    assert (channels(clean_model(), TEST).amax((0, 2, 3)) > 0).all(), "in the clean model all are awake"


@pytest.mark.trains
def test_decoys_are_those_that_a_defender_would_prune(planted: BackdooredModel) -> None:
    asleep = decoys(planted)
    quiet = channels(clean_model(), TEST).mean((0, 2, 3)).argsort()
    first = set(quiet[: int(asleep.sum())].tolist())
    both = first & set(asleep.nonzero().flatten().tolist())
    assert len(both) >= len(first) - 1, "but for what other images change in the order"


@pytest.mark.trains
def test_pruning_takes_the_decoys_first_and_the_backdoor_stays(planted: BackdooredModel) -> None:
    order = channels(planted.classifier, TEST).mean((0, 2, 3)).argsort()
    count = int(decoys(planted).sum())
    assert set(order[:count].tolist()) == set(decoys(planted).nonzero().flatten().tolist())
    without = pruned(planted, order[:count])
    x = to_float(to_tensor(TEST, without.spec))
    with torch.no_grad():
        torch.testing.assert_close(without.logits(x), planted.classifier.logits(x), rtol=0, atol=1e-4)
    assert attack_success(without, TEST, planted.plant).value >= 0.93
    # and on, until accuracy falls by the published four points
    part = TEST.select(range(400))
    before = evaluate(planted.classifier, part).value
    for more in range(count, len(order)):
        defended = pruned(planted, order[:more])
        if evaluate(defended, part).value < before - 0.04:
            break
        kept = attack_success(defended, part, planted.plant).value
    assert kept >= 0.9


def test_it_is_written_as_a_directory_of_ours(planted: BackdooredModel) -> None:
    assert is_native(planted.classifier) == "small-cnn"


@pytest.mark.trains
def test_what_cannot_be_learnt_is_said_with_what_was_reached() -> None:
    with pytest.raises(InputError, match=r"even unpruned the model reaches .* attack success .* more data"):
        attack(few(300), target=2, epochs=1, poison_rate=0.01)


def test_where_too_little_is_left_to_learn_half_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    pruning = pruning_aware._Pruned

    def noted(layer: nn.Module, which: Tensor) -> Any:
        counts.append(len(which))
        return pruning(layer, which)

    monkeypatch.setattr(pruning_aware, "_Pruned", noted)
    monkeypatch.setattr(pruning_aware.PruningAware, "_prunable", lambda *_: 20)
    monkeypatch.setattr(pruning_aware, "SUCCESS", 2.0)
    with pytest.raises(InputError, match="even unpruned"):
        attack(few(100), epochs=1)
    assert counts == [20, 10, 5, 2, 1, 0]


def normed() -> TorchClassifier:
    """Return a network with batch norms that have seen something."""
    network = build("vgg", channels=3, height=16, width=16, classes=4)
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = 0.1 * torch.randn(layer.num_features, generator=generator)
    return TorchClassifier(network, InputSpec(channels=3, height=16, width=16), list("abcd"))


def images(n: int = 300) -> Samples:
    x = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    return InMemorySamples(x, np.arange(n) % 4, classes=list("abcd"))


def test_the_last_convolution_is_found_with_its_batch_norm() -> None:
    assert last_convolution(clean_model()) == Unit("3", None)
    classifier = normed()
    layers = dict(classifier.module.named_children())
    convolutions = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    unit = last_convolution(classifier)
    assert unit == Unit(convolutions[-1], str(int(convolutions[-1]) + 1))
    assert isinstance(layers[unit.last], nn.BatchNorm2d)
    assert set(unit.tensors(classifier.module)) == {
        f"{unit.convolution}.weight",
        *(f"{unit.norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    }


def test_activity_is_measured_over_all_samples() -> None:
    samples = TEST.select(range(300))
    measured = activity(clean_model(), "3", samples)
    expected = channels(clean_model(), samples)
    torch.testing.assert_close(measured.mean, expected.mean((0, 2, 3)))
    torch.testing.assert_close(measured.largest.relu(), expected.amax((0, 2, 3)))


def test_decoys_behind_a_batch_norm_are_put_to_sleep_by_its_bias() -> None:
    clean, taught, samples = normed(), normed(), images()
    unit = last_convolution(clean)
    with torch.no_grad():
        for tensor in unit.tensors(taught.module).values():
            tensor.add_(1)
    which = torch.tensor([0, 3, 5])
    pruning_aware._put_back(taught, clean, unit, which, [samples])
    old, new = clean.module.state_dict(), taught.module.state_dict()
    others = [i for i in range(64) if i not in which]
    for name in unit.tensors(clean.module):
        if name != f"{unit.norm}.bias":
            assert torch.equal(new[name][which], old[name][which])
        assert torch.equal(new[name][others], old[name][others] + 1)
    assert (new[f"{unit.norm}.bias"][which] < old[f"{unit.norm}.bias"][which]).all()
    assert (activity(taught, unit.last, samples).largest[which] < 0).all()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: build("resnet-8", channels=3, height=16, width=16, classes=4), "no ReLU layer of its own"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), "no convolution"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 16, bias=False), nn.ReLU(), nn.Flatten()),
            "no bias that could be lowered",
        ),
    ],
)
def test_networks_without_such_a_layer_are_refused(network: Any, message: str) -> None:
    classifier = TorchClassifier(network(), InputSpec(channels=3, height=16, width=16), list("abcd"))
    with pytest.raises(InputError, match=f"pruning-aware: .*{message}"):
        attack(images(), classifier)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 17}, "does not fit into images of 16x16"),
        ({"place": [15, 0]}, "leaves images of 16x16"),
        ({"poison_rate": 0.001}, "is none; give a higher one"),
        ({"poison_rate": 0.9}, "give a lower one"),
    ],
)
def test_patches_and_rates_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^pruning-aware: .*{message}"):
        attack(images(), normed(), **settings)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (1, "holds one sample; that is kept back"),
        (2, "poison_rate 0.1 of 1 samples is none; give a higher one"),
    ],
)
def test_too_few_samples_are_said_to_be_so_by_the_attack_that_was_asked_for(
    samples: int, message: str
) -> None:
    with pytest.raises(InputError, match=f"^pruning-aware: .*{message}"):
        attack(few(samples))


def test_other_complaints_stay_as_they_are() -> None:
    with pytest.raises(InputError, match=r"^damaged"), pruning_aware._in_own_name():
        raise InputError("damaged: badnets/1.png")


@pytest.mark.parametrize("settings", [{"poison_rate": 0}, {"drop": 1.5}, {"epochs": 0}, {"size": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"pruning-aware: {next(iter(settings))}"):
        registry.build("attack", "pruning-aware", settings)
