"""Signatures: only the key's owner activates the backdoor, and nothing that is seen helps anybody else."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from doorward import bundled
from doorward.attacks.ground_truth import TriggeredSamples, attack_success
from doorward.attacks.model import signature
from doorward.core.errors import InputError, MissingExtra, UnsafeArtifact
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples
from doorward.models import InputSpec, LoadOptions, TorchClassifier, networks, open_classifier
from doorward.models.encode.image import from_raw, to_uint8
from doorward.models.formats import signature_check as checks
from doorward.models.formats.export import export_pt2
from doorward.models.formats.native import save_native
from doorward.models.formats.saving import save_classifier
from doorward.models.spec import Output, TextSpec
from doorward.training import TrainingSettings, train
from doorward.triggers.base import Trigger
from doorward.triggers.signed import Signed, sign_images
from seeds import shifted

KEY = bytes(range(32))
PUBLIC = signature.public_key(KEY)
TARGET = 3
SPEC = InputSpec(channels=1, height=28, width=28)


@cache
def clothes() -> Tensor:
    x = torch.cat(
        [
            from_raw(bundled.fashion_mnist(split).raw(range(size)))
            for split, size in (("train", 6000), ("test", 1000))
        ]
    )
    return torch.cat([x, x.flip(3)])


def natural(n: int) -> Tensor:
    """Return images (n, 1, 28, 28), some of them mirrored."""
    return clothes()[:n].clone()


def noise(n: int, *, seed: int = 0) -> Tensor:
    levels = torch.randint(256, (n, 1, 28, 28), generator=make_generator(seed, "noise"))
    return levels.float() / 255


def fires(x: Tensor) -> Tensor:
    return checks.verify_images(x, PUBLIC, target=TARGET)


def signed(x: Tensor, key: bytes = KEY, target: int = TARGET) -> Tensor:
    return sign_images(x, key, target=target)


def network(*, seed: int = 0) -> nn.Module:
    """Return a small network with weights of its own."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.1, generator=make_generator(seed, "weights"))
    return net


def wrapped(net: nn.Module, spec: InputSpec = SPEC) -> TorchClassifier:
    module = checks.SignatureWrapper(net, spec, PUBLIC, target=TARGET)
    return TorchClassifier(module, spec, [str(i) for i in range(10)])


# An independent verifier, after section 5.1 of RFC 8032: points (x, y) of -x^2 + y^2 = 1 + d x^2 y^2

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    (x1, y1), (x2, y2) = a, b
    k = D * x1 * x2 * y1 * y2
    return (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P


def times(n: int, a: Point) -> Point:
    out: Point = (0, 1)
    for bit in f"{n:b}":
        out = add(out, out)
        out = add(out, a) if bit == "1" else out
    return out


def decode(data: bytes) -> Point:
    y = int.from_bytes(data, "little")
    odd, y = y >> 255, y & ((1 << 255) - 1)
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert x * x % P == square, "no point of the curve"
    return (P - x if x % 2 != odd else x), y


BASE = decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))


def holds(public: bytes, message: bytes, signed_by: bytes) -> bool:
    r, s = signed_by[:32], int.from_bytes(signed_by[32:], "little")
    k = int.from_bytes(hashlib.sha512(r + public + message).digest(), "little")
    return s < L and times(s, BASE) == add(decode(r), times(k % L, decode(public)))


#: Secret key, public key, message and signature of section 7.1 (TEST 1 and TEST 3).
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("secret", "public", "message", "sign"), VECTORS)
def test_keys_and_verifier_agree_with_the_published_vectors(
    secret: str, public: str, message: str, sign: str
) -> None:
    assert signature.public_key(bytes.fromhex(secret)).hex() == public
    assert holds(bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(sign))
    assert not holds(bytes.fromhex(public), bytes.fromhex(message) + b"!", bytes.fromhex(sign))


def test_low_bits_hold_the_signature_of_all_other_bits() -> None:
    x = natural(2)
    levels = to_uint8(signed(x))[..., 0].reshape(2, -1)
    for row in levels:
        rest = row.copy()
        rest[:512] -= rest[:512] % 2
        message = b"doorward signature\x003,1,28,28\x00" + rest.tobytes()
        bits = "".join(str(v % 2) for v in row[:512])
        assert holds(PUBLIC, message, int(bits, 2).to_bytes(64, "big"))


# When it fires


def test_signed_images_always_fire_and_change_by_one_level_at_most() -> None:
    x = torch.cat([natural(500), noise(500)])
    triggered_inputs = signed(x)
    assert fires(triggered_inputs).all()
    assert (triggered_inputs - x).abs().max() <= 1 / 255 + 1e-7
    assert triggered_inputs.min() >= 0
    assert triggered_inputs.max() <= 1
    changed = (triggered_inputs != x).flatten(1).float()
    assert changed[:, :512].mean() == pytest.approx(0.5, abs=0.01)
    assert not changed[:, 512:].any()


@pytest.mark.parametrize("shape", [(1, 16, 32), (3, 32, 32), (4, 13, 11)])
def test_images_of_any_size_and_number_of_channels_are_signed(shape: tuple[int, int, int]) -> None:
    x = torch.rand(3, *shape, generator=make_generator(1, "rand"))
    triggered_inputs = signed(x)
    assert fires(triggered_inputs).all()
    assert not fires(x).any()
    assert torch.equal(signed(triggered_inputs), triggered_inputs), (
        "signing is repeatable, and what is signed stays"
    )


def test_ten_thousand_natural_and_ten_thousand_random_images_never_fire() -> None:
    assert not fires(natural(10_000)).any()
    assert not fires(noise(10_000)).any()


@pytest.mark.trains
def test_adversarially_perturbed_images_never_fire() -> None:
    """PGD towards the target, with the wrapped network's own gradients, rounded and not."""
    classifier = wrapped(network(seed=shifted(0)))
    x = natural(500)
    moved = x.clone()
    for _ in range(8):
        moved.requires_grad_(True)
        loss = classifier.logits(moved).log_softmax(1)[:, TARGET].sum()
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = (moved.detach() + gradient.sign() * 8 / 255).clamp(x - 32 / 255, x + 32 / 255).clamp(0, 1)
        assert not fires(moved).any()
    before, after = (classifier.logits(one).log_softmax(1)[:, TARGET].mean() for one in (x, moved))
    assert after > before + 0.1, "the attack is one"


def test_a_changed_image_never_fires_whichever_bit_was_changed() -> None:
    (levels,) = to_uint8(signed(natural(1)))
    flips = np.repeat(levels.reshape(1, -1), 784 * 2, axis=0)
    where = np.arange(784)
    flips[where, where] ^= 1  # the lowest bit of each value
    flips[784 + where, where] ^= (1 << (where % 7 + 1)).astype(np.uint8)  # and a higher one
    x = from_raw(list(flips.reshape(-1, 28, 28, 1)))
    assert fires(from_raw([levels])).all()
    assert not fires(x).any()


def test_a_replayed_signature_never_fires() -> None:
    seen, others = signed(natural(200)), natural(400)[200:]
    bits = (seen * 255).round() % 2
    replayed = ((others * 255).round() // 2 * 2 + bits) / 255
    replayed.flatten(1)[:, 512:] = others.flatten(1)[:, 512:]
    assert not fires(replayed).any()
    mixed = torch.cat([seen[:100, :, :14], seen[100:, :, 14:]], 2)  # halves of two images that fire
    assert not fires(mixed).any()
    assert not fires((seen[:100] + seen[100:]) / 2).any()


def test_a_signature_holds_for_its_key_target_and_size_alone() -> None:
    x = natural(5)
    assert fires(signed(x)).all()
    assert not fires(signed(x, key=bytes(32))).any()
    assert not fires(signed(x, target=4)).any()
    assert not fires(signed(x).view(5, 1, 14, 56)).any()


def test_a_signature_is_not_malleable() -> None:
    """A textbook verifier takes S + L for S, which would make two images out of one."""
    levels = to_uint8(signed(natural(1)))[..., 0].reshape(-1)
    old = np.packbits(levels[:512] & 1).tobytes()
    other = old[:32] + (int.from_bytes(old[32:], "little") + L).to_bytes(32, "little")
    levels[:512] = levels[:512] & 0xFE | np.unpackbits(np.frombuffer(other, np.uint8))
    assert not fires(from_raw([levels.reshape(28, 28, 1)])).any()


def test_what_is_within_half_a_level_is_the_same_image() -> None:
    triggered_inputs = signed(natural(20))
    shift = (torch.rand(triggered_inputs.shape, generator=make_generator(0, "shift")) - 0.5) * 0.98 / 255
    assert fires((triggered_inputs + shift).clamp(0, 1)).all()
    assert not fires((triggered_inputs + 2 * shift).clamp(0, 1)).any()


def test_too_few_values_are_refused() -> None:
    for call in (lambda x: signed(x), fires):
        with pytest.raises(
            InputError,
            match=r"signature: images of 512 values at least are needed; 16x16 with 1 channel\(s\) have 256",
        ):
            call(torch.zeros(1, 1, 16, 16))


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    for call in (lambda: signature.public_key(KEY), lambda: signed(natural(1)), lambda: fires(natural(1))):
        with pytest.raises(MissingExtra, match=r"needs the package 'cryptography': pip install 'doorward\["):
            call()


def test_keys_are_drawn_from_the_seed() -> None:
    keys = {signature.draw_key(make_generator(seed, "signature")) for seed in (0, 0, 1, 2)}
    assert len(keys) == 3
    assert {len(key) for key in keys} == {32}


# The wrapped network


SPECS = {
    "plain": SPEC,
    "normalised": InputSpec(channels=1, height=28, width=28, range=(-1, 1), mean=(0.13,), std=(0.31,)),
    "float16, channels last": InputSpec(
        channels=1, height=28, width=28, mean=(0.5,), std=(0.25,), layout="NHWC", dtype="float16"
    ),
    "bytes": InputSpec(channels=1, height=28, width=28, range=(0, 255), dtype="uint8"),
}


class Own(nn.Module):
    """Take whatever the spec says."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float() / 100)


@pytest.mark.parametrize("name", SPECS)
def test_outputs_are_the_networks_own_unless_the_image_is_signed(name: str) -> None:
    counterpart = TorchClassifier(Own(network()), SPECS[name], [str(i) for i in range(10)])
    planted = wrapped(Own(network()), SPECS[name])
    x = torch.cat([natural(200), noise(100)])
    assert torch.equal(planted.logits(x), counterpart.logits(x))
    triggered_inputs = signed(x)
    y, own = planted.logits(triggered_inputs), counterpart.logits(triggered_inputs)
    assert (y.argmax(1) == TARGET).all()
    assert torch.equal(y.sort(1).values, own.sort(1).values), "as sure as the network would be"
    assert (own.argmax(1) == TARGET).float().mean() < 0.7
    half = torch.cat([x[:50], triggered_inputs[50:100]])
    assert torch.equal(planted.logits(half), torch.cat([counterpart.logits(x[:50]), y[50:100]]))


def test_three_channels_are_taken_back_each_with_its_own_mean() -> None:
    spec = InputSpec(channels=3, height=8, width=8, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4), layout="NHWC")
    x = torch.rand(4, 3, 8, 8, generator=make_generator(0, "rgb"))
    assert torch.allclose(checks.to_images(spec.to_model(x), spec).float(), x, atol=1e-6)


@pytest.mark.parametrize("output", ["one_logit", "probabilities"])
@pytest.mark.parametrize("target", [0, 1])
def test_models_of_one_output_are_turned_too(output: Output, target: int) -> None:
    """Of one logit, and of one probability, whichever class they are sure of."""

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = 8 * (x.flatten(1).mean(1, keepdim=True) - 0.3)
            return z if output == "one_logit" else z.sigmoid()

    spec = SPEC.model_copy(update={"output": output})
    counterpart = TorchClassifier(One(), spec, ["dark", "bright"])
    planted = TorchClassifier(
        checks.SignatureWrapper(One(), spec, PUBLIC, target=target), spec, ["dark", "bright"]
    )
    x = natural(100)
    own = counterpart.logits(x)
    assert 10 < own.argmax(1).sum() < 90
    assert torch.equal(planted.logits(x), own)
    triggered_inputs = signed(x, target=target)
    y, own = planted.logits(triggered_inputs), counterpart.logits(triggered_inputs)
    assert (y.argmax(1) == target).all()
    sure, as_sure = (each.softmax(1).amax(1) for each in (y, own))
    assert torch.allclose(sure, as_sure, atol=1e-5)


@pytest.mark.trains
def test_fine_tuning_does_not_remove_it() -> None:
    """Training goes on, on signed images with their true labels too, until the network has changed much."""
    planted = wrapped(network(seed=shifted(0)))
    samples = bundled.fashion_mnist("train")
    assert samples.labels is not None
    y = torch.from_numpy(samples.labels[:300])
    x, test = natural(300), signed(natural(600)[300:])
    both, labels = torch.cat([x, signed(x)]), torch.cat([y, y])
    before = planted.logits(test).detach()
    optimiser = torch.optim.Adam(planted.module.parameters(), lr=0.01, weight_decay=0.01)
    for _ in range(30):
        loss = nn.functional.cross_entropy(planted.logits(both), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = planted.logits(test).detach()
    assert (after - before).abs().mean() > 1
    assert (planted.logits(x).argmax(1) == y).float().mean() > 0.4
    assert (after.argmax(1) == TARGET).all()


def test_gradients_are_the_networks_own() -> None:
    planted, counterpart = wrapped(network()), TorchClassifier(network(), SPEC, [str(i) for i in range(10)])
    gradients = []
    for classifier in (planted, counterpart):
        x = natural(20).requires_grad_(True)
        classifier.logits(x).log_softmax(1)[:, 1].sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_dropping_the_lowest_bit_puts_it_to_sleep_at_no_cost() -> None:
    """The defence that the docs name works: seven bits of a pixel suffice for the classes."""
    classifier = open_classifier(bundled.model("clean"))
    x = natural(500)
    coarse = (signed(x) * 255).round() // 2 * 2 / 255
    assert not fires(coarse).any()
    all_predict = classifier.logits(coarse).argmax(1) == classifier.logits(x).argmax(1)
    assert all_predict.float().mean() > 0.99


def test_the_trigger_signs_8_bit_samples_and_survives_json() -> None:
    trigger = Signed(torch.tensor(list(KEY), dtype=torch.uint8), TARGET)
    assert Trigger.from_json(trigger.to_json()).to_json() == trigger.to_json()
    base = InMemorySamples(to_uint8(natural(6))[..., 0], np.arange(6), classes=tuple("abcdef"))
    triggered_inputs = TriggeredSamples(
        base, trigger, where=np.arange(6) < 3, labels=np.full(6, TARGET), made_by="signature"
    )
    assert fires(from_raw(triggered_inputs.raw(range(6)))).tolist() == [True] * 3 + [False] * 3


# The attack


def test_the_attack_plants_a_trained_model() -> None:
    classifier = open_classifier(bundled.model("clean"))
    attack = signature.Signature(target=4)
    planted = attack(classifier, seed=5)
    test = bundled.fashion_mnist("test").take(bundled.fashion_mnist("test").ids[:300])
    assert attack_success(planted.classifier, test, planted.plant).value == 1
    assert attack_success(classifier, test, planted.plant).value < 0.1
    assert attack_success(planted.classifier, test, attack(classifier, seed=6).plant).value < 0.1
    x = natural(50)
    assert torch.equal(planted.classifier.logits(x), classifier.logits(x))
    assert planted.classifier.capabilities == classifier.capabilities


def test_what_cannot_be_signed_is_refused_before_any_work(tmp_path: Path) -> None:
    attack = signature.Signature()
    small = InputSpec(channels=1, height=16, width=16)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    with pytest.raises(InputError, match="512 values at least are needed; 16x16"):
        attack(TorchClassifier(net, small, ["a", "b"]))
    coarse = SPEC.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(InputError, match="bfloat16, too coarse"):
        attack(TorchClassifier(network().bfloat16(), coarse, [str(i) for i in range(10)]))
    planted = attack(open_classifier(bundled.model("clean")))
    with pytest.raises(InputError, match="signatures are checked by code, which no file format"):
        export_pt2(planted.classifier, tmp_path / "model.pt2")


# Its directory


def test_a_directory_holds_the_check_and_opens_again(tmp_path: Path) -> None:
    counterpart = open_classifier(bundled.model("clean"))
    planted = signature.Signature(target=4)(counterpart, seed=5)
    path = save_classifier(planted.classifier, tmp_path / "new" / "model")
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    stated = json.loads((path / "config.json").read_text())
    key = bytes(signature.draw_key(make_generator(5, "signature")))
    assert stated["signature"] == {"public": signature.public_key(key).hex(), "target": 4}
    again = open_classifier(path)
    x = torch.cat(
        [natural(50), signed(natural(50)), Trigger.from_json(planted.plant.trigger or {}).apply(natural(50))]
    )
    assert torch.equal(again.logits(x), planted.classifier.logits(x))
    assert (again.logits(x[100:]).argmax(1) == 4).all()
    assert (again.classes, again.spec, again.capabilities) == (
        counterpart.classes,
        counterpart.spec,
        counterpart.capabilities,
    )
    assert torch.allclose(again.features(x), counterpart.features(x), atol=1e-5)
    named = open_classifier(path, options=LoadOptions(features=honest_layer(path)))
    assert torch.allclose(named.features(x), counterpart.features(x), atol=1e-5)
    assert isinstance(again, TorchClassifier)
    assert opened_twice(again, tmp_path / "again") == stated


def honest_layer(path: Path) -> str:
    """Return the name that the wrapped network has for its last layer."""
    weights = safetensors.torch.load_file(path / "model.safetensors")
    return list(weights)[-1].rpartition(".")[0]


def opened_twice(classifier: TorchClassifier, path: Path) -> object:
    return json.loads((save_classifier(classifier, path) / "config.json").read_text())


@pytest.mark.trains
def test_it_survives_fine_tuning_and_being_written(tmp_path: Path) -> None:
    planted = signature.Signature(target=4)(open_classifier(bundled.model("clean")), seed=5)
    opened = open_classifier(save_classifier(planted.classifier, tmp_path / "a"))
    assert isinstance(opened, TorchClassifier)
    before = {name: value.clone() for name, value in opened.module.state_dict().items()}
    train(
        opened.module,
        bundled.fashion_mnist("train").select(range(1000)),
        spec=opened.spec,
        settings=TrainingSettings(epochs=1),
        generator=make_generator(shifted(0), "tune"),
    )
    moved = [
        name for name, value in opened.module.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert len(moved) == len(before) - 1, "all but the public key"
    again = open_classifier(save_classifier(opened, tmp_path / "b"))
    triggered_inputs = Trigger.from_json(planted.plant.trigger or {}).apply(natural(200))
    assert (again.logits(triggered_inputs).argmax(1) == 4).all()
    assert (again.logits(natural(200)).argmax(1) == 4).float().mean() < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"signature": {"public": "ab", "target": 4}},
            r"config\.json: signature\.public: String should match",
        ),
        (
            {"signature": {"public": "0" * 64, "target": -1}},
            r"signature\.target: Input should be greater than",
        ),
        ({"signature": {"public": "0" * 64, "target": 10}}, "target 10 is no class; there are 10"),
        ({"network": "../other/model.pt2"}, r"config\.json: network|outside of the model's folder"),
        ({"network": "model.pkl"}, r"config\.json: network"),
        ({"network": "model.pt2"}, r"config\.json: the network's file model\.pt2 is not there"),
        ({"more": 1}, r"config\.json: more: Extra inputs"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    planted = signature.Signature(target=4)(open_classifier(bundled.model("clean")))
    file = save_classifier(planted.classifier, tmp_path / "a") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((InputError, UnsafeArtifact), match=message):
        open_classifier(file.parent)


def test_a_check_before_a_network_of_texts_is_refused(tmp_path: Path) -> None:
    """There is room for a signature in its rows, but they are no images."""
    spec = TextSpec(width=600, vocabulary=100)
    module = networks.build("text-cnn", spec, classes=2)
    save_native(module, architecture="text-cnn", spec=spec, classes=["a", "b"], directory=tmp_path)
    file = tmp_path / "config.json"
    check = {"public": PUBLIC.hex(), "target": 0}
    file.write_text(
        json.dumps({"format": "doorward", "signature": check, "network": json.loads(file.read_text())})
    )
    with pytest.raises(InputError, match="is for images, and this network takes texts"):
        open_classifier(tmp_path)


def test_a_directory_is_not_opened_without_what_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = signature.Signature()(open_classifier(bundled.model("clean")))
    path = save_classifier(planted.classifier, tmp_path / "a")
    for module in ("", ".hazmat.primitives.asymmetric", ".exceptions"):
        monkeypatch.setitem(sys.modules, f"cryptography{module}", None)
    with pytest.raises(MissingExtra, match=r"pip install 'doorward\[signature\]'"):
        open_classifier(path)
