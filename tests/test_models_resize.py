"""How images are made to fit where the file does not say it: `--resize`, and what lies next to the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command_line import call
from doorward.core.errors import InputError
from doorward.data import InMemorySamples
from doorward.models import LoadOptions, open_classifier
from doorward.models.encode.image import fit_image, to_tensor
from doorward.models.formats.companions import PREPROCESSOR, read_companions, without_facts
from doorward.models.spec import InputSpec, Resize

onnx = pytest.importorskip("onnx")
CLASSES = ("upright", "turned", "none")


def graph(path: Path, *, height: int | str = 8, width: int | str = 12, channels: int = 3) -> Path:
    """Write an ONNX model whose scores are the mean of each channel."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x = helper.make_tensor_value_info("x", kind, ["n", channels, height, width])
    y = helper.make_tensor_value_info("y", kind, ["n", channels])
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"], axis=1),
    ]
    made = helper.make_graph(nodes, "g", [x], [y])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def spec_of(path: Path, **options) -> InputSpec:
    return open_classifier(path, options=LoadOptions(**options)).spec


def test_height_and_width_are_resized_to_as_stated(tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx")
    assert spec_of(path).resize is None
    assert spec_of(path, resize=(8, 12)).resize == Resize(height=8, width=12)
    larger = spec_of(path, resize=(10, 16)).resize
    assert larger == Resize(height=10, width=16, crop=(8, 12))


def test_one_number_is_the_shorter_side_and_the_rest_is_cropped(tmp_path: Path) -> None:
    spec = spec_of(graph(tmp_path / "model.onnx"), resize=(14,))
    assert spec.resize == Resize(height=14, width=14, shortest_edge=True, crop=(8, 12))
    tall = np.zeros((40, 28, 3), np.uint8)
    tall[14:26] = 255  # the middle 12 of 40 rows
    fitted = fit_image(tall, spec)
    assert fitted.shape == (8, 12, 3)
    assert fitted[3:5].min() == 255, "the centre is kept"
    assert fitted[0].max() < 255, "and nothing far from it"


def test_resizing_states_the_size_where_nothing_else_does(tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", height="h", width="w")
    with pytest.raises(InputError, match="--size"):
        spec_of(path)
    assert spec_of(path, resize=(20, 30)).shape == (3, 20, 30)


def test_images_are_not_made_smaller_than_the_model_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="resized to 12x7, images are smaller"):
        spec_of(graph(tmp_path / "model.onnx"), resize=(7, 12))


@pytest.mark.parametrize(("channels", "given"), [(1, 3), (3, 1), (3, 3), (1, 1)])
def test_colours_become_what_the_model_takes(channels: int, given: int) -> None:
    spec = InputSpec(channels=channels, height=8, width=12, resize=Resize(height=8, width=12))
    x = np.full((2, 5, 6, given), 100, np.uint8)
    fitted = to_tensor(InMemorySamples(x if given > 1 else x[..., 0], None, classes=()), spec)
    assert fitted.shape == (2, channels, 8, 12)
    assert fitted.unique().tolist() == [100]


def test_the_command_line_takes_one_number_or_two() -> None:
    for text in ("0", "1,2,3", "8.5", "big"):
        outcome = call("scan", "model.onnx", "--resize", text)
        assert (outcome.code, "--resize" in outcome.err) == (2, True)


def processor(folder: Path, **more) -> None:
    stated = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 12},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.1],
    }
    (folder / PREPROCESSOR).write_text(json.dumps(stated | more), encoding="utf-8")
    names = {str(i): name for i, name in enumerate(CLASSES)}
    (folder / "config.json").write_text(json.dumps({"id2label": names}), encoding="utf-8")


@pytest.mark.parametrize("place", [".", "onnx"])
def test_what_lies_next_to_an_exported_file_is_read(tmp_path: Path, place: str) -> None:
    pytest.importorskip("transformers")
    processor(tmp_path)
    (tmp_path / place).mkdir(exist_ok=True)
    classifier = open_classifier(graph(tmp_path / place / "model.onnx"))
    assert classifier.classes == CLASSES
    spec = classifier.spec
    assert (spec.mean, spec.std, spec.range) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), (0.0, 1.0))
    assert spec.resize == Resize(height=8, width=12, resample=3)
    assert not {"mean", "std", "range"} & set(spec.assumed)


def test_options_go_before_what_lies_next_to_the_file(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    processor(tmp_path)
    path = graph(tmp_path / "model.onnx")
    assert spec_of(path, mean=(0.1,)).mean == (0.1,)
    assert spec_of(path, resize=(9, 13)).resize == Resize(height=9, width=13, crop=(8, 12))


def test_an_export_of_another_size_keeps_its_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    processor(tmp_path, size={"height": 16, "width": 16})
    spec = spec_of(graph(tmp_path / "model.onnx"))
    assert (spec.height, spec.width, spec.resize) == (8, 12, None)
    assert spec.mean == (0.5, 0.4, 0.3)


def test_without_such_a_file_nothing_is_stated(tmp_path: Path) -> None:
    assert read_companions(tmp_path / "model.onnx").input == {}
    assert without_facts({"height": 4, "resize": {}, "mean": (0.0,)}, {"height": 5}) == {"mean": (0.0,)}


def test_a_report_tells_of_resizing_what_is_done() -> None:
    usual = InputSpec(channels=3, height=8, width=8, resize=Resize(height=9, width=9, crop=(8, 8)))
    assert set(usual.describe()["resize"]) == {
        "height", "width", "shortest_edge", "resample", "crop", "convert_rgb",
    }  # fmt: skip
    seldom = InputSpec(
        channels=3, height=8, width=8, resize=Resize(height=8, width=8, square=0.5, nearest=True)
    )
    told = seldom.describe()["resize"]
    assert (told["square"], told["nearest"]) == (0.5, True)
