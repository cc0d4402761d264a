"""Hugging Face directories: outputs and preprocessing are those of transformers, and nothing is executed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from doorward.core.errors import DoorwardError, InputError, MissingExtra, UnsafeArtifact
from doorward.models import LoadOptions, TorchClassifier, open_classifier
from doorward.models.encode.image import fit_image, to_float
from doorward.models.errors import NotExamined
from doorward.models.spec import InputSpec

transformers = pytest.importorskip("transformers")

from doorward.models.formats.huggingface import quiet  # noqa: E402 - after the check that transformers is there
from doorward.models.formats.image_processors import describe_processor, refuse_difference  # noqa: E402

LABELS = {0: "cat", 1: "dog", 2: "eel"}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
#: Name of the model in transformers: its configuration, its Pillow processor, and that one's settings.
MODELS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "ResNet": (
        {"embedding_size": 8, "layer_type": "basic", **STAGES},
        "ConvNext",
        {"size": {"shortest_edge": 32}},
    ),
    "ViT": (VIT, "ViT", {"size": {"height": 32, "width": 32}}),
    "ConvNext": ({"num_stages": 2, **STAGES}, "ConvNext", {"size": {"shortest_edge": 64}, "crop_pct": 0.875}),
    "MobileNetV2": (
        {"depth_multiplier": 0.25, "image_size": 32},
        "MobileNetV2",
        {"size": {"shortest_edge": 48}, "crop_size": {"height": 32, "width": 32}},
    ),
    "Swin": (
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 4,
        },
        "ViT",
        {
            "size": {"height": 32, "width": 32},
            "resample": 3,
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.3, 0.2],
        },
    ),
    "Beit": (
        VIT,
        "Beit",
        {
            "size": {"height": 36, "width": 40},
            "crop_size": {"height": 32, "width": 32},
            "do_center_crop": True,
        },
    ),
    "DeiT": (VIT, "DeiT", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
    "EfficientNet": (
        {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
        "EfficientNet",
        {"size": {"height": 32, "width": 32}, "rescale_offset": True, "rescale_factor": 1 / 127.5},
    ),
}


def save(name: str, path: Path, **changes: Any) -> Any:
    """Write a model with random weights and its processor; return the module."""
    config, processor, given_to_it = MODELS[name]
    torch.manual_seed(0)
    with quiet():
        made = getattr(transformers, f"{name}Config")(**config, id2label=LABELS, **changes)
        module = getattr(transformers, f"{name}ForImageClassification")(made).eval()
        module.save_pretrained(path)
        getattr(transformers, f"{processor}ImageProcessorPil")(**given_to_it).save_pretrained(path)
    return module


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "model"
    save("ViT", path)
    return path


@pytest.fixture
def copied(vit: Path, tmp_path: Path) -> Path:
    """Return a copy of the ViT to be damaged."""
    return shutil.copytree(vit, tmp_path / "copy")


def changed(path: Path, file: str, **values: Any) -> None:
    document = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(document | values))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_preprocessing_are_those_of_transformers(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = save(name, tmp_path)
    capfd.readouterr()
    classifier = open_classifier(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert isinstance(classifier, TorchClassifier)
    assert classifier.format == "huggingface"
    assert classifier.architecture == f"{name}ForImageClassification"
    assert classifier.classes == ("cat", "dog", "eel")
    assert classifier.spec.assumed == ()
    assert {"features", "gradients"} <= classifier.capabilities
    assert not classifier.module.training
    rng = np.random.default_rng(0)
    with quiet():
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    rows, expected = [], []
    for height, width, channels in [(53, 91, 3), (200, 120, 1), (17, 23, 4), (32, 32, 3), (401, 399, 1)]:
        pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        picture = Image.fromarray(pixels.squeeze()).convert("RGB")  # as transformers' pipelines open images
        own = processor(picture, return_tensors="pt")["pixel_values"]
        fitted = torch.from_numpy(fit_image(pixels, classifier.spec).transpose(2, 0, 1).copy())[None]
        torch.testing.assert_close(classifier.spec.to_model(to_float(fitted)), own, rtol=0, atol=1e-5)
        rows.append(to_float(fitted))
        expected.append(own)
    with torch.no_grad():
        logits = module(torch.cat(expected)).logits
        torch.testing.assert_close(classifier.logits(torch.cat(rows)), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Levit", {}),
        ("Levit", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
        ("MobileViT", {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}),
        ("MobileViT", {"size": {"shortest_edge": 56}, "crop_size": {"height": 64, "width": 64}}),
        ("Perceiver", {}),
        ("Perceiver", {"size": {"height": 60, "width": 60}, "crop_size": {"height": 64, "width": 64}}),
    ],
)
@pytest.mark.parametrize("size", [(50, 70), (81, 64)])
def test_processors_that_compute_in_their_own_way_are_followed(
    name: str, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    processor = getattr(transformers, f"{name}ImageProcessorPil")(**settings)
    spec = InputSpec(channels=3, **describe_processor(processor, Path("model")))
    refuse_difference(processor, spec, Path("model"))
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    own = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    ours = spec.to_model(to_float(torch.from_numpy(fit_image(pixels, spec).transpose(2, 0, 1).copy())[None]))
    assert own.shape == tuple(ours.shape[1:])
    assert np.abs(own - ours[0].numpy()).max() <= 1.01 / 255 / min(spec.std)


class PPLCNetImageProcessor:
    """Stands for the processor of PP-LCNet, which needs torchvision; it swaps colours at the end."""

    do_resize = do_rescale = do_normalize = do_center_crop = True
    resample, size, resize_short, size_divisor = 2, {"height": 256, "width": 256}, 72, 1
    crop_size = {"height": 64, "width": 64}  # noqa: RUF012 - as there
    image_mean, image_std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)


def test_the_processor_of_pp_lcnet_is_understood() -> None:
    spec = InputSpec(channels=3, **describe_processor(PPLCNetImageProcessor(), Path("model")))
    assert spec.channel_order == "BGR"
    pixels = np.zeros((100, 143, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 255, 51
    given = spec.to_model(to_float(torch.from_numpy(fit_image(pixels, spec).transpose(2, 0, 1).copy())[None]))
    red, green, blue = (1 - 0.4) / 0.1, (0.2 - 0.5) / 0.2, (0 - 0.6) / 0.3
    torch.testing.assert_close(given[0, :, 0, 0], torch.tensor([blue, green, red]))
    # 143 * 72 / 100 is 102.96: the nearest width is 103
    assert spec.resize is not None
    assert spec.resize.nearest


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.onnx", r"those of an ONNX model: give that file, .*/model\.onnx"),
        ("onnx/model.onnx", r"those of an ONNX model: give that file, .*/onnx/model\.onnx"),
        ("tf_model.h5", r"tf_model\.h5 holds weights of TensorFlow"),
        ("flax_model.msgpack", r"flax_model\.msgpack holds weights of Flax"),
    ],
)
def test_weights_of_another_library_are_named(copied: Path, file: str, message: str) -> None:
    (copied / "model.safetensors").unlink()
    (copied / file).parent.mkdir(exist_ok=True)
    (copied / file).write_bytes(b"a")
    with pytest.raises(NotExamined, match=message):
        open_classifier(copied)


def test_a_url_is_not_fetched() -> None:
    with pytest.raises(InputError, match=r"nothing is fetched from a URL: download it"):
        open_classifier("https://example.com/somebody/net")


def test_models_of_token_numbers_are_told_apart_from_those_of_images(tmp_path: Path) -> None:
    with quiet():
        config = transformers.ImageGPTConfig(
            n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=64, id2label=LABELS
        )
        transformers.ImageGPTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(NotExamined, match=r"examined: ImageGPT\w+ takes token numbers"):
        open_classifier(tmp_path)
    with pytest.raises(NotExamined, match="turns an image into 'input_ids'"):
        describe_processor(transformers.ImageGPTImageProcessorPil(), tmp_path)


@pytest.mark.parametrize("size", ["shortest edge without a crop", "384 pixels and more"])
def test_squares_at_the_edges_of_the_rules(size: str, tmp_path: Path) -> None:
    save("ConvNext", tmp_path)
    if size.startswith("384"):
        changed(tmp_path, "preprocessor_config.json", size={"shortest_edge": 384})
        assert open_classifier(tmp_path).spec.shape == (3, 384, 384)
        return
    changed(
        tmp_path,
        "preprocessor_config.json",
        size={"shortest_edge": 40},
        image_processor_type="ViTImageProcessor",
    )
    classifier = open_classifier(tmp_path)
    assert classifier.spec.shape == (3, 40, 40)
    assert fit_image(np.zeros((80, 80, 3), dtype=np.uint8), classifier.spec).shape == (40, 40, 3)
    with pytest.raises(InputError, match="40x40"):
        fit_image(np.zeros((80, 90, 3), dtype=np.uint8), classifier.spec)


def test_loading_leaves_the_host_alone(vit: Path, untouched: Callable[[], Any]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as progress

    def state() -> list[Any]:
        levels = [logging.getLogger(name).level for name in ("transformers", "huggingface_hub")]
        return [*levels, progress.is_progress_bar_enabled(), are_progress_bars_disabled()]

    before = state()
    with untouched():
        open_classifier(vit)
    assert state() == before


def test_without_a_processor_the_configuration_gives_the_size(copied: Path) -> None:
    (copied / "preprocessor_config.json").unlink()
    spec = open_classifier(copied).spec
    assert spec.shape == (3, 32, 32)
    assert spec.assumed == ("range", "mean", "std")
    assert spec.resize is None


def test_numbered_labels_are_marked_assumed(copied: Path) -> None:
    changed(copied, "config.json", id2label={str(i): f"LABEL_{i}" for i in range(3)})
    classifier = open_classifier(copied)
    assert classifier.classes == ("0", "1", "2")
    assert classifier.spec.assumed == ("labels",)
    assert open_classifier(copied, options=LoadOptions(labels=("x", "y", "z"))).classes == ("x", "y", "z")
    with pytest.raises(InputError, match="2 labels for a model that tells 3 classes apart"):
        open_classifier(copied, options=LoadOptions(labels=("x", "y")))


def test_names_that_begin_at_one_are_shifted_and_told(copied: Path) -> None:
    changed(copied, "config.json", id2label={"1": "cat", "2": "dog", "3": "eel"})
    classifier = open_classifier(copied)
    assert classifier.classes == ("cat", "dog", "eel")
    assert classifier.notes == (
        "id2label begins at 1, and outputs at 0: the first output is taken for 'cat', the last for 'eel'",
    )
    stated = open_classifier(copied, options=LoadOptions(labels=("x", "y", "z")))
    assert (stated.classes, stated.notes) == (("x", "y", "z"), ())


@pytest.mark.parametrize("numbers", [(0, 1, 3), (2, 3, 4), (1, 2, 4)])
def test_names_with_holes_between_their_numbers_are_refused(copied: Path, numbers: tuple[int, ...]) -> None:
    changed(copied, "config.json", id2label={str(n): name for n, name in zip(numbers, "abc", strict=True)})
    with pytest.raises(InputError, match=r"id2label numbers its 3 classes .*--labels"):
        open_classifier(copied)
    assert open_classifier(copied, options=LoadOptions(labels=("x", "y", "z"))).notes == ()


def test_a_description_takes_the_place_of_the_processor(copied: Path) -> None:
    changed(
        copied, "preprocessor_config.json", do_resize=True, size={"shortest_edge": 32, "longest_edge": 64}
    )
    with pytest.raises(InputError, match="longest_edge"):
        open_classifier(copied)
    (copied / "doorward.json").write_text(
        '{"input": {"mean": [0.5], "std": [0.5]}, "classes": ["a", "b", "c"]}'
    )
    classifier = open_classifier(copied)
    assert classifier.classes == ("a", "b", "c")
    assert classifier.spec.mean == (0.5,)
    assert classifier.spec.resize is None


def test_options_change_parts_of_what_the_processor_states(vit: Path) -> None:
    spec = open_classifier(vit, options=LoadOptions(mean=(0.1, 0.2, 0.3))).spec
    assert spec.mean == (0.1, 0.2, 0.3)
    assert spec.std == (0.5, 0.5, 0.5)
    assert spec.resize is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True},
            "do_flip_channel_order",
        ),
        (
            {"image_processor_type": "DonutImageProcessor", "do_pad": True, "do_thumbnail": True},
            "DonutImageProcessor",
        ),
        ({"do_resize": False, "do_center_crop": True, "crop_size": 16}, "do_center_crop without do_resize"),
        ({"image_processor_type": "NoSuchImageProcessor", "model_type": "none"}, "image processor"),
        ({"size": {"height": 24, "width": 24}}, "24x24"),
    ],
)
def test_preprocessing_that_cannot_be_followed_is_refused(
    changes: dict[str, Any], message: str, copied: Path
) -> None:
    changed(copied, "preprocessor_config.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        open_classifier(copied)
    assert "\n" not in str(error.value)


# --- weights -----------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_pickled_weights_are_read_as_data(copied: Path, vit: Path) -> None:
    tensors = safetensors.torch.load_file(copied / "model.safetensors")
    torch.save(tensors, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(open_classifier(copied).logits(x), open_classifier(vit).logits(x))


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def test_pickled_code_is_refused_and_not_run(copied: Path, tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "canary")}, copied / "pytorch_model.bin")
    with pytest.raises(UnsafeArtifact, match=r"pytorch_model\.bin") as refusal:
        open_classifier(copied)
    assert refusal.value.finding is not None
    assert refusal.value.finding.verdict == "unsafe"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier.weight"), "they lack classifier.weight"),
        (lambda t: [t.pop(name) for name in list(t) if "layernorm" in name], r"they lack vit.* and \d+ more"),
        (lambda t: t.update(extra=torch.zeros(1)), "they hold unknown extra"),
        (lambda t: t.update({"classifier.weight": torch.zeros(5, 32)}), r"weight \(5, 32\) for \(3, 32\)"),
    ],
)
def test_weights_must_fit(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, copied: Path
) -> None:
    rewritten(copied, change)
    with pytest.raises(InputError, match=message) as error:
        open_classifier(copied)
    assert "\n" not in str(error.value)


def test_the_pooling_layer_of_a_base_model_may_be_left_over(copied: Path) -> None:
    rewritten(copied, lambda tensors: tensors.update({"vit.pooler.dense.weight": torch.zeros(32, 32)}))
    assert open_classifier(copied).classes == ("cat", "dog", "eel")


def test_truncated_and_missing_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot load"):
        open_classifier(copied)
    weights.unlink()
    with pytest.raises(InputError, match="no weights: expected one of model"):
        open_classifier(copied)


# --- what is no image classifier ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "cannot load it"),
        ({"architectures": ["ASTForAudioClassification"]}, "cannot load it"),
        ({"architectures": ["ViTModel"]}, "expected a classifier of images, texts .* this is a ViTModel"),
        ({"architectures": None}, "names no architecture"),
        ({"model_type": "made-up"}, "cannot load"),
        ({"hidden_size": "wide"}, "cannot load"),
    ],
)
def test_other_models_are_recognised(changes: dict[str, Any], message: str, copied: Path) -> None:
    changed(copied, "config.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        open_classifier(copied)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from doorward.models.formats import huggingface

    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'doorward\[hf\]'"):
        open_classifier(vit)


def test_one_output_tells_two_classes_apart(tmp_path: Path) -> None:
    config, _, settings_of_it = MODELS["ViT"]
    with quiet():
        module = transformers.ViTForImageClassification(transformers.ViTConfig(**config, num_labels=1))
        module.classifier.weight.data.mul_(1000)
        module.save_pretrained(tmp_path)
        transformers.ViTImageProcessorPil(**settings_of_it).save_pretrained(tmp_path)
    classifier = open_classifier(tmp_path)
    assert classifier.spec.output == "one_logit"
    assert classifier.classes == ("0", "1")


VALUES = st.sampled_from(
    [None, True, -1, 0, 7, 10**7, 1.5, float("nan"), "", "x", [], [1], ["a"], {}, {"a": 1}]
)


@settings(max_examples=40)
@given(data=st.data())
def test_wrong_types_in_a_directory_raise_nothing_but_our_errors(
    vit: Path, tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "fuzzed"
    if not path.exists():
        shutil.copytree(vit, path)
    file = data.draw(st.sampled_from(["config.json", "preprocessor_config.json"]))
    document = json.loads((vit / file).read_text())
    key = data.draw(st.sampled_from(sorted(document)))
    (path / file).write_text(json.dumps(document | {key: data.draw(VALUES)}))
    try:
        open_classifier(path)
    except DoorwardError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
    shutil.copy(vit / file, path / file)
