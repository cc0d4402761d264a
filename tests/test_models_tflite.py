"""TensorFlow Lite files: what they answer here is what its interpreter answers; nothing hostile is run.

The files in `tflite_models` were written by TensorFlow 2.15, with random weights, as they are and with three
kinds of smaller numbers; `answers.json` has what its interpreter answers for the images of `images_for`.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import call
from doorward.core.errors import DoorwardError, InputError
from doorward.models import TorchClassifier
from doorward.models.errors import NotExamined
from doorward.models.formats.loading import LoadOptions, detect_format, open_classifier

pytest.importorskip("tflite")

FOLDER = Path(__file__).parent / "tflite_models"
ANSWERS: dict[str, list[list[float]]] = json.loads((FOLDER / "answers.json").read_text(encoding="utf-8"))
BYTES = LoadOptions(input_range=(0.0, 255.0), mean=(0.0,), std=(1.0,))
#: How far answers may lie apart, as a share of the largest: float numbers, and those that are rounded.
EXACT, ROUNDED = 1e-4, 0.1


def opened(path: Path, options: LoadOptions = BYTES) -> TorchClassifier:
    classifier = open_classifier(path, options=options)
    assert isinstance(classifier, TorchClassifier)
    return classifier


def images_for(classifier: TorchClassifier) -> torch.Tensor:
    """Return images (3, c, h, w) in [0, 1]; the interpreter was given them in 0..255, channels last."""
    c, h, w = classifier.spec.shape
    images = np.round(np.random.default_rng(0).uniform(0, 255, (3, h, w, c))).astype(np.float32)
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("name", ANSWERS)
def test_a_model_answers_as_in_its_interpreter(name: str) -> None:
    classifier = opened(FOLDER / name)
    expected = torch.tensor(ANSWERS[name])
    with torch.no_grad():
        own = classifier.raw_logits(images_for(classifier))
    if name.startswith("cnn"):  # ends in a softmax, from before which scores are taken
        own = own.softmax(1)
    near = EXACT if name.endswith(("float.tflite", "half.tflite")) else ROUNDED
    if near == ROUNDED:  # the interpreter's whole numbers end where scores of ours go on
        own = own.clamp(expected.min(), expected.max())
    assert torch.allclose(own, expected, atol=near * float(expected.abs().max()), rtol=0)
    assert classifier.spec.layout == ("NCHW" if name.startswith("first") else "NHWC")
    assert {"gradients", "weights"} <= classifier.capabilities
    assert any("whole numbers" in note for note in classifier.notes) == (near == ROUNDED)


def test_a_quantised_input_tells_what_numbers_it_takes() -> None:
    spec = opened(FOLDER / "cnn-int8.tflite", LoadOptions()).spec
    assert spec.range == (0.0, 255.0)
    assert "range" not in spec.assumed
    with pytest.raises(InputError, match="holds numbers from 0 to 254"):
        opened(FOLDER / "cnn-int8.tflite", LoadOptions(input_range=(-300.0, 900.0), mean=(0.0,), std=(1.0,)))


def test_the_content_tells_the_format_and_not_the_name(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes((FOLDER / "cnn-float.tflite").read_bytes())
    assert detect_format(file) == "tflite"


def test_whole_numbers_that_stand_for_others_once_moved_are_refused() -> None:
    with pytest.raises(NotExamined, match="REVERSE_V2 whose results are quantised otherwise"):
        opened(FOLDER / "moved-int8.tflite")


def test_an_operator_that_is_not_read_is_named(tmp_path: Path) -> None:
    content = bytearray((FOLDER / "cnn-float.tflite").read_bytes())
    from tflite import BuiltinOperator, Model

    codes = Model.GetRootAs(content, 0)
    (code,) = [
        one
        for one in map(codes.OperatorCodes, range(codes.OperatorCodesLength()))
        if one.BuiltinCode() == BuiltinOperator.MAX_POOL_2D
    ]
    for field in (4, 10):  # the number of the operator, in its old place and in its new one
        if place := code._tab.Offset(field):
            content[place + code._tab.Pos] = BuiltinOperator.LSH_PROJECTION
    file = tmp_path / "model.tflite"
    file.write_bytes(content)
    with pytest.raises(NotExamined, match=r"LSH_PROJECTION.*tf2onnx"):
        opened(file)


@pytest.mark.parametrize("spoil", ["flipped", "cut"])
def test_a_damaged_file_is_told_and_nothing_else(spoil: str, tmp_path: Path) -> None:
    content, rng = (FOLDER / "cnn-int8.tflite").read_bytes(), np.random.default_rng(3)
    told = 0
    for i in range(100):
        if spoil == "cut":
            damaged = content[: 8 + int(rng.integers(len(content) - 8))]
        else:
            changed = bytearray(content)
            for place in rng.integers(8, len(content), 8):
                changed[place] = int(rng.integers(256))
            damaged = bytes(changed)
        file = tmp_path / f"{i}.tflite"
        file.write_bytes(damaged)
        try:
            opened(file)
        except DoorwardError:  # a number among the weights harms nothing
            told += 1
    assert told > 20


def test_a_file_that_is_cut_is_told_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "cut.tflite").write_bytes((FOLDER / "cnn-float.tflite").read_bytes()[:3000])
    with pytest.raises(NotExamined, match=r"may be cut or damaged .*: fetch it again first"):
        opened(tmp_path / "cut.tflite")


def test_metadata_tell_classes_and_normalisation() -> None:
    classifier = opened(FOLDER / "labelled.tflite", LoadOptions())
    assert classifier.classes == ("boot", "coat", "bag", "shirt", "shoe")
    spec = classifier.spec
    assert (spec.range, spec.mean, spec.std, spec.assumed) == ((0.0, 255.0), (127.5,), (63.75,), ())
    assert call("scan", "--files-only", FOLDER / "labelled.tflite").code == 0


def test_an_archive_behind_a_model_is_looked_into_wherever_its_members_are(tmp_path: Path) -> None:
    plain, labelled = ((FOLDER / f"{name}.tflite").read_bytes() for name in ("cnn-float", "labelled"))
    program = io.BytesIO()
    with zipfile.ZipFile(program, "w") as held:
        held.writestr("labels.pkl", b"cos\nsystem\n(S'true'\ntR.")
    directory = program.getvalue().index(b"PK\x01\x02")
    # a member that the directory at the end of the file does not name
    hidden = plain + program.getvalue()[:directory] + labelled[len(plain) :]
    for name, content, expected in (
        ("model.tflite", plain, 0),
        ("model.tflite", plain + program.getvalue(), 1),
        ("model.tflite", hidden, 1),
        ("model.pt", labelled, 3),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        done = call("scan", "--files-only", file)
        assert done.code == expected, done.out


def test_what_only_begins_like_one_is_looked_into_as_what_it_is(tmp_path: Path) -> None:
    script = b"#aa TFL3\nimport os\nos.system('true')\n"
    packed = b"LZIPTFL3" + bytes(64)
    for name, content, expected in (("net.py", script, 1), ("model.lz", packed, 3), ("a.tflite", packed, 3)):
        file = tmp_path / name
        file.write_bytes(content)
        assert call("scan", "--files-only", file).code == expected
