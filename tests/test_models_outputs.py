"""What a model's outputs mean, and scores from before what squashes them at its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.models import Classifier, LoadOptions, TorchClassifier, open_classifier, wrap
from doorward.models.adapted import AdaptedModule
from doorward.models.errors import ModelFailed, NotExamined
from doorward.models.formats.given import as_classifier
from doorward.models.formats.input_options import guess_output
from doorward.models.outputs import Candidate, choose, keeps_order, refuse_places

SIZE = (3, 6, 6)
CLASSES = 5


def noise(n: int = 8, seed: int = 0) -> Tensor:
    return torch.rand((n, *SIZE), generator=make_generator(seed, "noise"))


class Net(nn.Module):
    """A linear network whose scores go far, and whatever comes after them."""

    def __init__(self, end: Callable[[Tensor], Tensor] = lambda z: z, classes: int = CLASSES) -> None:
        super().__init__()
        self.head, self.end = nn.Linear(108, classes), end
        with torch.no_grad():
            self.head.weight.copy_(torch.randn((classes, 108), generator=make_generator(1, "weights")))
            self.head.bias.copy_(torch.randn(classes, generator=make_generator(2, "weights")))

    def scores(self, x: Tensor) -> Tensor:
        return self.head((x - 0.5).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.scores(x))


def plain_logits(x: Tensor, classes: int = CLASSES) -> Tensor:
    with torch.no_grad():
        return Net(classes=classes).scores(x)


def centred(y: Tensor) -> Tensor:
    return y.detach() - y.detach().mean(1, keepdim=True)


# --- what outputs look like --------------------------------------------------------------------------------


def softmax_of(k: int, scale: float, n: int = 4) -> Tensor:
    return (scale * torch.randn((n, k), generator=make_generator(k, "logits"))).softmax(1)


@pytest.mark.parametrize("k", [2, 5, 10, 43])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "rounded",
    [
        lambda p: p,
        lambda p: p.half().float(),
        lambda p: p.bfloat16().float(),
        lambda p: p.double().float(),
        lambda p: (p * 255).round() / 255,
        lambda p: (p * 256).round().clamp(0, 255) / 256,  # as quantising tools do: 1 becomes .996
        lambda p: (p * 256).floor().clamp(0, 255) / 256,
        lambda p: (p * 100).round() / 100,
    ],
)
def test_probabilities_are_known_up_to_rounding(
    rounded: Callable[[Tensor], Tensor], scale: float, k: int
) -> None:
    assert guess_output(rounded(softmax_of(k, scale))) == "probabilities"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [2, 4, 10])
def test_logits_are_not_taken_for_probabilities(k: int, seed: int) -> None:
    """Scores that happen to lie in [0, 1] do not sum to one, on a grid or not."""
    z = torch.rand((4, k), generator=make_generator(seed, "logits"))
    for y in (z, z / z.sum(1, keepdim=True) * 1.05, (z * 20).round() / 20, z.half().float(), 4 * z - 2):
        if bool(((y.sum(1) - 1).abs() > 0.04).any()):
            assert guess_output(y) == "logits"
    assert guess_output((z * 255).round() / 255 + 0.5) == "logits"
    assert guess_output(z - z.mean(1, keepdim=True)) == "logits"
    assert guess_output(softmax_of(k, 1.0).log()) == "logits"
    assert guess_output(torch.full((4, k), float("nan"))) == "logits"


def test_rows_that_sum_to_nearly_one_need_the_rounding_that_explains_it() -> None:
    p = softmax_of(10, 2.0)
    eight = (p * 256).floor().clamp(0, 255) / 256
    assert (eight.sum(1) - 1).abs().max() > 5e-3
    assert guess_output(eight) == "probabilities"
    assert guess_output(eight + 1e-4 * torch.rand(p.shape, generator=make_generator(0))) == "logits"


# --- which output ------------------------------------------------------------------------------------------


def test_the_number_of_classes_goes_before_names_and_those_before_what_is_made_of_what() -> None:
    features, logits, other = Candidate("features", 128, True), Candidate("logits", 10), Candidate("aux", 10)
    assert choose([features], 10).reason is None, "there is no choice"
    assert choose([features, logits], 10).position == 1
    assert choose([features, logits, other], 10).position == 1
    assert choose([features, logits, other], None).position == 1
    assert choose([Candidate("a", 128, True), Candidate("b", 10)], None).position == 1
    assert choose([logits, features], 128).position == 1
    assert choose([Candidate("a", 1), Candidate("b", 7)], 2).position == 0, "one number tells two apart"
    for candidates, classes in (([other, Candidate("b", 10)], 10), ([other, Candidate("b", 9)], None)):
        with pytest.raises(InputError, match="nothing tells which"):
            choose(candidates, classes)
    with pytest.raises(InputError, match="none fits 11 classes"):
        choose([features, logits], 11)


# --- the end of a network ----------------------------------------------------------------------------------

#: Ends as torch code, and the same as ONNX nodes from "z" to "y" (None: no form here).
Nodes = list[tuple[str, list[str], dict[str, Any]]]
ENDS: dict[str, tuple[Callable[[Tensor], Tensor], Nodes | None]] = {
    "clip": (lambda z: z.clamp(-2, 2), [("Clip", ["z", "-2", "2"], {})]),
    "clip above": (lambda z: torch.clamp(z, max=1.0), [("Min", ["z", "1"], {})]),
    "relu6": (F.relu6, [("Clip", ["z", "0", "6"], {})]),
    "softmax": (lambda z: z.softmax(1), [("Softmax", ["z"], {"axis": 1})]),
    "log softmax": (lambda z: F.log_softmax(z, dim=-1), [("LogSoftmax", ["z"], {"axis": -1})]),
    "log of softmax": (
        lambda z: torch.log(torch.softmax(z, 1) + 1e-7),
        [("Softmax", ["z"], {"axis": 1}), ("Add", ["", "1e-07"], {}), ("Log", [""], {})],
    ),
    "sharp tanh": (
        lambda z: torch.tanh(z * 1e4),
        [("Mul", ["z", "10000"], {}), ("Tanh", [""], {})],
    ),
    "sigmoid": (torch.sigmoid, [("Sigmoid", ["z"], {})]),
    "rounded": (torch.round, [("Round", ["z"], {})]),
    "floor": (lambda z: torch.floor(z / 4), [("Div", ["z", "4"], {}), ("Floor", [""], {})]),
    "two digits": (
        lambda z: torch.round(z.softmax(1) * 100) / 100,
        [
            ("Softmax", ["z"], {"axis": 1}),
            ("Mul", ["", "100"], {}),
            ("Round", [""], {}),
            ("Div", ["", "100"], {}),
        ],
    ),
    "half": (lambda z: z.softmax(1).half().float(), None),
    "whole": (
        lambda z: (z * 2).to(torch.int32).float(),
        [("Mul", ["z", "2"], {}), ("Cast", [""], {"to": 6}), ("Cast", [""], {"to": 1})],
    ),
    "whole percents": (
        lambda z: (z.softmax(1) * 100).to(torch.int32).float(),
        [
            ("Softmax", ["z"], {"axis": 1}),
            ("Mul", ["", "100"], {}),
            ("Cast", [""], {"to": 6}),
            ("Cast", [""], {"to": 1}),
        ],
    ),
    "by hand": (
        lambda z: z,
        [("Exp", ["z"], {}), ("ReduceSum", ["", "axes"], {"keepdims": 1}), ("Div", ["-2", ""], {})],
    ),
    "8 bits": (
        lambda z: z,
        [("QuantizeLinear", ["z", "scale", "zero"], {}), ("DequantizeLinear", ["", "scale", "zero"], {})],
    ),
    "softmax in 8 bits": (
        lambda z: z,
        [
            ("Softmax", ["z"], {"axis": 1}),
            ("QuantizeLinear", ["", "small", "zero"], {}),
            ("DequantizeLinear", ["", "small", "zero"], {}),
        ],
    ),
}


def graph(end: Nodes, path: Path) -> Path:
    """Write the network with an end as an ONNX file, each input "" being what the node before gives."""
    net = Net()
    tensors: dict[str, Any] = {
        "half": np.float32(0.5), "w": net.head.weight.detach().numpy(), "b": net.head.bias.detach().numpy(),
        "axes": np.array([1]), "scale": np.float32(0.05), "small": np.float32(1 / 256), "zero": np.uint8(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("Sub", ["x", "half"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["z"], transB=1),
    ]
    for i, (operator, inputs, attributes) in enumerate(end):
        names = []
        for name in inputs:
            if name == "" or (name == "-2" and operator == "Div"):
                name = nodes[-1 if name == "" else -2].output[0]
            elif name.replace("e-", "").replace(".", "").lstrip("-").isdigit():
                tensors[name] = np.float32(name)
            names.append(name)
        nodes.append(helper.make_node(operator, names, [f"t{i}"], **attributes))
    nodes[-1].output[0] = "y"
    model = helper.make_model(
        helper.make_graph(
            nodes,
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


def program(end: Callable[[Tensor], Tensor], path: Path) -> Path:
    dynamic = ({0: torch.export.Dim("n", min=1)},)
    torch.export.save(torch.export.export(Net(end).eval(), (noise(2),), dynamic_shapes=dynamic), path)
    return path


def opened(kind: str, name: str, folder: Path) -> Classifier:
    end, nodes = ENDS[name]
    if kind == "onnx":
        return open_classifier(graph(nodes or [], folder / "m.onnx"))
    if kind == "torch.export":
        return open_classifier(program(end, folder / "m.pt2"))
    return wrap(Net(end), size=SIZE)


CASES = [("onnx", name) for name, (_, nodes) in ENDS.items() if nodes is not None] + [
    (kind, name)
    for kind in ("torch.export", "python")
    for name in ENDS
    if name not in ("by hand", "8 bits", "softmax in 8 bits")
]


@pytest.mark.filterwarnings("ignore")  # torch's own exporter deprecates itself
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_scores_come_from_before_the_end(kind: str, name: str, tmp_path: Path) -> None:
    """One network, with or without what squashes its scores: the margins are the same, up to a factor."""
    classifier = opened(kind, name, tmp_path)
    assert isinstance(classifier, TorchClassifier)
    assert classifier.spec.output == "logits"
    x = noise()
    expected = centred(plain_logits(x))
    given = centred(classifier.logits(x))
    factor = float((given * expected).sum() / expected.square().sum())
    assert factor > 0
    torch.testing.assert_close(given, factor * expected, rtol=1e-3, atol=1e-3 * factor)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(classifier.logits(x)[:, 1].sum(), x)
    assert (gradient != 0).float().mean() > 0.9
    assert classifier.features(noise()).shape == (8, 108)
    read = "softmax" in name or name in ("sigmoid", "two digits", "half", "whole percents", "by hand")
    assert ("output" in classifier.spec.assumed) == (not read), "what the network itself says is not assumed"
    told = name not in ("softmax", "log softmax", "log of softmax", "sigmoid", "by hand")
    assert bool(classifier.notes) == told
    assert all("scores are taken from before the model's final" in note for note in classifier.notes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "torch.export", "python"])
def test_log_probabilities_give_the_margins_of_the_logits(kind: str, tmp_path: Path) -> None:
    """In float32 a softmax rounds whatever is more than 16 or so below the largest."""
    (tmp_path / "a").mkdir()
    x = noise(64)
    z = plain_logits(x)
    assert (z.amax(1) - z.amin(1)).max() > 20
    for name in ("softmax", "log softmax"):
        torch.testing.assert_close(
            centred(opened(kind, name, tmp_path / "a").logits(x)), centred(z), rtol=1e-4, atol=1e-4
        )


class Shifted(nn.Module):
    """A bend of each class's score, and then something of its own for each class."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.net, self.own = Net(), end
        self.offsets = nn.Parameter(torch.tensor([0.0, 3.0, -3.0, 1.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        if self.own == "offsets":
            return z.tanh() + self.offsets
        if self.own == "in place":
            y = z.tanh()
            y[:, 3] += 5
            return y
        if self.own == "behind torch's back":
            y = z.tanh()
            y.data[:, 3] += 5
            return y
        if self.own == "source":
            y = z.clamp(-1, 1)
            z.zero_()
            return y
        if self.own == "bounds":
            return torch.clamp(z, min=self.offsets - 5, max=self.offsets)
        if self.own == "turned":
            return -z.tanh()
        if self.own == "over images":
            return z.softmax(0)
        if self.own == "bumps":
            return z.cos()
        raise AssertionError(self.own)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "end",
    ["offsets", "in place", "behind torch's back", "source", "bounds", "turned", "over images", "bumps"],
)
def test_an_end_that_could_change_the_order_of_classes_stays(end: str, tmp_path: Path) -> None:
    net = Shifted(end).eval()
    x = noise()
    with torch.no_grad():
        expected = net(x)
    for kind in ("python", "torch.export"):
        if kind == "python":
            classifier = wrap(net, size=SIZE)
        else:
            if end == "behind torch's back":
                continue  # torch.export does not see it either
            dynamic = ({0: torch.export.Dim("n", min=1)},)
            torch.export.save(torch.export.export(net, (x,), dynamic_shapes=dynamic), tmp_path / "m.pt2")
            classifier = open_classifier(tmp_path / "m.pt2")
        torch.testing.assert_close(classifier.logits(x), expected, rtol=1e-5, atol=1e-5)
        assert classifier.notes == ()


def test_an_end_that_comes_only_at_times_is_no_end() -> None:
    """Scores of two scales would be compared with each other."""

    class AtTimes(Net):
        def forward(self, x: Tensor) -> Tensor:
            z = self.scores(x)
            return z.tanh() if len(x) < 10 else z.sigmoid()

    classifier = wrap(AtTimes(), size=SIZE)
    torch.testing.assert_close(classifier.logits(noise(8)), plain_logits(noise(8)))
    with pytest.raises(ModelFailed, match="ended in tanh in a trial, and do not for other inputs"):
        classifier.logits(noise(12))


@pytest.mark.parametrize("stated", [None, "probabilities", "logits"])
def test_what_is_stated_of_outputs_does_not_bring_a_clip_back(stated: Any, tmp_path: Path) -> None:
    path = graph(ENDS["softmax in 8 bits"][1] or [], tmp_path / "m.onnx")
    classifier = open_classifier(path, options=LoadOptions(output=stated))
    torch.testing.assert_close(
        centred(classifier.logits(noise())), centred(plain_logits(noise())), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("end", "output", "same"),
    [
        (torch.sigmoid, "one_logit", True),
        (lambda z: torch.tanh(z * 3), "one_logit", True),
        (lambda z: torch.sigmoid(z).mul(255).round() / 255, "one_logit", True),
        (lambda z: z.clamp(0, 1), "probabilities", False),  # where it is cut off, there is nothing to tell
    ],
)
def test_one_number_keeps_its_sign(end: Callable[[Tensor], Tensor], output: str, same: bool) -> None:
    classifier = wrap(Net(end, classes=1), size=SIZE)
    assert classifier.spec.output == output
    x = noise(32)
    if same:
        given, z = classifier.logits(x).detach(), plain_logits(x, classes=1)[:, 0]
        factor = float((given[:, 1] * z).sum() / z.square().sum())
        torch.testing.assert_close(given[:, 1], factor * z, rtol=1e-3, atol=1e-3)
        assert torch.equal(given.argmax(1) == 1, z > 0)


def test_a_fused_network_keeps_its_end_left_out() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    network.extend([nn.Linear(24, CLASSES), nn.Softmax(1)])
    classifier = wrap(network.eval(), size=SIZE)
    assert isinstance(classifier, TorchClassifier)
    assert isinstance(classifier.module, AdaptedModule)
    x = noise(16)
    exact = classifier.logits(x)
    with torch.no_grad(), classifier.fast_inference(x):
        assert isinstance(classifier.module, AdaptedModule)
        assert classifier.module.inner is not network, "batch norm is folded"
        given = classifier.logits(x)
    assert (given - exact).abs().max() <= 0.1 * (exact.max() - exact.min())
    assert classifier.module.inner is network


def test_order_is_kept_but_for_ties() -> None:
    z = torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.0, 5.0]])
    assert keeps_order(z, z.tanh())
    assert keeps_order(z, z.clamp(0, 1))
    assert keeps_order(z, torch.zeros(2, 3))
    assert not keeps_order(z, -z)
    assert not keeps_order(z, z.abs())
    assert not keeps_order(z * torch.inf, z)


# --- several outputs of a file -----------------------------------------------------------------------------


class Several(nn.Module):
    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(108, 7), nn.ModuleList(nn.Linear(7, 3) for _ in keys[1:])
        self.keys = keys

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x.flatten(1))
        return dict(zip(self.keys, [features, *(head(features) for head in self.heads)], strict=True))


class Finder(Several):
    """Gives a score and a box for each of nine places in an image."""

    def __init__(self) -> None:
        super().__init__(("boxes", "scores"))
        self.finds = nn.Linear(108, 45)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.finds(x.flatten(1)).unflatten(1, (9, 5))
        return {"boxes": found[..., :4], "scores": found[..., 4:]}


def exported(net: Several, kind: str, folder: Path) -> Path:
    net = net.eval()
    if kind == "onnx":
        torch.onnx.export(
            net, (noise(2),), str(folder / "m.onnx"), dynamo=False, input_names=["x"],
            output_names=list(net.keys), dynamic_axes={"x": {0: "n"}}, opset_version=17,
        )  # fmt: skip
        return folder / "m.onnx"
    torch.export.save(
        torch.export.export(net, (noise(2),), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)),
        folder / "m.pt2",
    )
    return folder / "m.pt2"


@pytest.mark.parametrize(
    ("scores", "other", "finds"),
    [
        ((2, 896, 1), (2, 896, 16), True),
        ((2, 100), (2, 100, 4), True),
        ((2, 10), (2, 10, 7, 7), False),  # maps of the classes
        ((2, 10), (2, 10, 64), False),  # what a transformer has for each part of an image
        ((2, 10, 1, 1), (2, 10, 4), True),
        ((2, 1), (2, 1, 4), False),
    ],
)
def test_places_in_an_image_are_told_from_classes(
    scores: tuple[int, ...], other: tuple[int, ...], finds: bool
) -> None:
    given = {"scores": scores, "more": other}
    with pytest.raises(NotExamined) if finds else nullcontext():
        refuse_places(scores, given, None)
    refuse_places(scores, given, scores[1])  # it is known to tell so many classes apart


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "torch.export", "torch"])
def test_what_finds_objects_is_no_classifier(kind: str, tmp_path: Path) -> None:
    def opened() -> Classifier:
        if kind == "torch":
            return as_classifier(Finder(), size=(3, 6, 6))
        return open_classifier(exported(Finder(), kind, tmp_path))

    with pytest.raises(NotExamined, match=r"each of 9 places .* 4 numbers more .*boxes.*finds objects"):
        opened()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "torch.export"])
def test_one_of_several_outputs_of_a_file_is_taken_and_told(kind: str, tmp_path: Path) -> None:
    def save(keys: tuple[str, ...]) -> Path:
        return exported(Several(keys), kind, tmp_path)

    classifier = open_classifier(save(("features", "scores")))
    assert len(classifier.classes) == 3
    assert "scores was taken" in classifier.notes[0]
    assert "computed from the others" in classifier.notes[0]
    assert len(open_classifier(save(("hidden", "logits", "other"))).classes) == 3
    assert len(open_classifier(tmp_path / f"m.{'onnx' if kind == 'onnx' else 'pt2'}",
                               options=LoadOptions(labels=tuple("abcdefg"))).classes) == 7  # fmt: skip
    with pytest.raises(InputError, match=r"a \(3 numbers\), b \(3 numbers\), and nothing tells which"):
        open_classifier(save(("hidden", "a", "b")))
