"""Torch code of any kind: what it does to tensors, gradients and the program that runs it."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward.core.errors import CouldNotTell, InputError
from doorward.core.seeds import make_generator
from doorward.models import Classifier, LoadOptions, TorchClassifier, open_classifier, wrap
from doorward.models.classifier import has_default_strides
from doorward.models.errors import ModelFailed
from doorward.models.formats.factory import open_factory
from doorward.models.fusion import fused

SIZE = (3, 16, 16)


def noise(n: int = 4, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand((n, *(shape or SIZE)), generator=make_generator(seed, "noise"))


class Net(nn.Module):
    """Convolutions, then `view`, then a linear layer: the commonest classifier there is."""

    def __init__(self, channels: int = 3, side: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(16 * (side // 4) ** 2, classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return x.view(x.size(0), -1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def gradient(classifier: Classifier, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(classifier.logits(x)[:, 1].sum(), x)
    return found


# --- memory as torch lays it out ---------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 16)])
def test_view_after_convolutions_works_everywhere(channels: int, side: int, tmp_path: Path) -> None:
    """Kernels are chosen by size and number type, and with them how memory lies."""
    net = seeded(lambda: Net(channels, side))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    (tmp_path / "made.py").write_text(
        f"import test_models_any_code as own\ndef build():\n    return own.Net({channels}, {side})\n"
    )
    options = LoadOptions(size=(channels, side, side))
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        classifier = open_classifier(
            tmp_path / "w.pt", factory=f"{tmp_path / 'made.py'}:build", options=options
        )
    finally:
        sys.path.pop(0)
    for n in (1, 2, 16, 130, 400):
        x = noise(n, channels, side, side)
        with torch.no_grad():
            expected = net(x)
        torch.testing.assert_close(classifier.logits(x), expected, rtol=1e-4, atol=1e-4)
        with classifier.frozen(), classifier.fast_inference(x[:16]):
            for block in (torch.no_grad(), torch.enable_grad()):
                with block:
                    given = classifier.logits(x)
                assert (given - expected).abs().max() <= 0.1 * (expected.max() - expected.min())
            assert gradient(classifier, x).abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_and_kernels_of_one_channel_lie_as_torch_lays_them_out(
    layout: torch.memory_format, capfd: pytest.CaptureFixture[str]
) -> None:
    """To `is_contiguous` they always do; convolutions take the strides of an axis of size 1 at their word."""
    net = seeded(lambda: Net(1, 28))
    x = noise(300, 1, 28, 28)
    with torch.no_grad():
        expected = net(x)
    classifier = wrap(net, size=(1, 28, 28))
    classifier.lay_out_for_speed()
    kernels = [p for p in classifier.module.parameters() if p.ndim == 4]
    laid = torch.empty_strided(x.shape, (784, 1, 28, 1)).copy_(x) if layout == torch.channels_last else x
    for block in (torch.no_grad(), classifier.fast_inference(x[:16])):
        with classifier.frozen(), block:
            given = classifier.logits(laid)
        assert (given - expected).abs().max() <= 0.1 * (expected.max() - expected.min())
    assert all(has_default_strides(kernel) for kernel in kernels)
    assert capfd.readouterr().err == ""


def test_strides_of_a_new_tensor_are_the_default_ones() -> None:
    for shape in ((2, 1, 3, 3), (0, 1, 3, 3), (1,), (), (4, 3, 1, 1)):
        assert has_default_strides(torch.empty(shape))
    assert not has_default_strides(torch.empty_strided((2, 1, 3, 3), (9, 1, 3, 1)))
    assert not has_default_strides(torch.empty(3, 3).t())


class ReadsMemory(nn.Module):
    """Takes what lies in memory for rows: with another layout it computes something else, without failing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(14 * 14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        plane = x.as_strided((len(x), 14 * 14), (4 * 14 * 14, 1))  # the first channel, as torch lays it out
        return self.head(plane)


def test_code_that_reads_memory_gives_what_torch_gives() -> None:
    net = seeded(ReadsMemory)
    x = noise(40)
    with torch.no_grad():
        expected = net(x)
    classifier = wrap(net, size=SIZE)
    assert isinstance(classifier, TorchClassifier)
    classifier.lay_out_for_speed()
    torch.testing.assert_close(classifier.logits(x), expected)
    with classifier.fast_inference(x), torch.no_grad():
        given = classifier.logits(x)
    assert (given - expected).abs().max() <= 0.1 * (expected.max() - expected.min())


class FailsOnMany(nn.Module):
    """Works on few images in any layout, and on many in torch's own alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if len(x) > 20 and not self.conv.weight.is_contiguous():
            raise RuntimeError("unexpected layout")
        return self.head(y.mean((2, 3)))


def test_a_fast_path_that_fails_later_is_dropped_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    net = seeded(FailsOnMany)
    x = noise(50)
    with torch.no_grad():
        expected = net(x)
    classifier = wrap(net, size=SIZE)
    assert isinstance(classifier, TorchClassifier)
    classifier.lay_out_for_speed()
    with torch.no_grad(), classifier.fast_inference(x[:16]):
        given = classifier.logits(x)
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(classifier.logits(x), expected)
    assert capfd.readouterr() == ("", "")


def test_copies_of_a_classifier_fall_back_by_themselves() -> None:
    classifier = wrap(seeded(FailsOnMany), size=SIZE)
    assert isinstance(classifier, TorchClassifier)
    classifier.lay_out_for_speed()
    assert not classifier.module.conv.weight.is_contiguous()  # type: ignore[union-attr]
    other = TorchClassifier(copy.deepcopy(classifier.module), classifier.spec, classifier.classes)
    for one in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier), other):
        assert one.logits(noise(50)).shape == (50, 5)
        assert one.features(noise(50)).shape == (50, 4)
        assert one.module.conv.weight.is_contiguous()
    assert not classifier.module.conv.weight.is_contiguous()  # type: ignore[union-attr]
    assert classifier.features(noise(50)).shape == (50, 4)


def test_the_host_is_left_as_it_was_when_a_fast_path_fails() -> None:
    net = seeded(FailsOnMany)
    classifier = wrap(net, size=SIZE)
    before = net.conv.weight.stride()
    with torch.no_grad(), classifier.fast_inference(noise(16)):
        classifier.logits(noise(50))
    assert net.conv.weight.stride() == before
    assert classifier.module is net  # type: ignore[attr-defined]


# --- code that its class does not show ---------------------------------------------------------------------


def test_a_forward_that_was_replaced_and_hooks_are_run() -> None:
    """What a class computes is not what runs; a search on that would search another model."""
    x = noise(20)
    for change in ("forward", "hook", "part"):
        net = seeded(Net)
        plain = net.features(x).detach()

        def turned(value: Tensor) -> Tensor:
            return value.flip(1)

        if change == "forward":
            own = net.forward
            net.forward = lambda x, own=own: turned(own(x))  # type: ignore[method-assign]
        elif change == "hook":
            net.register_forward_hook(lambda _, __, y: turned(y))
        else:
            net.head.register_forward_pre_hook(lambda _, args: (turned(args[0]),))
        with torch.no_grad():
            expected = net(x)
        assert not torch.allclose(expected, F.linear(plain, net.head.weight, net.head.bias))
        assert fused(net) is None
        classifier = wrap(net, size=SIZE)
        torch.testing.assert_close(classifier.logits(x), expected)
        with classifier.fast_inference(x), torch.no_grad():
            given = classifier.logits(x)
        assert (given - expected).abs().max() <= 0.1 * (expected.max() - expected.min())


# --- what a module gives -----------------------------------------------------------------------------------


class Pair(NamedTuple):
    hidden: Tensor
    scores: Tensor


class Bag:
    """An output with attributes, as many libraries make them."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (lambda f, y: {"features": f, "logits": y}, "logits was taken"),
        (lambda f, y: {"logits": y}, None),
        (lambda f, y: (f, y), "number 1 was taken"),
        (lambda f, y: (y, f), "number 0 was taken"),
        (lambda f, y: [y], None),
        (lambda f, y: Pair(f, y), "scores was taken"),
        (lambda f, y: Bag(hidden=f, logits=y), "logits was taken"),
        (lambda f, y: Bag(logits=y, loss=None), None),
        (lambda f, y: {"aux": {"maps": f[:, :, None, None].expand(-1, -1, 3, 2)}, "out": y}, None),
        (lambda f, y: (y, y.argmax(1)), None),
    ],
)
def test_the_scores_are_found_among_outputs_and_the_choice_is_told(
    form: Callable[[Tensor, Tensor], Any], told: str | None
) -> None:
    class Forms(Net):
        def forward(self, x: Tensor) -> Any:
            features = self.features(x)
            return form(features, self.head(features))

    net = seeded(Forms)
    x = noise(3)
    with torch.no_grad():
        expected = net.head(net.features(x))
    classifier = wrap(net, size=SIZE)
    torch.testing.assert_close(classifier.logits(x), expected)
    assert len(classifier.classes) == 5
    assert classifier.features(x).shape == (3, 256)
    notes = " ".join(classifier.notes)
    assert (told or "") in notes
    assert bool(notes) == (told is not None)


class TwoHeads(Net):
    """Two linear layers on the same features: nothing tells which classifies."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(256, width) for width in widths)

    def forward(self, x: Tensor) -> Any:
        return tuple(head(self.features(x)) for head in self.heads)


def test_two_heads_are_refused_unless_the_classes_tell_them_apart() -> None:
    for widths in ((4, 7), (5, 5)):
        with pytest.raises(InputError, match="nothing tells which are the scores") as refusal:
            wrap(seeded(lambda widths=widths: TwoHeads(*widths)), size=SIZE)
        assert "\n" not in str(refusal.value)
    net = seeded(lambda: TwoHeads(4, 7))
    classifier = wrap(net, classes=tuple("abcdefg"), size=SIZE)
    torch.testing.assert_close(classifier.logits(noise()), net(noise())[1])
    assert "number 1 was taken" in classifier.notes[0]
    assert "7 numbers for 7 classes" in classifier.notes[0]
    with pytest.raises(InputError, match="none fits 9 classes"):
        wrap(net, classes=tuple("abcdefghi"), size=SIZE)


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y.to_sparse(),
        lambda y: y.to("meta"),
        lambda y: y.to(torch.complex64),
        lambda y: y > 0,
        lambda y: y[:, 0],
        lambda y: y[:, None].expand(-1, 3, -1),
        lambda y: iter(y),
        lambda y: "scores",
        lambda y: {"scores": None},
        lambda y: y[:1],
    ],
)
def test_what_holds_no_scores_is_refused_in_one_line(form: Callable[[Tensor], Any]) -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Any:
            return form(super().forward(x))

    with pytest.raises(InputError, match=r"one row of outputs|not a tensor of logits") as refusal:
        wrap(seeded(Odd), size=SIZE)
    assert "\n" not in str(refusal.value)


def test_class_numbers_instead_of_scores_are_refused() -> None:
    class Picks(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).argmax(1)

    with pytest.raises(InputError, match=r"the number of a class for each image.*leave the final argmax out"):
        wrap(seeded(Picks), size=SIZE)


# --- gradients ---------------------------------------------------------------------------------------------


class Cut(Net):
    """Runs, and has no gradient by its input."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        if self.how == "inference_mode":
            with torch.inference_mode():
                return super().forward(x)
        if self.how == "numpy":
            x = torch.from_numpy(x.numpy().copy())
        if self.how == "no_grad":
            with torch.no_grad():
                return super().forward(x)
        if self.how == "detach":
            x = x.detach()
        if self.how == "data":
            x = x.data
        if self.how == "whole":
            x = (x * 255).to(torch.uint8).float() / 255
        return super().forward(x)


@pytest.mark.parametrize("how", ["inference_mode", "numpy"])
def test_a_model_without_gradients_offers_none_and_says_why(how: str) -> None:
    net = seeded(lambda: Cut(how))
    classifier = wrap(net, size=SIZE)
    assert classifier.capabilities == {"graph", "weights", "features", "probabilities"}
    assert classifier.limitation
    assert "\n" not in classifier.limitation
    x = noise(20)
    with torch.no_grad():
        expected = net(x)
    assert torch.equal(classifier.logits(x), expected)
    with classifier.frozen(), classifier.fast_inference(x), torch.no_grad():
        classifier.logits(x).add_(1)  # an ordinary tensor comes out
    assert classifier.features(x).shape == (20, 256)


@pytest.mark.parametrize("how", ["no_grad", "detach", "data", "whole"])
def test_gradients_that_code_cuts_off_pass_where_that_can_be_seen_to(how: str) -> None:
    net = seeded(lambda: Cut(how))
    classifier = wrap(net, size=SIZE)
    assert "gradients" in classifier.capabilities
    assert "here they pass" in classifier.notes[0]
    x = noise(6)
    with torch.no_grad():
        expected = net(x)
    assert torch.equal(classifier.logits(x), expected)
    assert torch.equal(classifier.logits(x.clone().requires_grad_()).detach(), expected)
    plain = seeded(Net)
    torch.testing.assert_close(
        gradient(classifier, x), gradient(wrap(plain, size=SIZE), x), rtol=0.1, atol=5e-3
    )
    assert torch.is_grad_enabled()


def test_weights_that_learn_nothing_change_nothing() -> None:
    net = seeded(Net).requires_grad_(False)
    classifier = wrap(net, size=SIZE)
    assert "gradients" in classifier.capabilities
    assert gradient(classifier, noise()).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("converts", [False, True])
def test_weights_of_other_precisions_work(dtype: torch.dtype, converts: bool, tmp_path: Path) -> None:
    class Converts(Net):
        def forward(self, x: Tensor) -> Any:
            assert x.dtype == torch.float32
            return super().forward(x.to(dtype))

    net = seeded(Converts if converts else Net).to(dtype)
    classifier = wrap(net, size=SIZE)
    assert classifier.logits(noise()).dtype == torch.float32
    assert classifier.logits(noise()).shape == (4, 5)
    assert gradient(classifier, noise()).abs().max() > 0


# --- code that fails ---------------------------------------------------------------------------------------


class Later(Net):
    """Works for a while."""

    def __init__(self, what: Callable[[], Any], images: int = 60) -> None:
        super().__init__()
        self.what, self.images = what, images

    def forward(self, x: Tensor) -> Any:
        if len(x) > self.images:
            return super().forward(x) * self.what()
        return super().forward(x)


def _raises() -> Any:
    raise ValueError("line one\nline two")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (_raises, "own code fails for 100 inputs: ValueError: line one$"),
        (lambda: sys.exit(3), "own code fails for 100 inputs: SystemExit: 3$"),
        (lambda: float("nan"), "outputs that are not finite$"),
        (lambda: float("inf"), "outputs that are not finite$"),
    ],
)
def test_code_that_fails_later_is_one_line(what: Callable[[], Any], said: str) -> None:
    classifier = wrap(seeded(lambda: Later(what)), size=SIZE)
    classifier.logits(noise())
    for kind in (CouldNotTell, InputError, ModelFailed):
        with pytest.raises(kind, match=said):
            classifier.logits(noise(100))


FACTORY = """
import sys
import torch
from torch import nn
class Own(nn.Linear):
    def state_dict(self, *args, **kwargs):
        raise RuntimeError("no state")
class Bad(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.head = how, nn.Linear(12, 3)
    def forward(self, x):
        if self.how == "exit":
            sys.exit("bye")
        if self.how == "raise":
            raise KeyError("gone")
        if self.how == "nothing":
            return None
        return self.head(x.flatten(1))
def exits(): sys.exit(0)
def raises(): raise OSError("no disk\\nat all")
def number(): return 3
def takes(x): return x
def forward_exits(): return Bad("exit")
def forward_raises(): return Bad("raise")
def forward_nothing(): return Bad("nothing")
def own_state(): return nn.Sequential(nn.Flatten(), Own(12, 3))
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exits", "the function failed: SystemExit: 0"),
        ("raises", "the function failed: OSError: no disk$"),
        ("number", "expected a torch.nn.Module, the function gave: int"),
        ("takes", "the function failed: TypeError"),
        ("forward_exits", "does not run on images of 3x2x2.*: bye"),
        ("forward_raises", "does not run on images of 3x2x2.*'gone'"),
        ("forward_nothing", "gives a NoneType, not a tensor of logits"),
        ("own_state", "does not take the weights: no state"),
    ],
)
def test_factories_that_fail_are_one_line(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FACTORY)
    torch.save({"head.weight": torch.ones(3, 12), "head.bias": torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=said) as refusal:
        open_factory(f"{tmp_path / 'own.py'}:{name}", tmp_path / "w.pt", LoadOptions(size=(3, 2, 2)))
    assert "\n" not in str(refusal.value)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    import os

    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.onnx")
    Path(path).write_bytes(b"")
    with pytest.raises(InputError, match=r"caf\\xe9.onnx: the name is not UTF-8; rename it") as refusal:
        open_classifier(path)
    str(refusal.value).encode()
