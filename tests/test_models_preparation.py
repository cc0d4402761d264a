"""Before a search: whether outputs tell, whether gradients carry, and one scale for all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from doorward.core.errors import CouldNotTell
from doorward.core.seeds import make_generator
from doorward.models import Classifier, InputSpec, TorchClassifier, networks, open_classifier, wrap
from doorward.models import preparation as preparation_module
from doorward.models.batching import batched_logits
from doorward.models.classifier import to_levels
from doorward.models.gradients import check_gradients, straight_through
from doorward.models.logit_scale import USUAL_SPREAD, measure_logit_scale
from doorward.models.output_check import check_logits, check_outputs
from doorward.models.preparation import prepared
from doorward.models.straight_through import StraightThrough

SIZE = (3, 16, 16)
SPEC = InputSpec(channels=3, height=16, width=16)
CLASSES = 4


@pytest.fixture
def always_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no spread of logits be usual, so that all are brought to one scale."""
    monkeypatch.setattr(preparation_module, "USUAL", (float("inf"), 0.0))


def noise(n: int = 24, seed: int = 0) -> Tensor:
    return torch.rand((n, *SIZE), generator=make_generator(seed, "noise"))


class Net(nn.Module):
    """A small network between what is done to the image and what is done to the scores."""

    def __init__(
        self, begin: Callable[[Tensor], Tensor] = lambda x: x, end: Callable[[Tensor], Tensor] = lambda z: z
    ) -> None:
        super().__init__()
        self.begin, self.end = begin, end
        self.body = networks.build("small-cnn", SPEC, classes=CLASSES)
        with torch.no_grad():
            for p in self.body.parameters():
                p.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(self.begin(x)))


def classifier_of(
    begin: Callable[[Tensor], Tensor] = lambda x: x, **end: Callable[[Tensor], Tensor]
) -> Classifier:
    return wrap(Net(begin, **end).eval(), size=SIZE)


def gradient(classifier: Classifier, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(classifier.logits(x)[:, 1].sum(), x)
    return found


# --- gradients ---------------------------------------------------------------------------------------------

#: Ways to round an image in a network that leave real images, of 8 bits, as they are or nearly so.
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "256 levels": lambda x: torch.round(x * 255) / 255,
    "16 levels": lambda x: (x * 15).round() / 15,
    "floor": lambda x: torch.floor(x * 255 + 0.5) / 255,
    "ceil": lambda x: torch.ceil(x * 255 - 0.5) / 255,
    "whole numbers": lambda x: (x * 255 + 0.5).to(torch.uint8).float() / 255,
    "integer division": lambda x: (x * 255).int() / 255,
    "masked bits": lambda x: torch.bitwise_and((x * 255).to(torch.int64), 240).float() / 255,
    "detached": lambda x: torch.round(x.detach() * 255) / 255,
}


@pytest.mark.parametrize("name", list(ROUNDINGS))
def test_rounding_in_a_torch_module_is_noticed_and_passed_through(name: str) -> None:
    net = Net(ROUNDINGS[name]).eval()
    classifier = TorchClassifier(net, SPEC, list("abcd"))
    images = to_levels(noise())
    found = check_gradients(classifier, images)
    assert found.reason is not None
    assert "no usable gradients" in found.reason
    classifier = wrap(net, size=SIZE)
    with torch.no_grad():
        expected = net(images)
    before = classifier.module  # type: ignore[attr-defined]
    with prepared(classifier, images) as preparation:
        assert preparation.gradients.reason is None
        assert preparation.reason is None
        told = [note for note in (*classifier.notes, *preparation.notes) if "8 bits" not in note]
        assert len(told) == 1
        assert classifier.eight_bit, "a model that rounds its input is sent what users send"
        given = classifier.raw_logits(images.clone().requires_grad_()).detach()
        assert torch.equal(given, expected), "outputs stay what they are, to the last digit"
        direction = gradient(classifier, images)
    assert classifier.module is before  # type: ignore[attr-defined]
    plain = gradient(wrap(Net().eval(), size=SIZE), images)
    a, b = direction.flatten(), plain.flatten()
    assert float(a @ b / (a.norm() * b.norm())) > 0.7


def rounded_graph(kind: str, path: Path) -> Path:
    """Write a network with a rounded input as an ONNX file."""
    weight = torch.randn((768, CLASSES), generator=make_generator(3)).numpy()
    tensors = {
        "levels": np.float32(255),
        "four": np.array(4, np.uint8),
        "w": weight,
        "scale": np.float32(1 / 255),
    }
    tensors["zero"] = np.uint8(0)
    nodes = {
        "Cast": [("Cast", ["m"], {"to": 2}), ("Cast", ["t0"], {"to": 1})],
        "BitShift": [
            ("Cast", ["m"], {"to": 2}),
            ("BitShift", ["t0", "four"], {"direction": "RIGHT"}),
            ("BitShift", ["t1", "four"], {"direction": "LEFT"}),
            ("Cast", ["t2"], {"to": 1}),
        ],
    }.get(kind, [(kind, ["m"], {})])
    made = [
        helper.make_node("Mul", ["x", "levels"], ["m"]),
        *(helper.make_node(op, names, [f"t{i}"], **kw) for i, (op, names, kw) in enumerate(nodes)),
        helper.make_node("Div", [f"t{len(nodes) - 1}", "levels"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(
            made,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *SIZE])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("kind", ["Round", "Floor", "Ceil", "Cast", "BitShift"])
def test_rounding_in_an_onnx_graph_passes_gradients(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    path = rounded_graph(kind, tmp_path / "m.onnx")
    classifier = open_classifier(path)
    images = noise()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": images.numpy()})
    torch.testing.assert_close(classifier.logits(images), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    assert check_gradients(classifier, images).reason is None
    weight = torch.randn((768, CLASSES), generator=make_generator(3))
    found = gradient(classifier, images).flatten(1)
    factor = float(found[0] @ weight[:, 1] / weight[:, 1].square().sum())
    assert factor > 0
    torch.testing.assert_close(found, factor * weight[:, 1].expand_as(found), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # torch's own exporter deprecates itself
@pytest.mark.parametrize("name", [name for name in ROUNDINGS if name != "detached"])
def test_rounding_in_an_exported_program_passes_gradients(name: str, tmp_path: Path) -> None:
    net = Net(ROUNDINGS[name]).eval()
    dynamic = ({0: torch.export.Dim("n", min=1)},)
    torch.export.save(torch.export.export(net, (noise(2),), dynamic_shapes=dynamic), tmp_path / "m.pt2")
    classifier = open_classifier(tmp_path / "m.pt2")
    images = noise()
    with torch.no_grad():
        torch.testing.assert_close(classifier.logits(images), net(images), rtol=1e-4, atol=1e-4)
    assert check_gradients(classifier, images).reason is None
    a, b = gradient(classifier, images).flatten(), gradient(classifier_of(), images).flatten()
    assert float(a @ b / (a.norm() * b.norm())) > 0.7


class Steps(torch.autograd.Function):
    """Rounding of somebody's own, whose gradient is theirs to say: zero."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return (x * 255).round() / 255

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (lambda x: Steps.apply(x), "they are zero for 100 % of the images"),
        (
            lambda x: (x - 0.5).sign().tanh() + (x.abs() - x.abs()).sqrt(),
            "not finite for 100 % of the images",
        ),
    ],
)
def test_gradients_that_nothing_helps_are_no_evidence(begin: Callable[[Tensor], Tensor], said: str) -> None:
    classifier = classifier_of(begin)
    with prepared(classifier, noise()) as preparation:
        assert preparation.reason is not None
        assert said in preparation.reason
        assert not any("gradients" in note for note in preparation.notes)


def test_a_model_without_gradients_says_why() -> None:
    def numpy(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 1.0)

    classifier = classifier_of(numpy)
    found = check_gradients(classifier, noise())
    assert found.failure == classifier.limitation
    assert "no usable gradients: its code fails where gradients are wanted" in str(found.reason)
    with straight_through(classifier, noise()) as helped:
        assert not helped


def test_ordinary_gradients_are_left_alone() -> None:
    classifier = classifier_of()
    images = noise()
    exact = gradient(classifier, images)
    found = check_gradients(classifier, images)
    assert (found.images, found.zero, found.not_finite, found.reason) == (24, 0.0, 0.0, None)
    with prepared(classifier, images) as preparation:
        assert preparation.notes == ()
        assert preparation.scale is not None
        assert not isinstance(classifier.module, StraightThrough)  # type: ignore[attr-defined]
        assert torch.equal(gradient(classifier, images), exact)


def test_gradients_in_half_of_the_images_are_enough() -> None:
    black = torch.zeros(12, *SIZE)
    classifier = classifier_of(lambda x: x * (x.amax((1, 2, 3), keepdim=True) > 0))
    some = torch.cat([black, noise(12)])
    assert check_gradients(classifier, some).zero == 0.5
    assert check_gradients(classifier, some).reason is None
    assert "zero for 66.7 %" in str(check_gradients(classifier, some[:18]).reason)


# --- one scale ---------------------------------------------------------------------------------------------


@contextmanager
def normalised(classifier: Classifier, images: Tensor) -> Iterator[None]:
    """Divide logits by their spread inside the block."""
    classifier.logit_scale = measure_logit_scale(batched_logits(classifier, images, raw=True))
    yield
    classifier.logit_scale = None


@pytest.mark.parametrize("power", [-30, -20, -8, -3, 0, 3, 8, 20, 30])
def test_multiplied_logits_give_the_same_normalised_ones(power: int, always_scaled: None) -> None:
    """Also where a square of them, or one divided by them, is no float32."""
    images = noise()
    results = []
    for factor in (1.0, 10.0**power):
        classifier = classifier_of(end=lambda z, factor=factor: z * factor)
        with normalised(classifier, images):
            x = images.clone().requires_grad_()
            y = classifier.logits(x)
            (found,) = torch.autograd.grad((y * torch.arange(CLASSES)).sum(), x)
        results.append((y.detach(), found))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    assert results[0][0].std(1, correction=0).median() == pytest.approx(USUAL_SPREAD, rel=1e-4)


@pytest.mark.parametrize("power", [-8, -3, 3, 8])
def test_a_last_layer_of_another_scale_changes_nothing(power: int, always_scaled: None) -> None:
    images = noise()
    results = []
    for factor in (1.0, 10.0**power):
        net = Net().eval()
        last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        with torch.no_grad():
            last.weight.mul_(factor)
            last.bias.mul_(factor)
        classifier = wrap(net, size=SIZE)
        with normalised(classifier, images), classifier.frozen(), classifier.fast_inference(images):
            results.append(gradient(classifier, images))
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2 * float(results[0].abs().max()))


def test_a_shift_of_a_row_makes_no_difference(always_scaled: None) -> None:
    images = noise()
    results = []
    for end in (lambda z: z, lambda z: torch.logsumexp(z, 1, keepdim=True) + z):
        with normalised(classifier := classifier_of(end=end), images):
            results.append(classifier.logits(images).detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("factor", "changed"), [(1.0, False), (1e-3, True), (1e8, True), (1e30, True)])
def test_only_an_unusual_scale_is_changed_and_told(factor: float, changed: bool) -> None:
    classifier = classifier_of(end=lambda z: z * factor)
    images = noise()
    raw = classifier.raw_logits(images).detach()
    with prepared(classifier, images) as preparation:
        assert preparation.reason is None
        assert bool(preparation.notes) == changed
        assert torch.equal(classifier.logits(images), raw) != changed
        if changed:
            assert "brought to one scale" in preparation.notes[0]
            spread = classifier.logits(images).detach().std(1, correction=0).median()
            assert spread == pytest.approx(USUAL_SPREAD, rel=1e-4)
    assert classifier.logit_scale is None


def test_random_images_serve_where_there_are_no_clean_ones() -> None:
    classifier = classifier_of(end=lambda z: z * 1e4)
    with prepared(classifier, None) as preparation:
        assert preparation.scale is not None
        assert preparation.scale.images == 32
        assert classifier.logits(noise()).detach().std(1).median() == pytest.approx(USUAL_SPREAD, rel=0.5)


def test_what_has_no_scale_is_said() -> None:
    with pytest.raises(CouldNotTell, match="same output for every class"):
        measure_logit_scale(torch.ones(5, 3))
    with pytest.raises(CouldNotTell, match="not finite"):
        measure_logit_scale(torch.tensor([[1.0, torch.nan]]))
    assert measure_logit_scale(torch.tensor([[1.0, 1], [1, 1], [0, 6]])).spread == pytest.approx(1.0)


# --- outputs -----------------------------------------------------------------------------------------------


def test_outputs_that_hide_are_noticed() -> None:
    z = 10 * torch.randn((60, 5), generator=make_generator(5))
    plain = check_logits(z)
    assert (plain.images, plain.finite, plain.constant, plain.levels) == (60, 1.0, False, 300)
    assert (plain.clipped, plain.tied, plain.lowest, plain.reason) == (0.0, 0.0, 0.0, None)
    assert check_logits(z.clamp(-3, 3)).largest == 3
    assert "outputs are clipped" in str(check_logits(z.clamp(-3, 3)).reason)
    assert "the same largest output, 3" in str(check_logits(z.clamp(-3, 3)).reason)
    assert check_logits(z.clamp(-3, 3)).clipped == pytest.approx(
        float((z.amax(1) >= 3).float().mean()), abs=0.03
    ), "rows that are alike once they are clipped count once"
    assert "outputs are clipped" in str(check_logits((1e4 * z).tanh()).reason)
    assert "outputs are clipped" in str(check_logits((10 * z).softmax(1)).reason)
    tied = torch.cat([z, z.amax(1, keepdim=True)], 1)
    assert "two largest outputs alike" in str(check_logits(tied).reason)
    assert check_logits(z.relu()).lowest > 0.3
    assert check_logits(z.relu()).reason is None, "what is cut off below hides no margin"
    assert check_logits(z.round()).levels < 80
    assert check_logits(torch.ones(3, 4)).constant
    assert "same output for every image" in str(check_logits(z[:1].expand(9, 5).contiguous()).reason)
    assert "not finite" in str(check_logits(z / (z < 20)).reason)
    assert check_logits(z[:1]).reason is None
    assert check_logits(z.repeat(3, 1)).reason is None, "the same image again tells nothing"


def test_one_logit_is_clipped_where_it_is_bounded_and_not_where_the_other_class_is_zero() -> None:
    z = 3 * torch.randn((40, 1), generator=make_generator(6)) - 20
    two = torch.cat([torch.zeros_like(z), z], 1)
    assert check_logits(two).reason is None
    bounded = check_logits(two.clamp(min=-20))
    assert bounded.clipped == float((z <= -20).float().mean())
    assert "outputs are clipped" in str(bounded.reason)


def test_outputs_of_a_function_that_cannot_be_followed_are_checked() -> None:
    """What a function does to its scores stays, so the clip has to be seen in them."""
    net = Net().eval()
    scores = net(noise()).detach()
    bound = float(scores.amax(1).median())
    clipped = wrap(lambda x: net(x).clamp(max=bound), size=SIZE)
    found = check_outputs(clipped, noise())
    assert found.clipped == float((scores.amax(1) >= bound).float().mean())
    assert f"{found.largest:.3g}" == f"{bound:.3g}"
    with prepared(clipped, noise()) as preparation:
        assert preparation.reason == found.reason
    assert check_outputs(wrap(net, size=SIZE), noise()).reason is None


def test_a_module_that_clips_is_read_from_before_the_clip() -> None:
    net = Net(end=lambda z: z.clamp(-0.1, 0.1)).eval()
    assert "clipped" in str(check_logits(net(noise())).reason)
    assert check_outputs(wrap(net, size=SIZE), noise()).reason is None


def test_logits_of_a_usual_spread_stay_as_they_are() -> None:
    classifier, images = classifier_of(), noise()
    own = classifier.raw_logits(images)
    spread = measure_logit_scale(own).spread
    assert preparation_module.USUAL[0] < spread < preparation_module.USUAL[1]
    with prepared(classifier, images) as found:
        assert torch.equal(classifier.logits(images), own)
    assert found.notes == ()
