"""ONNX files: real nets from both of torch's exporters, hostile files, and what cannot be a torch graph."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from doorward.core.errors import CouldNotTell, InputError, MissingExtra
from doorward.models import InputSpec, LoadOptions, TorchClassifier, open_classifier
from doorward.models.formats.loading import artifact_digest
from doorward.models.formats.onnx.graph import PLANS, OnnxGraph
from doorward.models.formats.onnx.loader import OnnxRuntimeClassifier, inspect_onnx, load_onnx
from doorward.models.formats.onnx.operators import OPERATORS

onnxruntime = pytest.importorskip("onnxruntime")


# --- nets --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(outs)
        self.two = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(outs)
        self.short = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_two(self.two(F.relu(self.norm_one(self.one(x)))))
        return F.relu(y + self.short(x))


def resnet() -> nn.Module:
    body = [
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8, 8, 1),
        Residual(8, 16, 2),
    ]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def vgg() -> nn.Module:
    body: list[nn.Module] = []
    for ins, outs in ((3, 8), (8, 8), (8, 16)):
        body += [
            nn.Conv2d(ins, outs, 3, padding=1),
            nn.BatchNorm2d(outs),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5))


class MobileBlock(nn.Module):
    """Has what MobileNet V3 has: depthwise convolutions, hard swish, squeeze and excitation, a 1x1 head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.ReLU6())
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        )
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(F.silu(x * self.excite(x)), 1)).flatten(1)


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.depth = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        x = x + (self.scale * self.narrow(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)
        return self.head(self.last(x.mean([-2, -1])))


class Transformer(nn.Module):
    """Is a small ViT: class token, positions, scaled dot products, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 17, 16) * 0.1)
        self.before, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.places
        q, k, v = self.qkv(self.before(x)).reshape(n, 17, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, 17, 16)
        x = x + self.out(y)
        x = x + self.narrow(F.gelu(self.wide(self.after(x))))
        return self.head(x[:, 0])


class Sequence(nn.Module):
    """Puts tokens before images, as torch's own attention layer does: a batch of another size is hopeless."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


NETS = {
    "resnet": resnet,
    "vgg": vgg,
    "mobile": MobileBlock,
    "convnext": ConvNext,
    "transformer": Transformer,
    "sequence": Sequence,
}
SPEC = InputSpec(channels=3, height=16, width=16)


def make(name: str) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return net.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporters, which warn of themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def export(net: nn.Module, path: Path, *, dynamo: bool, dynamic: bool, opset: int, **more: Any) -> Path:
    x = torch.rand((2 if dynamic else 1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    if dynamic:
        more |= (
            {"dynamic_shapes": ({0: torch.export.Dim("n")},)} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
        )
    with quiet():
        torch.onnx.export(
            net, (x,), path, input_names=["x"], output_names=["y"], dynamo=dynamo, opset_version=opset, **more
        )
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small convolutional net with a batch of any size, weights in the file."""
    path = tmp_path_factory.mktemp("small") / "net.onnx"
    return export(make("resnet"), path, dynamo=False, dynamic=True, opset=13)


def images(n: int = 5) -> Tensor:
    return torch.rand((n, *SPEC.shape), generator=torch.Generator().manual_seed(n))


def model(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, np.ndarray] | None = None,
    *,
    shape: tuple[Any, ...] = ("n", 3, 4, 4),
    kind: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    **more: Any,
) -> onnx.ModelProto:
    """Return a model with the input x."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (tensors or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *more.pop("opsets", [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)


def save(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def head(x: str = "f", size: int = 48) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Return the end of a classifier, from a value of `size` numbers for each image to the output y."""
    noise = np.random.default_rng(3)
    nodes = [helper.make_node("Flatten", [x], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["y"])]
    return nodes, {
        "w": noise.normal(size=(size, 3)).astype(np.float32),
        "b": noise.normal(size=3).astype(np.float32),
    }


TINY = InputSpec(channels=3, height=4, width=4)


def tiny(n: int = 5) -> Tensor:
    return torch.rand((n, 3, 4, 4), generator=torch.Generator().manual_seed(n))


def runtime(path: Path, x: np.ndarray, output: int = 0) -> np.ndarray:
    options = onnxruntime.SessionOptions()  # joined nodes of 8-bit numbers differ by processor
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[output]


def evaluated(path: Path, x: np.ndarray) -> np.ndarray:
    """Return what ONNX's own evaluator computes; onnxruntime's 8-bit products differ by processor."""
    evaluator = ReferenceEvaluator(version_converter.convert_version(onnx.load(path), 19))
    return evaluator.run(None, {evaluator.input_names[0]: x})[0]


# --- torch graphs ------------------------------------------------------------------------------------------

EXPORTS = [
    ("resnet", True, True, 18),
    ("transformer", True, False, 20),
    ("convnext", True, True, 23),
    *[(name, False, True, 17) for name in ("resnet", "vgg", "convnext", "transformer")],
    *[(name, False, False, 14) for name in ("mobile", "transformer")],
    *[(name, False, True, 9) for name in ("resnet", "vgg")],
    ("vgg", False, False, 20),
]


@pytest.mark.parametrize(("name", "dynamo", "dynamic", "opset"), EXPORTS)
def test_exported_net_is_the_net(name: str, dynamo: bool, dynamic: bool, opset: int, tmp_path: Path) -> None:
    net = make(name)
    path = export(net, tmp_path / "net.onnx", dynamo=dynamo, dynamic=dynamic, opset=opset)
    classifier = load_onnx(path, SPEC, [*"abcde"])
    assert isinstance(classifier, TorchClassifier)
    assert classifier.limitation is None
    assert {"gradients", "weights", "features"} <= classifier.capabilities
    assert classifier.batch is None  # also where the file says 1
    assert classifier.classes == tuple("abcde")
    assert classifier.format == "onnx"
    kernels = [p for p in net.parameters() if p.ndim == 4 and p.shape[2] * p.shape[3] > 1]
    assert classifier.convolutions == len(kernels) > 0

    x, other = images().requires_grad_(), images().requires_grad_()
    y, expected = classifier.logits(x), net(other)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()))

    layer = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    caught = []
    with layer.register_forward_pre_hook(lambda _, args: caught.append(args[0])):
        net(images())
    torch.testing.assert_close(classifier.features(images()), caught[0].flatten(1), rtol=1e-4, atol=1e-5)


def test_model_of_one_image_that_cannot_take_more_goes_image_by_image(tmp_path: Path) -> None:
    net = make("sequence")
    path = export(net, tmp_path / "net.onnx", dynamo=False, dynamic=False, opset=17)
    classifier = load_onnx(path, SPEC)
    assert isinstance(classifier, TorchClassifier)
    assert classifier.batch == 1
    torch.testing.assert_close(classifier.logits(images()), net(images()), rtol=1e-4, atol=1e-5)
    assert classifier.features(images()).shape == (5, 8)


def test_layers_are_torch_layers(small: Path) -> None:
    classifier = load_onnx(small, SPEC)
    assert isinstance(classifier, TorchClassifier)
    kinds = [type(m) for m in classifier.module.children()]
    assert kinds.count(nn.Conv2d) == 7
    assert kinds[-1] is nn.Linear
    assert not any(p.requires_grad for p in classifier.module.parameters())
    assert classifier.parameters == sum(p.numel() for p in classifier.module.parameters()) > 1000


def test_batch_norm_stays_a_layer_and_learns(tmp_path: Path) -> None:
    net = make("resnet")
    mode = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    path = export(net, tmp_path / "net.onnx", dynamo=False, dynamic=True, opset=17, **mode)
    graph = load_onnx(path, SPEC).module
    norms = [m for m in graph.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 7
    torch.testing.assert_close(norms[0].running_var, net[1].running_var)
    net.train()
    graph.train()
    torch.testing.assert_close(graph(images()), net(images()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms[0].running_mean, net[1].running_mean)


def test_weights_can_be_trained_and_layers_replaced(small: Path) -> None:
    graph = load_onnx(small, SPEC).module
    before = graph(images())
    for parameter in graph.parameters():
        parameter.requires_grad_(True)
    graph(images()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in graph.parameters())
    name, last = list(graph.named_children())[-1]
    setattr(graph, name, nn.Linear(last.in_features, 2))
    assert graph(images()).shape == (5, 2)
    setattr(graph, name, last)
    assert torch.equal(graph(images()), before)


def test_copies_and_pickles_stand_on_their_own(small: Path) -> None:
    graph = load_onnx(small, SPEC).module
    before = graph(images())
    for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(twin(images()), before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert twin(images()).abs().sum() == 0
        assert torch.equal(graph(images()), before)
    assert copy.deepcopy(graph).state_dict().keys() == graph.state_dict().keys()


def test_graph_can_be_exported_again(small: Path, tmp_path: Path) -> None:
    graph = load_onnx(small, SPEC).module
    path = export(graph, tmp_path / "again.onnx", dynamo=True, dynamic=True, opset=18)
    again = load_onnx(path, SPEC)
    assert again.limitation is None
    torch.testing.assert_close(again.logits(images()), graph(images()), rtol=1e-4, atol=1e-5)


def test_loading_leaves_the_global_state_alone(small: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    load_onnx(small, SPEC)
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_graph_that_computes_with_shapes_takes_many_batch_sizes(tmp_path: Path) -> None:
    net = make("transformer")
    path = export(net, tmp_path / "net.onnx", dynamo=False, dynamic=True, opset=17)
    graph = load_onnx(path, SPEC).module
    for n in (*range(1, PLANS + 3), 2):
        torch.testing.assert_close(graph(images(n)), net(images(n)), rtol=1e-4, atol=1e-5)
    assert len(graph._plans) <= PLANS


def test_values_are_let_go_once_they_are_not_needed(small: Path) -> None:
    graph = load_onnx(small, SPEC).module
    plan = graph._plan((2, 3, 16, 16), torch.device("cpu"))
    alive, most = {0}, 0
    for step in plan.steps:
        assert set(step.inputs) <= alive | {slot for slot, _ in plan.tensors}
        alive |= set(step.outputs)
        most = max(most, len(alive))
        alive -= set(step.dead)
    assert alive == {0, plan.output} or alive == {plan.output}
    assert most <= 4  # the image, a shortcut, and a step's own two


# --- outputs and features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 17])
def test_scores_come_from_before_a_final_softmax_and_have_a_gradient(tmp_path: Path, opset: int) -> None:
    net = make("vgg")
    with torch.no_grad():
        net[-1].weight *= 1e4  # so sure that probabilities are rounded to 0 and 1
    path = export(
        nn.Sequential(net, nn.Softmax(1)).eval(), tmp_path / "n.onnx", dynamo=False, dynamic=True, opset=opset
    )
    assumed = SPEC.model_copy(update={"assumed": ("output",)})
    classifier = load_onnx(path, assumed)
    assert classifier.spec.output == "logits"
    x = images().requires_grad_()
    y = classifier.logits(x)
    torch.testing.assert_close(y, net(images()), rtol=1e-3, atol=1e-1)
    y[:, 1].sum().backward()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
    assert classifier.features(images()).shape == (5, 12)  # not what goes into the softmax


def test_final_sigmoid_of_one_number_gives_its_logit(tmp_path: Path) -> None:
    nodes, tensors = head("x")
    tensors |= {"w": 100 * tensors["w"][:, :1], "b": tensors["b"][:1]}
    nodes[-1].output[0] = "z"
    path = save(model([*nodes, helper.make_node("Sigmoid", ["z"], ["y"])], tensors), tmp_path / "m.onnx")
    classifier = load_onnx(path, TINY.model_copy(update={"assumed": ("output",)}), ["no", "yes"])
    z = tiny().flatten(1) @ torch.from_numpy(tensors["w"]) + torch.from_numpy(tensors["b"])
    assert classifier.spec.output == "one_logit"
    torch.testing.assert_close(
        classifier.logits(tiny()), torch.cat([torch.zeros(5, 1), z], 1), rtol=1e-4, atol=1e-3
    )


def test_output_of_several_is_the_one_that_the_others_lead_to(tmp_path: Path) -> None:
    nodes, tensors = head("x")
    places = helper.make_node("ArgMax", ["y"], ["place"], axis=1)
    path = save(model([*nodes, places], tensors, outputs=("x", "place", "flat", "y")), tmp_path / "m.onnx")
    classifier = load_onnx(path, TINY)
    assert classifier.logits(tiny()).shape == (5, 3)
    assert torch.equal(classifier.features(tiny()), tiny().flatten(1))


def test_features_can_be_named(tmp_path: Path) -> None:
    nodes, tensors = head("r")
    path = save(model([helper.make_node("Relu", ["x"], ["r"]), *nodes], tensors), tmp_path / "m.onnx")
    classifier = load_onnx(path, TINY, features="r")
    assert torch.equal(classifier.features(tiny() - 0.5), (tiny() - 0.5).relu().flatten(1))
    for name in ("y", "nothing", "w"):
        with pytest.raises(InputError, match=f"--features {name}: .* it has: r, flat"):
            load_onnx(path, TINY, features=name)


@pytest.mark.parametrize(
    "end",
    [
        [helper.make_node("MatMul", ["flat", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])],
        [helper.make_node("MatMul", ["flat", "w"], ["m"]), helper.make_node("Add", ["b", "m"], ["y"])],
        [helper.make_node("MatMul", ["flat", "w"], ["m"]), helper.make_node("Mul", ["m", "b"], ["y"])],
        [helper.make_node("MatMul", ["flat", "w"], ["y"])],
        [helper.make_node("Gemm", ["flat", "w", "b"], ["y"], alpha=0.5, beta=2.0)],
        [
            helper.make_node("Gemm", ["flat", "v"], ["m"], transB=1),
            helper.make_node("Identity", ["m"], ["y"]),
        ],
    ],
)
def test_any_linear_end_is_a_linear_layer(end: list[onnx.NodeProto], tmp_path: Path) -> None:
    nodes, tensors = head("x")
    tensors["v"] = tensors["w"].T.copy()
    path = save(model([nodes[0], *end], tensors), tmp_path / "m.onnx")
    classifier = load_onnx(path, TINY)
    assert torch.equal(classifier.features(tiny()), tiny().flatten(1))
    np.testing.assert_allclose(classifier.logits(tiny()), runtime(path, tiny().numpy()), rtol=1e-4, atol=1e-5)
    layer = next(classifier.module.children())
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (3, 48)


def test_network_without_a_linear_end_has_no_features(tmp_path: Path) -> None:
    nodes = [helper.make_node("GlobalMaxPool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    classifier = load_onnx(save(model(nodes), tmp_path / "m.onnx"), TINY)
    assert "features" not in classifier.capabilities
    with pytest.raises(CouldNotTell, match="--features"):
        classifier.features(tiny())


# --- number types and layouts ------------------------------------------------------------------------------


LAST = InputSpec(channels=3, height=6, width=5, layout="NHWC")


def nhwc(kind: int) -> onnx.ModelProto:
    """Return a model as TensorFlow's converter writes them: channels last, SAME padding, a stride."""
    noise = np.random.default_rng(4)
    nodes, tensors = head("c", 4 * 3 * 3)
    before = [
        helper.make_node("Cast", ["x"], ["f32"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f32"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "k"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]),
    ]
    tensors["k"] = noise.normal(size=(4, 3, 3, 3)).astype(np.float32) / 100
    return model([*before, *nodes], tensors, shape=("n", 6, 5, 3), kind=kind)


def test_whole_number_pixels_and_channels_last(tmp_path: Path) -> None:
    path = save(nhwc(TensorProto.UINT8), tmp_path / "m.onnx")
    info = inspect_onnx(path)
    assert (info.layout, info.image_shape, info.input.dtype) == ("NHWC", (3, 6, 5), "uint8")
    spec = LAST.model_copy(update={"dtype": "uint8", "range": (0.0, 255.0)})
    classifier = load_onnx(path, spec)
    assert classifier.limitation is None
    images = torch.rand((5, 3, 6, 5), generator=torch.Generator().manual_seed(5))
    x = images.clone().requires_grad_()
    y = classifier.logits(x)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(y.detach(), runtime(path, pixels), rtol=1e-4, atol=1e-4)
    # the gradient passes the rounding as if it were not there
    y.sum().backward()
    smooth = load_onnx(
        save(nhwc(TensorProto.FLOAT), tmp_path / "f.onnx"), spec.model_copy(update={"dtype": "float32"})
    )
    other = images.clone().requires_grad_()
    smooth.logits(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert x.grad.abs().max() > 0


def test_half_precision_model_is_computed_in_float32(tmp_path: Path) -> None:
    net = make("vgg")
    with quiet():
        torch.onnx.export(
            copy.deepcopy(net).half(),
            (images(1).half(),),
            tmp_path / "h.onnx",
            dynamo=False,
            opset_version=17,
        )
    info = inspect_onnx(tmp_path / "h.onnx")
    assert info.input.dtype == "float16"
    classifier = load_onnx(tmp_path / "h.onnx", SPEC.model_copy(update={"dtype": "float16"}))
    assert classifier.limitation is None
    x = images().requires_grad_()
    y = classifier.logits(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, net(images()), rtol=0.02, atol=0.01)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert x.grad.abs().max() > 0


def test_double_precision(tmp_path: Path) -> None:
    nodes, tensors = head("x")
    tensors = {name: array.astype(np.float64) for name, array in tensors.items()}
    path = save(model(nodes, tensors, kind=TensorProto.DOUBLE), tmp_path / "m.onnx")
    classifier = load_onnx(path, TINY.model_copy(update={"dtype": "float64"}))
    assert classifier.limitation is None
    np.testing.assert_allclose(classifier.logits(tiny()), runtime(path, tiny().double().numpy()), rtol=1e-6)


def test_quantised_model_keeps_its_gradient(tmp_path: Path) -> None:
    noise = np.random.default_rng(5)
    nodes, tensors = head("d", 4 * 4 * 4)
    before = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["k", "ks", "kz"], ["kd"], axis=0),
        helper.make_node("Conv", ["xd", "kd"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "cs", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "cs", "z"], ["d"]),
    ]
    tensors |= {
        "s": np.array(1 / 127, np.float32),
        "z": np.array(0, np.int8),
        "cs": np.array(0.02, np.float32),
        "k": noise.integers(-127, 127, (4, 3, 3, 3)).astype(np.int8),
        "ks": noise.uniform(0.001, 0.002, 4).astype(np.float32),
        "kz": np.zeros(4, np.int8),
    }
    path = save(model([*before, *nodes], tensors), tmp_path / "m.onnx")
    classifier = load_onnx(path, TINY)
    assert classifier.limitation is None
    x = tiny().requires_grad_()
    y = classifier.logits(x)
    np.testing.assert_allclose(
        y.detach(), runtime(path, tiny().numpy()), atol=0.05 * float(y.detach().abs().max())
    )
    y.sum().backward()
    assert (x.grad != 0).float().mean() > 0.9


def dynamically_quantised(folder: Path) -> Path:
    noise = np.random.default_rng(6)
    tensors = {
        "k": noise.integers(-99, 99, (48, 3)).astype(np.int8),
        "kz": np.array(0, np.int8),
        "scale": np.array(0.01, np.float32),
    }
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("DynamicQuantizeLinear", ["flat"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "k", "z", "kz"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "scale"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    return save(model(nodes, tensors), folder / "m.onnx")


def statically_quantised(folder: Path) -> Path:
    """Return a graph in onnxruntime's own format of 8-bit numbers."""
    noise = np.random.default_rng(6)
    tensors = {
        "k": noise.integers(-99, 99, (4, 3, 3, 3)).astype(np.int8),
        "w": noise.integers(-99, 99, (64, 3)).astype(np.int8),
        "ws": np.array(0.01, np.float32),
        "s": np.array(1 / 255, np.float32),
        "cs": np.array(0.02, np.float32),
        "ys": np.array(0.1, np.float32),
        "z": np.array(0, np.uint8),
        "kz": np.array(0, np.int8),
        "wz": np.array(0, np.int8),
        "yz": np.array(128, np.uint8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node(
            "QLinearConv", ["q", "s", "z", "k", "ws", "kz", "cs", "z"], ["c"], pads=[1, 1, 1, 1]
        ),
        helper.make_node("Flatten", ["c"], ["flat"]),
        helper.make_node("QLinearMatMul", ["flat", "cs", "z", "w", "ws", "wz", "ys", "yz"], ["whole"]),
        helper.make_node("DequantizeLinear", ["whole", "ys", "yz"], ["y"]),
    ]
    return save(model(nodes, tensors), folder / "m.onnx")


def test_model_that_scales_by_each_image_goes_image_by_image(tmp_path: Path) -> None:
    """Dynamic quantisation takes its range from all images at hand; those of a batch must not mix."""
    path = dynamically_quantised(tmp_path)
    classifier = load_onnx(path, TINY)
    assert isinstance(classifier, TorchClassifier)
    assert classifier.batch == 1
    x = tiny() * torch.tensor([0.1, 1, 0.3, 0, 0.5]).view(5, 1, 1, 1)
    one = np.concatenate([evaluated(path, image[None].numpy()) for image in x])
    np.testing.assert_allclose(classifier.logits(x), one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [0.86, math.nan])
@pytest.mark.parametrize("quantised", [dynamically_quantised, statically_quantised])
def test_a_processor_on_which_onnxruntime_saturates_costs_no_gradients(
    quantised: Callable[[Path], Path], factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantised(tmp_path)
    init, outputs = OnnxRuntimeClassifier.__init__, OnnxRuntimeClassifier.outputs

    def made(self: Any, *words: Any, wide_products: bool = False, **more: Any) -> None:
        init(self, *words, wide_products=wide_products, **more)
        self.factor = 1.0 if wide_products else factor

    monkeypatch.setattr(OnnxRuntimeClassifier, "__init__", made)
    monkeypatch.setattr(OnnxRuntimeClassifier, "outputs", lambda self, *w: outputs(self, *w) * self.factor)
    classifier = load_onnx(path, TINY)
    assert isinstance(classifier, TorchClassifier)
    assert "onnxruntime is" in classifier.notes[0]
    expected = evaluated(path, tiny()[:1].numpy())
    np.testing.assert_allclose(classifier.logits(tiny()[:1]), expected, atol=0.06)  # half a step of 8 bits


def test_wide_products_are_what_the_file_says(tmp_path: Path) -> None:
    path = statically_quantised(tmp_path)
    wide = OnnxRuntimeClassifier(path, TINY, wide_products=True)
    expected = evaluated(path, tiny().numpy())
    np.testing.assert_allclose(wide.logits(tiny()), expected, atol=0.11)  # a tie is rounded either way


def test_a_graph_that_is_not_what_the_file_says_runs_in_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dynamically_quantised(tmp_path)
    monkeypatch.setattr(OnnxGraph, "forward", lambda _, x: x.flatten(1)[:, :3])
    classifier = load_onnx(path, TINY)
    assert isinstance(classifier, OnnxRuntimeClassifier)
    assert "off those of onnxruntime" in str(classifier.limitation)


# --- what has no torch form --------------------------------------------------------------------------------


def odd(tmp_path: Path, **more: Any) -> Path:
    nodes, tensors = head("v")
    before = helper.make_node("MeanVarianceNormalization", ["x"], ["v"], name="odd", axes=[1, 2, 3])
    return save(model([before, *nodes], tensors, **more), tmp_path / "odd.onnx")


@pytest.mark.parametrize("shape", [("n", 3, 4, 4), (1, 3, 4, 4), (2, 3, 4, 4)])
def test_unknown_operator_is_named_and_runs_in_onnxruntime(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    classifier = load_onnx(odd(tmp_path, shape=shape), TINY, ["a", "b", "c"], threads=1)
    assert isinstance(classifier, OnnxRuntimeClassifier)
    assert classifier.capabilities == {"probabilities"}
    assert "MeanVarianceNormalization (odd)" in str(classifier.limitation)
    assert classifier.classes == ("a", "b", "c")
    x = tiny()
    normal = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True, correction=0)
    _, tensors = head()
    expected = normal.flatten(1) @ torch.from_numpy(tensors["w"]) + torch.from_numpy(tensors["b"])
    torch.testing.assert_close(classifier.logits(x), expected, rtol=1e-4, atol=1e-4)
    assert classifier.cost.forwards == 5
    with pytest.raises(CouldNotTell):
        classifier.features(x)


def test_number_of_threads_is_kept(tmp_path: Path) -> None:
    for threads in (1, 2):
        classifier = load_onnx(odd(tmp_path), TINY, threads=threads)
        assert classifier._session.get_session_options().intra_op_num_threads == threads


def test_whole_number_pixels_in_onnxruntime(tmp_path: Path) -> None:
    nodes, tensors = head("v")
    before = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MeanVarianceNormalization", ["f"], ["v"], axes=[1, 2, 3]),
    ]
    path = save(model([*before, *nodes], tensors, kind=TensorProto.UINT8), tmp_path / "m.onnx")
    spec = TINY.model_copy(update={"dtype": "uint8", "range": (0.0, 255.0)})
    classifier = load_onnx(path, spec)
    assert classifier.limitation is not None
    expected = runtime(path, (tiny() * 255).round().to(torch.uint8).numpy())
    np.testing.assert_allclose(classifier.logits(tiny()), expected, rtol=1e-5, atol=1e-5)


def test_wrong_torch_form_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, tensors = head("r")
    path = save(model([helper.make_node("Abs", ["x"], ["r"]), *nodes], tensors), tmp_path / "m.onnx")
    monkeypatch.setitem(OPERATORS, "Abs", lambda op: lambda x: x.abs() * 1.01)
    classifier = load_onnx(path, TINY)
    assert isinstance(classifier, OnnxRuntimeClassifier)
    assert "% off those of onnxruntime" in str(classifier.limitation)


def test_without_onnxruntime(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    assert isinstance(load_onnx(small, SPEC), TorchClassifier)
    with pytest.raises(InputError, match=r"MeanVarianceNormalization .*pip install 'doorward\[onnx\]'"):
        load_onnx(odd(tmp_path), TINY)


def test_without_onnx(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"'onnx': pip install 'doorward\[onnx\]'"):
        load_onnx(small, SPEC)


# --- inner graphs and functions ----------------------------------------------------------------------------


def branch(name: str, node: onnx.NodeProto, tensors: dict[str, np.ndarray] | None = None) -> onnx.GraphProto:
    inits = [numpy_helper.from_array(array, key) for key, array in (tensors or {}).items()]
    return helper.make_graph([node], name, [], [helper.make_empty_tensor_value_info(node.output[0])], inits)


@pytest.mark.parametrize("truth", [True, False])
def test_condition_that_is_known_picks_its_branch(tmp_path: Path, truth: bool) -> None:
    nodes, tensors = head("v")
    one = branch("then", helper.make_node("Add", ["x", "three"], ["t"]), {"three": np.array(3, np.float32)})
    other = branch("else", helper.make_node("Neg", ["x"], ["e"]))
    choose = helper.make_node("If", ["c"], ["v"], then_branch=one, else_branch=other)
    path = save(model([choose, *nodes], tensors | {"c": np.array(truth)}), tmp_path / "m.onnx")
    classifier = load_onnx(path, TINY)
    assert classifier.limitation is None
    np.testing.assert_allclose(classifier.logits(tiny()), runtime(path, tiny().numpy()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bound", [0, 1000])
def test_condition_that_depends_on_the_image_chooses_of_both_branches(tmp_path: Path, bound: int) -> None:
    nodes, tensors = head("v")
    one = branch("a", helper.make_node("Neg", ["x"], ["same"]))
    other = branch("b", helper.make_node("Add", ["x", "k"], ["same"]), {"k": np.array(2, np.float32)})
    before = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "bound"], ["c"]),
        helper.make_node("If", ["c"], ["v"], then_branch=one, else_branch=other),
    ]
    path = save(
        model([*before, *nodes], tensors | {"bound": np.array(bound, np.float32)}), tmp_path / "m.onnx"
    )
    classifier = load_onnx(path, TINY)
    assert classifier.limitation is None
    np.testing.assert_allclose(classifier.logits(tiny()), runtime(path, tiny().numpy()), rtol=1e-4, atol=1e-4)


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """Return a local function that calls others one after the other."""
    names = ["i", *(f"v{i}" for i in range(len(calls) - 1)), "o"]
    nodes = [
        helper.make_node(call, [a], [b], domain="" if call in ("Neg", "Abs") else "own")
        for call, a, b in zip(calls, names[:-1], names[1:], strict=True)
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["i"], ["o"], nodes, opsets)


def calling(name: str, functions: list[onnx.FunctionProto], path: Path) -> Path:
    nodes, tensors = head("v")
    call = helper.make_node(name, ["x"], ["v"], domain="own")
    return save(
        model([call, *nodes], tensors, functions=functions, opsets=[helper.make_opsetid("own", 1)]), path
    )


def test_local_functions_are_written_out(tmp_path: Path) -> None:
    path = calling(
        "outer", [function("inner", "Neg", "Abs"), function("outer", "inner", "Neg")], tmp_path / "m.onnx"
    )
    classifier = load_onnx(path, TINY)
    assert classifier.limitation is None
    _, tensors = head()
    expected = -(tiny().flatten(1)) @ torch.from_numpy(tensors["w"]) + torch.from_numpy(tensors["b"])
    torch.testing.assert_close(classifier.logits(tiny()), expected, rtol=1e-4, atol=1e-4)


def test_endless_and_exploding_functions_are_refused(tmp_path: Path) -> None:
    loop = calling("a", [function("a", "b"), function("b", "a")], tmp_path / "loop.onnx")
    with pytest.raises(InputError, match="calls itself"):
        load_onnx(loop, TINY)
    deep = [function("f0", "Neg"), *(function(f"f{i}", f"f{i - 1}") for i in range(1, 3000))]
    with pytest.raises(InputError, match="call each other more than 100 levels deep"):
        load_onnx(calling("f2999", deep, tmp_path / "deep.onnx"), TINY)
    many = [function("f0", *["Neg"] * 10), *(function(f"f{i}", *[f"f{i - 1}"] * 10) for i in range(1, 9))]
    with pytest.raises(InputError, match="more than 200000 operators"):
        load_onnx(calling("f8", many, tmp_path / "bomb.onnx"), TINY)


# --- hostile and unfit files -------------------------------------------------------------------------------


def test_unfit_models_are_refused_in_one_line(small: Path, tmp_path: Path) -> None:
    nodes, tensors = head("x")
    two = model(nodes, tensors)
    two.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, (1,)))
    ugly = model(nodes, tensors)
    ugly.graph.node[0].name = "two\nlines"
    cases = {
        "names that are no text": ugly,
        "has one input; this ONNX model has 2: x, mask": two,
        r"is \(any, 48\)": model(nodes, tensors, shape=("n", 48)),
        r"channels, height, width\) = \(1, 4, 4\), not \(3, 4, 4\)": model(
            nodes, tensors, shape=("n", 1, 4, 4)
        ),
        r"output of shape \(n, classes\); .* y \(2, 3, 2, 4\)": model(
            [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 1])]
        ),
        "ZipMap": model(
            [
                *nodes,
                helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]),
            ],
            tensors,
            outputs=("z",),
            opsets=[helper.make_opsetid("ai.onnx.ml", 1)],
        ),
    }
    for message, proto in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_onnx(save(proto, tmp_path / "m.onnx"), TINY)
        assert "\n" not in str(caught.value)
    huge = model(nodes, tensors, shape=(10**9, 3, 4, 4))
    with pytest.raises(InputError, match="takes 1,000,000,000 images at a time, which is too many"):
        load_onnx(save(huge, tmp_path / "m.onnx"), TINY)
    with pytest.raises(InputError, match="there is no such file"):
        load_onnx(tmp_path / "none.onnx", TINY)
    with pytest.raises(InputError, match="2 labels for a model that tells 5"):
        load_onnx(small, SPEC, ["a", "b"])
    empty = tmp_path / "empty.onnx"
    empty.touch()
    with pytest.raises(InputError, match="no ONNX model"):
        inspect_onnx(empty)


@pytest.mark.parametrize(
    "bomb",
    [
        [helper.make_node("ConstantOfShape", ["big"], ["c"])],
        [helper.make_node("Tile", ["one", "big"], ["c"])],
        [helper.make_node("Range", ["zero", "huge", "step"], ["c"])],
        [helper.make_node("Pad", ["x", "pads"], ["c"])],
        [helper.make_node("Pad", ["x", "pads"], ["c"], mode="edge")],
        [helper.make_node("Resize", ["x", "", "scales"], ["c"])],
        [helper.make_node("Expand", ["one", "big"], ["e"]), helper.make_node("Neg", ["e"], ["c"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_values_that_would_exhaust_memory_are_refused(tmp_path: Path, bomb: list[onnx.NodeProto]) -> None:
    nodes, tensors = head("s")
    tensors |= {
        "big": np.array([10**5, 10**6]),
        "one": np.ones((1, 1), np.float32),
        "zero": np.array(0),
        "huge": np.array(10**12),
        "step": np.array(1),
        "pads": np.array([0, 0, 0, 0, 0, 0, 10**6, 10**6]),
        "scales": np.array([1, 1, 1e6, 1e6], np.float32),
    }
    before = [
        *bomb,
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["m"], keepdims=0),
        helper.make_node("Add", ["x", "m"], ["s"]),
    ]
    path = save(model([*before, *nodes], tensors), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="refused"):
        load_onnx(path, TINY)


def beside(path: Path, **entries: str) -> Path:
    """Write a model whose weights lie in another file."""
    nodes, tensors = head("x")
    proto = model(nodes, tensors)
    weight = proto.graph.initializer[0]
    data = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "w.bin", "length": str(len(data))} | entries).items():
        weight.external_data.add(key=key, value=value)
    (path.parent / "w.bin").write_bytes(data)
    return save(proto, path)


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    classifier = load_onnx(beside(tmp_path / "m.onnx"), TINY)
    _, tensors = head()
    expected = tiny().flatten(1) @ torch.from_numpy(tensors["w"]) + torch.from_numpy(tensors["b"])
    torch.testing.assert_close(classifier.logits(tiny()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../w.bin"}, "outside its own folder"),
        ({"location": "/etc/hostname"}, "named by an absolute path, '/etc/hostname'"),
        ({"location": "here"}, "named by an absolute path"),
        ({"location": "link.bin"}, "outside its own folder"),
        ({"location": ""}, "outside its own folder"),
        ({"location": "gone.bin"}, "missing"),
        ({"offset": "8"}, "need 576 bytes"),
        ({"offset": "-8"}, "need 576 bytes"),
        ({"length": "8"}, "need 576 bytes"),
        ({"length": "many"}, "ill described"),
    ],
)
def test_weights_elsewhere_or_too_short_are_refused(
    tmp_path: Path, entries: dict[str, str], message: str
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(576))
    (inner / "link.bin").symlink_to(tmp_path / "w.bin")
    if entries.get("location") == "here":
        entries = {"location": str(inner / "w.bin")}
    path = beside(inner / "m.onnx", **entries)
    with pytest.raises(InputError, match=message) as caught:
        load_onnx(path, TINY)
    assert "\n" not in str(caught.value)
    assert artifact_digest(path).bytes >= path.stat().st_size, "what is refused is told of all the same"


def test_weights_of_a_linked_download_are_found(tmp_path: Path) -> None:
    """A cache of downloads keeps files in one folder and links to them from another."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    beside(blobs / "0a1b")
    (blobs / "w.bin").rename(blobs / "2c3d")
    (snapshot / "m.onnx").symlink_to(blobs / "0a1b")
    (snapshot / "w.bin").symlink_to(blobs / "2c3d")
    assert isinstance(load_onnx(snapshot / "m.onnx", TINY), TorchClassifier)


def test_file_says_what_it_is(small: Path) -> None:
    info = inspect_onnx(small)
    assert (info.input.name, info.input.shape, info.input.dtype) == ("x", (None, 3, 16, 16), "float32")
    assert [value.name for value in info.outputs] == ["y"]
    assert info.outputs[0].shape == (None, 5)
    assert info.opset == 13
    assert {"Conv", "Gemm", "Relu"} <= set(info.operators)
    assert info.producer.startswith("pytorch")
    assert info.layout == "NCHW"
    assert info.image_shape == (3, 16, 16)
    assert info.shape_in("NHWC") == (16, 3, 16)


def opened(data: bytes, path: Path, spec: InputSpec) -> tuple[bool, str, str]:
    """Return whether a model loads and answers two images, what is said if it does not load, and printed."""
    path.write_bytes(data)
    x = torch.rand((2, *spec.shape), generator=torch.Generator().manual_seed(0))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            classifier = load_onnx(path, spec, threads=1)
        except InputError as error:
            return False, str(error), printed.getvalue()
        answers = classifier.logits(x).shape == (2, len(classifier.classes))
    return answers, "", printed.getvalue()


@given(st.binary(max_size=300))
def test_random_bytes_are_no_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(InputError):
        load_onnx(tmp_path / "m.onnx", TINY)


@given(st.data())
@settings(max_examples=100)
def test_damaged_models_load_or_say_why(tmp_path: Path, data: st.DataObject) -> None:
    whole = nhwc(TensorProto.FLOAT).SerializeToString()
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            # the weights are most of the file, and any bytes make weights
            place = data.draw(st.integers(0, 600) | st.integers(0, len(whole) - 1))
            damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    answers, complaint, printed = opened(bytes(damaged), tmp_path / "m.onnx", LAST)
    assert answers != bool(complaint), "it loads and answers, or says why not"
    assert "\n" not in complaint
    assert not complaint or "m.onnx" in complaint
    assert not printed


# --- what the file says of itself --------------------------------------------------------------------------


def with_metadata(path: Path, *, shape: tuple[Any, ...] = ("n", 3, 4, 4), **pairs: str) -> Path:
    """Write a classifier of three classes with key-value pairs; their names have `__` for a dot."""
    start = helper.make_node("Flatten", ["x"], ["f"])
    ending, weights = head(size=48)
    proto = model([start, *ending], weights, shape=shape)
    helper.set_model_props(proto, {name.replace("__", "."): value for name, value in pairs.items()})
    return save(proto, path)


@pytest.mark.parametrize(
    ("pairs", "classes"),
    [
        ({"names": "{0: 'ant', 1: 'bee', 2: 'cat'}"}, ("ant", "bee", "cat")),
        ({"names": '{"2": "cat", "0": "ant", "1": "bee"}'}, ("ant", "bee", "cat")),
        ({"labels": '["ant", "bee", "cat"]'}, ("ant", "bee", "cat")),
        ({"character": "ant\nbee\ncat\n"}, ("ant", "bee", "cat")),
        ({"names": "{0: 'ant', 1: 'bee'}"}, ("0", "1", "2")),
        ({"names": "{0: 'ant', 1: 'ant', 2: 'cat'}"}, ("0", "1", "2")),
        ({"names": "{0: 'ant', 1: 'bee', 5: 'cat'}"}, ("0", "1", "2")),
        ({"names": "__import__('os').system('id')"}, ("0", "1", "2")),
        ({"names": "(" * 5000}, ("0", "1", "2")),
        ({"names": "7"}, ("0", "1", "2")),
    ],
)
def test_class_names_in_the_file_are_read_as_data(
    pairs: dict[str, str], classes: tuple[str, ...], tmp_path: Path
) -> None:
    classifier = open_classifier(with_metadata(tmp_path / "m.onnx", **pairs))
    assert classifier.classes == classes
    assert ("labels" in classifier.spec.assumed) == (classes[0] == "0")
    stated = open_classifier(tmp_path / "m.onnx", options=LoadOptions(labels=("a", "b", "c")))
    assert stated.classes == ("a", "b", "c")


def test_a_size_in_the_file_serves_where_the_input_has_none(tmp_path: Path) -> None:
    pairs = {"imgsz": "[4, 4]", "task": "classify"}
    spec = open_classifier(with_metadata(tmp_path / "m.onnx", shape=("n", 3, "h", "w"), **pairs)).spec
    assert spec.shape == (3, 4, 4)
    assert spec.resize is not None
    assert (spec.resize.height, spec.resize.shortest_edge, spec.resize.crop) == (4, True, (4, 4))
    assert "range" not in spec.assumed
    other = open_classifier(with_metadata(tmp_path / "m.onnx", imgsz="[8, 8]", task="classify")).spec
    assert other.shape == (3, 4, 4), "the file's own input goes before what is written next to it"
    assert other.resize is None


def test_pixels_are_described_as_the_specification_says(tmp_path: Path) -> None:
    pairs = {"Image__BitmapPixelFormat": "Bgr8", "Image__NominalPixelRange": "NominalRange_0_255"}
    spec = open_classifier(with_metadata(tmp_path / "m.onnx", **pairs)).spec
    assert (spec.channel_order, spec.range) == ("BGR", (0.0, 255.0))
    assert "range" not in spec.assumed
