"""Models of every format but Hugging Face: same outputs, the spec that was stated, one line for bad input."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from doorward.core.errors import CouldNotTell, DoorwardError, InputError
from doorward.core.seeds import make_generator
from doorward.models import Classifier, InputSpec, LoadOptions, TorchClassifier, open_classifier, wrap
from doorward.models.architectures import build
from doorward.models.errors import ModelFailed
from doorward.models.formats.export import export_onnx, export_pt2
from doorward.models.formats.input_options import guess_output, resolve_spec
from doorward.models.formats.loading import artifact_digest, detect_format, locate
from doorward.models.formats.native import save_native
from doorward.models.formats.torch_export import open_exported

CLASSES = ("a", "b", "c", "d", "e")
SPEC = InputSpec(channels=3, height=20, width=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), output="logits")


def trained_like(network: nn.Module) -> nn.Module:
    """Give batch norms statistics that are not the identity, so that their order of arguments matters."""
    generator = make_generator(3, "statistics")
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for tensor in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


def images(n: int = 5, spec: InputSpec = SPEC) -> Tensor:
    return torch.rand((n, *spec.shape), generator=make_generator(1, "images"))


def native(directory: Path, name: str = "resnet-8") -> Path:
    network = build(name, channels=3, height=20, width=16, classes=5)
    return save_native(
        trained_like(network), architecture=name, spec=SPEC, classes=CLASSES, directory=directory
    )


@pytest.fixture(scope="module", params=["resnet-8", "small-cnn"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one network in every format."""
    folder = tmp_path_factory.mktemp("formats")
    paths = {"doorward": native(folder / "native", request.param)}
    classifier = open_classifier(paths["doorward"])
    assert isinstance(classifier, TorchClassifier)
    paths["torch.export"] = export_pt2(classifier, folder / "pt2" / "model.pt2")
    paths["onnx"] = export_onnx(classifier, folder / "onnx" / "model.onnx")
    return paths


@pytest.mark.parametrize("kind", ["doorward", "torch.export", "onnx"])
def test_every_format_gives_the_same_outputs(kind: str, saved: dict[str, Path]) -> None:
    name = json.loads((saved["doorward"] / "config.json").read_text())["architecture"]["name"]
    network = build(name, channels=3, height=20, width=16, classes=5).eval()
    network.load_state_dict(safetensors.torch.load_file(saved["doorward"] / "model.safetensors"))
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (SPEC.mean, SPEC.std))
    x = images()
    with torch.no_grad():
        expected = network((x - mean) / std)
    classifier = open_classifier(saved[kind])
    assert classifier.format == kind
    torch.testing.assert_close(classifier.logits(x), expected, rtol=1e-4, atol=1e-4)
    assert classifier.spec == SPEC
    assert classifier.spec.assumed == ()
    assert classifier.classes == CLASSES
    assert classifier.capabilities == {"graph", "weights", "gradients", "features", "probabilities"}
    assert classifier.features(x).shape == (5, 64 if name == "resnet-8" else 128)
    assert detect_format(saved[kind]) == kind


@pytest.mark.parametrize("kind", ["torch.export", "onnx"])
def test_every_format_gives_the_same_gradients(kind: str, saved: dict[str, Path]) -> None:
    gradients = []
    for path in (saved["doorward"], saved[kind]):
        x = images().requires_grad_()
        open_classifier(path).logits(x)[:, 2].sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_loading_and_exporting_leave_the_host_alone(tmp_path: Path, untouched: Callable[[], Any]) -> None:
    with untouched():
        classifier = open_classifier(native(tmp_path / "native"))
        assert isinstance(classifier, TorchClassifier)
        classifier.module.train()
        open_classifier(export_pt2(classifier, tmp_path / "model.pt2"))
    assert all(module.training for module in classifier.module.modules())


# --- torch.export ------------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """What programs are made of beyond layers: constants, shared weights, in-place steps, sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 6, 1, bias=False)
        self.norm, self.layers = nn.BatchNorm2d(6), nn.ModuleList([nn.Linear(6, 6), nn.LayerNorm(6)])
        self.head, self.dropout = nn.Linear(6, 4), nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)
        self.shift = torch.arange(6.0)

    def forward(self, image: Tensor) -> Tensor:
        n, _, h, _ = image.shape
        x = self.second(self.first(image)).relu_()
        x = self.second(self.norm(x)) + torch.full((n, 1, h, 1), 0.5, device=x.device)
        x = x.flatten(2).mean(2) * self.scale + self.shift
        left, right = self.layers[0](x).chunk(2, dim=1)
        x = torch.cat([left.sigmoid(), nn.functional.gelu(right, approximate="tanh")], dim=1)
        with torch.no_grad():
            offset = self.layers[1](x)
        logits: Tensor = self.head(self.dropout(x + offset))
        return logits


def exported(
    network: nn.Module,
    path: Path,
    *,
    shape: tuple[int, ...] = (3, 12, 12),
    batch: int | None = None,
    decompose: bool = False,
) -> Path:
    """Export a network with torch itself."""
    dynamic = ({0: torch.export.Dim("n", min=1)},) if batch is None else None
    program = torch.export.export(network, (torch.zeros(batch or 2, *shape),), dynamic_shapes=dynamic)
    torch.export.save(program.run_decompositions() if decompose else program, path)
    return path


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 4])
@pytest.mark.filterwarnings("ignore")  # torch's own exporter deprecates itself
def test_a_program_computes_what_torch_computes(batch: int | None, decompose: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = trained_like(Awkward())
    classifier = open_classifier(exported(network, tmp_path / "m.pt2", batch=batch, decompose=decompose))
    assert isinstance(classifier, TorchClassifier)
    x = torch.rand(6, 3, 12, 12)
    before = x.clone()
    torch.testing.assert_close(classifier.logits(x), network(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)
    assert classifier.features(x).shape == (6, 6)
    head = classifier.module.get_submodule("head")
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(head(classifier.features(x)), classifier.logits(x))
    assert set(dict(classifier.module.named_parameters())) == set(dict(network.named_parameters()))
    assert isinstance(classifier.module.get_submodule("first"), nn.Conv2d)
    assert classifier.convolutions == 1, "a kernel of one pixel does not count"
    assert classifier.spec.assumed == ("range", "mean", "std", "output", "labels")


@pytest.mark.filterwarnings("ignore")
def test_a_copy_of_a_program_has_weights_of_its_own(tmp_path: Path) -> None:
    classifier = open_classifier(exported(trained_like(Awkward()), tmp_path / "m.pt2"))
    assert isinstance(classifier, TorchClassifier)
    x = torch.rand(2, 3, 12, 12)
    before = classifier.logits(x)
    other = copy.deepcopy(classifier.module)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not torch.equal(other(x), before)
    assert torch.equal(classifier.logits(x), before)


class BatchOfOne(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor], outputs: int = 3) -> None:
        super().__init__()
        self.linear, self.end = nn.Linear(12, outputs), end

    def forward(self, image: Tensor) -> Tensor:
        return self.end(self.linear(image.mean((2, 3)).repeat(1, 4).reshape(1, 12)))


@pytest.mark.parametrize(
    ("end", "outputs", "kind"),
    [
        (lambda y: y, 3, "logits"),
        (lambda y: y.softmax(1), 3, "probabilities"),
        (lambda y: y.sigmoid(), 1, "probabilities"),
        (lambda y: 5 * y, 1, "one_logit"),
    ],
)
def test_a_fixed_batch_is_looped_and_outputs_become_logits(
    end: Callable[[Tensor], Tensor], outputs: int, kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    network = BatchOfOne(end, outputs)
    classifier = open_classifier(exported(network, tmp_path / "m.pt2", batch=1))
    assert isinstance(classifier, TorchClassifier)
    assert classifier.batch == 1
    x = torch.rand(5, 3, 12, 12)
    with torch.no_grad():
        y = torch.cat([network(one[None]) for one in x])
    if kind == "one_logit":
        expected = torch.stack([1 - y.sigmoid(), y.sigmoid()], 1)[..., 0]
    elif outputs == 1:
        expected = torch.cat([1 - y, y], 1)
    else:
        expected = y if kind == "probabilities" else y.softmax(1)
    torch.testing.assert_close(classifier.logits(x).softmax(1), expected)
    assert len(classifier.classes) == max(2, outputs)
    assert "labels" in classifier.spec.assumed
    assert ("output" in classifier.spec.assumed) == kind.startswith(("logits", "one"))
    if kind != "one_logit":
        assert classifier.features(x).shape == (5, 12)


@pytest.mark.parametrize("end", ["softmax", "sigmoid"])
def test_confident_probabilities_keep_their_gradient(end: str, tmp_path: Path) -> None:
    """A softmax rounds small probabilities to 0, whose logarithm has no slope; the logits have one."""
    network = BatchOfOne(
        lambda y: getattr(100 * y, end)(*([1] if end == "softmax" else [])), 3 if end == "softmax" else 1
    )
    classifier = open_classifier(exported(network, tmp_path / "m.pt2", batch=1))
    x = torch.ones(1, 3, 12, 12, requires_grad=True)
    logits = classifier.logits(x)
    (logits[0, 0] - logits[0, 1]).backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore")
def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training mode|changes weights"):
        open_classifier(exported(Awkward().train(), tmp_path / "m.pt2"))


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        (nn.Conv2d(3, 4, 3), (3, 8, 8), "one row of outputs"),
        (nn.Linear(4, 2), (4,), "takes"),
    ],
)
def test_programs_that_classify_no_images_are_refused(
    network: nn.Module, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        open_classifier(exported(network, tmp_path / "m.pt2", shape=shape))


def test_channels_last_is_seen_by_the_shape(tmp_path: Path) -> None:
    class Last(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.mean((1, 2)) * torch.tensor([1.0, -2.0, 3.0])

    classifier = open_classifier(exported(Last(), tmp_path / "m.pt2", shape=(9, 7, 3)))
    assert classifier.spec.layout == "NHWC"
    assert classifier.spec.shape == (3, 9, 7)
    x = torch.rand(2, 3, 9, 7)
    torch.testing.assert_close(classifier.logits(x), x.mean((2, 3)) * torch.tensor([1.0, -2.0, 3.0]))


class Standardised(nn.Conv2d):
    """A convolution whose weights are standardised as it runs, by a batch norm that is always in training."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [
            nn.Conv2d(3, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 6),
            nn.BatchNorm1d(6),
        ],
        lambda: [nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.BatchNorm1d(8), nn.AdaptiveAvgPool1d(1), nn.Flatten()],
        lambda: [
            nn.Unflatten(1, (1, 3)),
            nn.Conv3d(1, 6, (1, 3, 3)),
            nn.BatchNorm3d(6),
            nn.Flatten(),
            nn.ReLU(),
        ],
        lambda: [Standardised(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_norms_of_other_shapes_and_standardised_weights_are_read(
    layers: Callable[[], list[nn.Module]], decompose: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(*layers(), nn.LazyLinear(5)), torch.rand(6, 3, 12, 12)
    network(x)
    trained_like(network)
    path = exported(network, tmp_path / "m.pt2", decompose=decompose)
    with torch.no_grad():
        given = open_exported(path, LoadOptions()).logits(x)
        torch.testing.assert_close(given, network(x), rtol=1e-4, atol=1e-4)


def test_a_program_for_a_billion_images_is_refused(tmp_path: Path) -> None:
    path = exported(
        nn.Sequential(nn.Flatten(), nn.Linear(27, 2)), tmp_path / "m.pt2", shape=(3, 3, 3), batch=7
    )
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "huge.pt2", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b'"as_int": 7', b'"as_int": 1000000000'))
    with pytest.raises(InputError, match="takes 1,000,000,000 images at a time, which is too many"):
        open_classifier(tmp_path / "huge.pt2")


def test_operators_that_are_no_arithmetic_are_refused(tmp_path: Path) -> None:
    path = exported(nn.Sequential(nn.Flatten(), nn.Linear(27, 2)), tmp_path / "m.pt2", shape=(3, 3, 3))
    for target, message in (
        ("torch.ops.aten.linear.nothing", "no operator"),
        ("torch.ops.mine.linear.default", "not supported"),
        ("torch.ops.aten.save.default", "reads or writes files"),
    ):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        evil = tmp_path / "evil.pt2"
        with zipfile.ZipFile(evil, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(b"torch.ops.aten.linear.default", target.encode()))
        with pytest.raises(DoorwardError, match=message):
            open_classifier(evil)


# --- what is stated, and what is assumed -------------------------------------------------------------------


def test_options_go_before_the_file_beside_the_model(saved: dict[str, Path]) -> None:
    stated = LoadOptions(mean=(0.0,), std=(0.5,), input_range=(-1.0, 1.0), labels=tuple("vwxyz"))
    plain, other = (
        open_classifier(saved["torch.export"]),
        open_classifier(saved["torch.export"], options=stated),
    )
    assert other.classes == tuple("vwxyz")
    x = images()
    ours = (2 * x - 1) / 0.5
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (SPEC.mean, SPEC.std))
    torch.testing.assert_close(other.logits(x), plain.logits(ours * std + mean), rtol=1e-4, atol=1e-4)
    assert other.spec.assumed == ()


def test_what_nothing_states_is_assumed_field_by_field() -> None:
    size = {"channels": 1, "height": 4, "width": 4}
    assert resolve_spec("m", size).assumed == ("range", "mean", "std", "layout", "output")
    assert resolve_spec("m", size, {"mean": (0.5,)}).assumed == ("layout", "output")
    assert resolve_spec("m", size, {"output": "logits"}, {"layout": "NCHW"}).assumed == (
        "range",
        "mean",
        "std",
    )
    assert resolve_spec("m", size | {"dtype": "uint8"}).range == (0.0, 255.0)
    assert resolve_spec("m", {}, {"height": 3}, size | {"height": 9}).height == 3
    with pytest.raises(InputError, match="height is 4 by the file itself, 9 was stated"):
        resolve_spec("m", size, {"height": 9})
    with pytest.raises(InputError, match="too large"):
        resolve_spec("m", size | {"height": 10**6, "width": 10**6})


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        ([[0.2, 0.8], [1.0, 0.0]], "probabilities"),
        ([[0.2, 0.9], [1.0, 0.0]], "logits"),
        ([[-0.2, 1.2]], "logits"),
        ([[0.3], [0.9]], "probabilities"),
        ([[0.3], [-0.9]], "one_logit"),
        ([[float("nan"), 1.0]], "logits"),
        ([[float("nan")]], "one_logit"),
    ],
)
def test_the_kind_of_output_is_guessed_from_its_numbers(y: list[list[float]], kind: str) -> None:
    assert guess_output(torch.tensor(y)) == kind


@pytest.mark.parametrize("options", [LoadOptions(labels=("one", "two")), LoadOptions(labels=("one",) * 6)])
def test_labels_that_do_not_fit_the_outputs_are_refused(options: LoadOptions, saved: dict[str, Path]) -> None:
    for path in saved.values():
        with pytest.raises(InputError, match=f"{len(options.labels or ())} labels"):
            open_classifier(path, options=options)


def test_a_model_that_gives_nan_is_opened(tmp_path: Path) -> None:
    network = build("small-cnn", channels=3, height=20, width=16, classes=5)
    next(network.parameters()).data.fill_(float("nan"))
    path = save_native(
        network, architecture="small-cnn", spec=SPEC, classes=CLASSES, directory=tmp_path / "nan"
    )
    classifier = open_classifier(path)
    assert classifier.raw_logits(images()).isnan().all()
    with pytest.raises(CouldNotTell, match="outputs that are not finite"):
        classifier.logits(images())


def test_a_description_beside_the_file_is_checked(saved: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model.pt2"
    model.write_bytes(saved["torch.export"].read_bytes())
    for text, message in (
        ("[]", "must hold a JSON object"),
        ("{", "not readable as JSON"),
        ('{"classes": 3}', "classes"),
        ('{"input": {"size": 3}}', "no field 'size'"),
        ('{"input": {"mean": "dark"}}', "mean"),
        ('{"input": {"std": [0, 1, 1]}}', "std must be positive"),
        ('{"input": {"height": 99}}', "height is 20 by the file itself"),
        ('{"version": 2}', "version"),
    ):
        (tmp_path / "doorward.json").write_text(text)
        with pytest.raises(InputError, match=message) as error:
            open_classifier(model)
        assert "\n" not in str(error.value)


# --- the user's own code -----------------------------------------------------------------------------------

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))

def broken():
    raise RuntimeError("out of luck")

def nothing():
    return 3
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_factory_builds_what_the_weights_fill(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    weights = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 3}, weights
        )
    else:
        safetensors.torch.save_file(network.state_dict(), weights)
    options = LoadOptions(size=(3, 4, 4))
    classifier = open_classifier(
        "", factory=f"{tmp_path / 'mine.py'}:build", weights=weights, options=options
    )
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(classifier.logits(x), network(x))
    assert classifier.format == "factory"
    assert open_classifier(weights, factory=f"{tmp_path / 'mine.py'}:build", options=options).classes == (
        "0",
        "1",
        "2",
    )


def test_a_factory_by_module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_by_name.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    safetensors.torch.save_file(
        nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).state_dict(), tmp_path / "w.safetensors"
    )
    classifier = open_classifier(
        tmp_path / "w.safetensors", factory="factory_by_name:build", options=LoadOptions(size=(3, 4, 4))
    )
    assert len(classifier.classes) == 3


VIEWS = """
from torch import nn


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(128, 3)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.linear(x.view(x.size(0), -1))
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2"])
def test_code_that_minds_how_images_are_laid_out_is_run_as_it_wants(suffix: str, tmp_path: Path) -> None:
    """`view` after a convolution is in many a tutorial."""
    (tmp_path / "views.py").write_text(VIEWS)
    namespace: dict[str, Any] = {}
    exec(VIEWS, namespace)
    network = namespace["Views"]().eval()
    path = tmp_path / f"model{suffix}"
    factory = None
    if suffix == ".pt2":
        torch.export.save(torch.export.export(network, (torch.rand(2, 3, 4, 4),)), path)
    else:
        safetensors.torch.save_file(network.state_dict(), path)
        factory = f"{tmp_path / 'views.py'}:Views"
    classifier = open_classifier(path, factory=factory, options=LoadOptions(size=(3, 4, 4)))
    x = torch.rand(6, 3, 4, 4, requires_grad=True)
    y = classifier.logits(x)
    torch.testing.assert_close(y, network(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("factory", "state", "message"),
    [
        ("mine.py:missing", None, "no function 'missing'"),
        ("mine.py:broken", None, "RuntimeError: out of luck"),
        ("mine.py:nothing", None, "the function gave: int"),
        ("mine.py", None, "expected package.module:function"),
        ("gone.py:build", None, "cannot import"),
        ("no.such.module:build", None, "No module named 'no'"),
        ("mine.py:build", {"1.weight": torch.zeros(3, 48)}, "they lack 1.bias"),
        (
            "mine.py:build",
            {"1.weight": torch.zeros(3, 47), "1.bias": torch.zeros(3)},
            r"another shape in 1.weight \(3, 47\)",
        ),
        (
            "mine.py:build",
            {"1.weight": torch.zeros(3, 48), "1.bias": torch.zeros(3), "x": torch.zeros(1)},
            "unknown x",
        ),
    ],
)
def test_what_is_wrong_with_a_factory_is_said(
    factory: str, state: dict[str, Tensor] | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    safetensors.torch.save_file(state or {"1.weight": torch.zeros(3, 48)}, tmp_path / "w.safetensors")
    place = factory if factory.startswith("no.") else f"{tmp_path}/{factory}"
    with pytest.raises(InputError, match=message):
        open_classifier(tmp_path / "w.safetensors", factory=place, options=LoadOptions(size=(3, 4, 4)))


def test_weights_alone_ask_for_the_network(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="--factory"):
        open_classifier(tmp_path / "w.pt")
    (tmp_path / "mine.py").write_text(FACTORY)
    with pytest.raises(InputError, match="how large its images are"):
        open_classifier(tmp_path / "w.pt", factory=f"{tmp_path}/mine.py:build") if False else resolve_spec(
            "w.pt", {}
        )
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="expected tensors by name"):
        open_classifier(tmp_path / "list.pt", factory=f"{tmp_path}/mine.py:build")


# --- wrap --------------------------------------------------------------------------------------------------


def test_a_module_of_ones_own_is_wrapped_as_it_is(untouched: Callable[[], Any]) -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 8), nn.Dropout(0.5), nn.Linear(8, 3), nn.Softmax(1)
    ).train()
    before = copy.deepcopy(network.state_dict())
    with untouched():
        classifier = wrap(network, classes=("a", "b", "c"), size=(3, 4, 4))
        x = torch.ones(2, 3, 4, 4)
        logits = classifier.logits(x)
    assert network.training
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    torch.testing.assert_close(logits.softmax(1), network.eval()(x))
    assert classifier.features(x).shape == (2, 8)
    assert classifier.spec.output == "logits"


def test_logits_of_two_heads_have_no_features() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            mean, spread = x.mean((2, 3)), x.std((2, 3))
            return self.first(mean) + self.second(spread) - self.second(torch.zeros(3))

    classifier = wrap(TwoHeads(), size=(3, 4, 4))  # on a grey image the second head adds nothing
    assert "features" not in classifier.capabilities
    with pytest.raises(CouldNotTell, match="--features"):
        classifier.features(torch.rand(1, 3, 4, 4))


def test_a_function_of_ones_own_is_wrapped() -> None:
    weight = torch.randn(3, 2, generator=make_generator(0, "w"))
    smooth = wrap(lambda x: x.mean((2, 3)) @ weight, size=(3, 4, 4))
    assert smooth.capabilities == {"probabilities", "gradients"}
    rough = wrap(lambda x: torch.from_numpy(x.detach().numpy().mean((2, 3)) @ weight.numpy()), size=(3, 4, 4))
    assert rough.capabilities == {"probabilities"}
    x = torch.rand(4, 3, 4, 4)
    torch.testing.assert_close(rough.logits(x), smooth.logits(x))
    with pytest.raises(CouldNotTell):
        smooth.features(x)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.Linear(4, 2), {"size": (3, 4, 4)}, "one row of outputs"),
        (nn.Linear(5, 2), {"size": (3, 4, 4)}, "does not run on images of 3x4x4"),
        (
            nn.Flatten(),
            {"size": (3, 4, 4), "classes": ("a",)},
            "1 label for a model that tells 48 classes apart",
        ),
        (nn.Flatten(), {}, "either size"),
        (nn.Flatten(), {"size": (3, 4, 4), "features": "head"}, "no such layer"),
        (nn.Flatten(), {"size": (0, 4, 4)}, "channels"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(48, 1)),
            {"spec": InputSpec(channels=3, height=4, width=4)},
            "one_logit",
        ),
        (lambda x: 3, {"size": (3, 4, 4)}, "gives a int"),
    ],
)
def test_what_cannot_be_wrapped_is_said(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrap(model, **arguments)


# --- bad input ---------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing path": (lambda p: p / "gone", "no such file or directory"),
    "missing file": (lambda p: p / "gone.onnx", "no such file or directory"),
    "null byte": (lambda p: Path(f"{p}\0"), "no such file or directory"),
    "long name": (lambda p: p / ("x" * 5000), "no usable path"),
    "empty folder": (lambda p: p, "it holds no model file"),
}


def _bad(name: str, message: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def keep(function: Callable[[Path], Path]) -> Callable[[Path], Path]:
        BAD[name] = (function, message)
        return function

    return keep


@_bad("folder without config", "holds model.pt2: give that file")
def _(path: Path) -> Path:
    (path / "model.pt2").write_bytes(b"")
    return path


@_bad("truncated safetensors", "it is cut off")
def _(path: Path) -> Path:
    truncate(native(path) / "model.safetensors")
    return path


@_bad("weights missing", "no such file of weights")
def _(path: Path) -> Path:
    (native(path) / "model.safetensors").unlink()
    return path


@_bad("unknown architecture", "no architecture named 'transformer'")
def _(path: Path) -> Path:
    config = native(path) / "config.json"
    config.write_text(config.read_text().replace('"resnet-8"', '"transformer"'))
    return path


@_bad("other architecture", "the weights do not fit the network")
def _(path: Path) -> Path:
    config = native(path) / "config.json"
    config.write_text(config.read_text().replace('"resnet-8"', '"resnet-14"'))
    return path


@_bad("fewer names", "4 class names for 5 classes")
def _(path: Path) -> Path:
    config = native(path) / "config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {"classes": ["a", "b", "c", "d"]}))
    return path


@_bad("noise named .pt2", "not a readable torch.export program")
def _(path: Path) -> Path:
    (path / "m.pt2").write_bytes(bytes(range(256)))
    return path / "m.pt2"


@_bad("noise named .onnx", "ONNX")
def _(path: Path) -> Path:
    (path / "m.onnx").write_bytes(bytes(range(256)))
    return path / "m.onnx"


@_bad("noise named .safetensors", "--factory")
def _(path: Path) -> Path:
    (path / "m.safetensors").write_bytes(bytes(range(256)))
    return path / "m.safetensors"


@_bad("another kind of file", "a model is a directory, an .onnx or a .pt2 file")
def _(path: Path) -> Path:
    (path / "m.txt").write_text("hello")
    return path / "m.txt"


@_bad("state_dict named .pt2", "expected one|not a readable")
def _(path: Path) -> Path:
    torch.save(nn.Linear(1, 1).state_dict(), path / "m.pt2")
    return path / "m.pt2"


@_bad("program of torch 2.7", "export it again with torch 2.8 or later")
def _(path: Path) -> Path:
    with zipfile.ZipFile(path / "m.pt2", "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", "{}")
    return path / "m.pt2"


@_bad("member twice", "holds 'm/models/model.json' twice")
def _(path: Path) -> Path:
    exported(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), path / "m.pt2", shape=(3, 2, 2))
    with warnings.catch_warnings(), zipfile.ZipFile(path / "m.pt2", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("m/models/model.json", "{}")
    return path / "m.pt2"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_with_one_clear_line(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        open_classifier(make(tmp_path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        problem.append((name, tuple(allow_patterns)))
        return str(native(tmp_path / "snapshot"))

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert locate("owner/model-1.0") == tmp_path / "snapshot"
    assert problem == [("owner/model-1.0", ("*.json", "*.txt", "*.model", "*.safetensors"))]

    def offline(name: str, *, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"the hub does not give a model of that name: no network$"):
        open_classifier("owner/model")


# --- digests -----------------------------------------------------------------------------------------------


def test_a_digest_names_the_files_that_matter(tmp_path: Path) -> None:
    path = native(tmp_path / "model")
    names = ("config.json", "model.safetensors")
    lines = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    digest = artifact_digest(path)
    assert digest.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest.bytes == sum(file.stat().st_size for file in path.iterdir())
    (path / "README.md").write_text("hello")
    (path / "report.json").write_text("{}")
    assert artifact_digest(path) == digest
    (path / "code.py").write_text("pass")
    assert artifact_digest(path) != digest
    single = artifact_digest(path / "model.safetensors")
    assert single.sha256 == lines[1].split()[0]


@pytest.mark.parametrize(
    "name",
    ["a.pkl", "a.ckpt", "a.joblib", "a.npz", "lib.so", "a.keras", "sub/deep.xyz", "noname"],
)
def test_a_digest_covers_files_of_every_kind(name: str, tmp_path: Path) -> None:
    path = native(tmp_path / "model")
    before = artifact_digest(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"1")
    middle = artifact_digest(path)
    (path / name).write_bytes(b"2")
    assert len({before, middle, artifact_digest(path)}) == 3


def test_a_digest_covers_whatever_an_index_names_and_nothing_outside(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("model/.git", "model/docs", "outside"):
        (tmp_path / name).mkdir(parents=True)
    index = {"weight_map": {"a": ".git/part", "b": "docs/README.md"}, "metadata": {}}
    for name, content in {"config.json": {}, "model.safetensors.index.json": index}.items():
        (path / name).write_text(json.dumps(content))
    (path / ".git/other").write_bytes(b"0")
    before = artifact_digest(path)
    for name in ("model/.git/part", "model/docs/README.md"):
        (tmp_path / name).write_bytes(b"1")
        after = artifact_digest(path)
        assert after != before
        before = after
    (path / ".git/other").write_bytes(b"1")
    (tmp_path / "outside/weights").write_bytes(b"1")
    (path / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    (path / "weights.bin").symlink_to(tmp_path / "outside/weights")
    os.mkfifo(path / "pipe.bin")
    assert artifact_digest(path) == before


def test_the_digest_of_an_onnx_file_covers_the_weights_beside_it(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.numpy_helper.from_array(np.ones(300, dtype=np.float32), "w")
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [300])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [value], [tensor]))
    onnx.save_model(
        model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0
    )
    before = artifact_digest(tmp_path / "m.onnx")
    assert before.bytes == (tmp_path / "m.onnx").stat().st_size + (tmp_path / "m.data").stat().st_size
    (tmp_path / "m.data").write_bytes(bytes(1200))
    assert artifact_digest(tmp_path / "m.onnx").sha256 != before.sha256


# --- fuzz --------------------------------------------------------------------------------------------------


class Files(dict[str, bytes]):
    """Files by suffix, and keep them out of the reports of failures."""

    def __repr__(self) -> str:
        return f"<{', '.join(self)}>"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return small valid files to damage, by suffix."""
    folder = tmp_path_factory.mktemp("small")
    path = exported(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), folder / "m.pt2", shape=(3, 2, 2))
    weights = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).state_dict()
    safetensors.torch.save_file(weights, folder / "w.safetensors")
    torch.save(weights, folder / "w.pt")
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("GlobalAveragePool", ["x"], ["z"]),
            onnx.helper.make_node("Flatten", ["z"], ["y"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 2, 2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return Files(
        {
            ".pt2": path.read_bytes(),
            ".safetensors": (folder / "w.safetensors").read_bytes(),
            ".pt": (folder / "w.pt").read_bytes(),
            ".onnx": model.SerializeToString(),
        }
    )


def outcome(*arguments: Any, **options: Any) -> Classifier | str:
    """Open a model; return it, or our error's one line. Any other error goes through."""
    try:
        return open_classifier(*arguments, **options)
    except DoorwardError as error:
        return str(error)


def assert_ours(result: Classifier | str) -> None:
    if isinstance(result, str):
        assert "\n" not in result
    else:
        x = torch.rand(2, *result.spec.shape, generator=torch.Generator().manual_seed(0))
        with suppress(ModelFailed):  # a range of 1e37 is one, and nothing finite comes of it
            assert result.logits(x).shape == (2, len(result.classes))


@settings(max_examples=120)
@given(
    st.sampled_from([".pt2", ".safetensors", ".pt", ".onnx"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
    st.one_of(st.none(), st.floats(0, 1)),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_raise_nothing_but_our_errors(
    small: Files, tmp_path: Path, suffix: str, flips: list[tuple[float, int]], cut: float | None
) -> None:
    data = bytearray(small[suffix])
    for place, value in flips:
        data[int(place * (len(data) - 1))] ^= value
    if cut is not None:
        data = data[: int(cut * len(data))]
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(data)
    (tmp_path / "mine.py").write_text(FACTORY)
    factory = f"{tmp_path}/mine.py:build" if suffix in (".safetensors", ".pt") else None
    size = (3, 4, 4) if factory else None
    assert_ours(outcome(path, factory=factory, options=LoadOptions(size=size)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths_in(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value inside a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, one in inner for found in paths_in(one, (*place, key)))]


def replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    document = copy.copy(document)
    document[place[0]] = replaced(document[place[0]], place[1:], value)
    return document


@given(st.data())
def test_wrong_types_in_a_configuration_raise_nothing_but_our_errors(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "model"
    if not path.exists():
        native(path, "small-cnn")
        (path / "good.json").write_bytes((path / "config.json").read_bytes())
    document = json.loads((path / "good.json").read_text())
    place = data.draw(st.sampled_from(paths_in(document)))
    (path / "config.json").write_text(json.dumps(replaced(document, place, data.draw(JSON))))
    assert_ours(outcome(path))


@settings(max_examples=100)
@given(st.data())
def test_wrong_types_in_a_program_raise_nothing_but_our_errors(
    small: Files, tmp_path: Path, data: st.DataObject
) -> None:
    (tmp_path / "good.pt2").write_bytes(small[".pt2"])
    with zipfile.ZipFile(tmp_path / "good.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = data.draw(st.sampled_from([name for name in members if name.endswith(".json")]))
    document = json.loads(members[name])
    place = data.draw(st.sampled_from(paths_in(document)))
    members[name] = json.dumps(replaced(document, place, data.draw(JSON))).encode()
    with zipfile.ZipFile(tmp_path / "bad.pt2", "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    assert_ours(outcome(tmp_path / "bad.pt2"))


@pytest.mark.filterwarnings("ignore")
def test_an_export_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None].expand(-1, 2) if float(x.sum()) > 0 else x.flatten(1)[:, :2]

    classifier = TorchClassifier(Branching(), InputSpec(channels=1, height=4, width=4), ["a", "b"])
    with pytest.raises(InputError, match="cannot be exported"):
        export_pt2(classifier, tmp_path / "new" / "model.pt2")
    assert list(tmp_path.iterdir()) == []
