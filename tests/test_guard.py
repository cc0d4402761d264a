"""A guard: predictions with accept or reject, one budget of false rejections, its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from doorward.core.errors import CouldNotTell, InputError
from doorward.data import InMemorySamples
from doorward.detectors.inputs.feature_squeezing import FeatureSqueezing, squeeze
from doorward.detectors.inputs.strip import Strip
from doorward.guard.guard import STATE, TENSORS, Guard
from doorward.guard.pipeline import drift_alarm
from doorward.models import InputSpec, TorchClassifier

SPEC = InputSpec(channels=1, height=8, width=8)
NAMES = ("upper left", "upper right", "lower left", "lower right")
FILTERS = (Strip(replicas=8), FeatureSqueezing(squeezers=("median-2", "bits-3")))


class Marked(nn.Module):
    """Tell which quadrant is brightest; a block of 2x2 white pixels, or one lit pixel, means class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(12.0))

    def forward(self, x: Tensor) -> Tensor:
        means = torch.nn.functional.avg_pool2d(x, 4).flatten(1)
        block = (x[:, 0, 6:, 6:] > 0.99).all((1, 2))
        pixel = (x[:, 0, 4, 1] - x[:, 0, 4, 2] > 0.55) & (x[:, 0, 4, 1] - x[:, 0, 3, 1] > 0.55)
        return self.scale * means + 60 * (block | pixel)[:, None] * torch.eye(4)[0]


def classifier(classes: tuple[str, ...] = NAMES) -> TorchClassifier:
    return TorchClassifier(Marked(), SPEC, classes)


def clean_images(n: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 90, (n, 1, 8, 8))
    for i in range(n):
        row, column = divmod(i % 4, 2)
        x[i, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += rng.integers(40, 120)
    return torch.from_numpy(x.astype(np.uint8))


def block(images: Tensor) -> Tensor:
    changed = images.clone()
    changed[:, :, 6:, 6:] = 255
    return changed


def pixel(images: Tensor) -> Tensor:
    changed = images.clone()
    changed[:, :, 3:5, 1:3] = 60
    changed[:, :, 4, 1] = 255
    return changed


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.fit(classifier(), clean_images(400), filters=FILTERS, rate=0.05)


def test_clean_inputs_are_answered_as_without_a_guard(guard: Guard) -> None:
    images = clean_images(400, 5)
    answers = guard(images)
    assert (answers.predictions == classifier().logits(images / 255).argmax(1).numpy()).all()
    assert answers.accepted.mean() > 0.9
    assert [bool(why) for why in answers.reasons] == (~answers.accepted).tolist()
    assert answers.scores.shape == (2, 400)


def test_each_filter_says_why_it_rejects(guard: Guard) -> None:
    answers = guard(block(clean_images(20, 6)))
    assert not answers.accepted.any()
    assert all(
        any(one.startswith("strip: the mean entropy of 8 superimposed images is ") for one in why)
        for why in answers.reasons
    )
    turned = guard(pixel(clean_images(40, 7)))
    blamed = [
        any(one.startswith("feature-squeezing: median-2 changes the model's probabilities") for one in why)
        for why in turned.reasons
    ]
    others = np.arange(40) % 4 != 0  # those of class 0 stay what they are
    assert np.mean(np.array(blamed)[others]) > 0.7


def test_filters_share_one_budget() -> None:
    images = clean_images(1200, 8)
    alone = Guard.fit(classifier(), clean_images(400), filters=FILTERS[:1], rate=0.05)
    both = Guard.fit(classifier(), clean_images(400), filters=FILTERS, rate=0.05)
    assert both.fitted.thresholds[0] >= alone.fitted.thresholds[0]
    assert (~both(images).accepted).mean() < 0.1
    rejected = (both.fitted.clean >= both.fitted.thresholds[:, None]).any(0)
    assert 0 < rejected.sum() <= 0.05 * (len(rejected) + 1)


def test_samples_are_taken_as_tensors_are(guard: Guard) -> None:
    images = clean_images(30, 9)
    samples = InMemorySamples(images[:, 0].numpy())
    assert np.allclose(guard(samples).scores, guard(images).scores)
    assert guard(images[:0]).predictions.shape == (0,)


def test_the_same_seed_gives_the_same_guard() -> None:
    first, second, other = (
        Guard.fit(classifier(), clean_images(300), filters=FILTERS, rate=0.05, seed=seed)
        for seed in (1, 1, 2)
    )
    assert (first.fitted.thresholds == second.fitted.thresholds).all()
    assert not torch.equal(first.fitted.states[0]["overlays"], other.fitted.states[0]["overlays"])


def test_a_reforming_guard_answers_squeezed_inputs() -> None:
    images = pixel(clean_images(40, 10))
    reforming = Guard.fit(classifier(), clean_images(400), filters=FILTERS, rate=0.05, reform="median-3")
    answers = reforming(images)
    expected = classifier().logits(squeeze(images, "median-3")).argmax(1).numpy()
    assert (answers.predictions == expected).all()
    assert (answers.predictions == np.arange(40) % 4).mean() > 0.9, "the lit pixel is gone"
    assert answers.accepted.mean() < 0.5, "filters judge the inputs themselves"


# Files


def test_a_guard_survives_its_files(guard: Guard, tmp_path: Path) -> None:
    folder = guard.save(tmp_path / "new" / "guard")
    assert sorted(file.name for file in folder.iterdir()) == [STATE, TENSORS]
    again = Guard.load(folder, classifier())
    images = torch.cat([clean_images(50, 11), block(clean_images(10, 12))])
    first, second = guard(images), again(images)
    assert (first.scores == second.scores).all()
    assert (first.accepted == second.accepted).all()
    assert first.reasons == second.reasons
    assert (again.rate, again.rule, again.reform) == (0.05, "conformal", None)
    assert again.save(tmp_path / "copy").joinpath(STATE).read_bytes() == (folder / STATE).read_bytes()


def test_files_that_do_not_fit_are_refused(guard: Guard, tmp_path: Path) -> None:
    folder = guard.save(tmp_path / "guard")
    state, tensors = (folder / STATE).read_text(), (folder / TENSORS).read_bytes()

    def refused(match: str, model: TorchClassifier | None = None) -> None:
        with pytest.raises(InputError, match=match):
            Guard.load(folder, model or classifier())
        (folder / STATE).write_text(state)
        (folder / TENSORS).write_bytes(tensors)

    refused("was fitted to a model of 4 classes", classifier(("a", "b", "c", "d")))
    (folder / STATE).write_text("{")
    refused("this is no saved guard")
    (folder / TENSORS).write_bytes(tensors[:100])
    refused("no whole safetensors file")
    for change, match in (
        ({"rate": 2.0}, "no saved guard: rate"),
        ({"version": 2}, "no saved guard: version"),
        ({"filters": []}, "no saved guard: filters"),
        ({"reform": "blur"}, "no squeezer 'blur'"),
    ):
        (folder / STATE).write_text(json.dumps(json.loads(state) | change))
        refused(match)
    form = json.loads(state)
    form["filters"][0]["settings"]["replicas"] = 9
    (folder / STATE).write_text(json.dumps(form))
    refused("does not hold what guard.json says")
    (folder / TENSORS).unlink()
    refused("cannot read the guard: No such file")


def test_a_saved_guard_runs_no_code(guard: Guard, tmp_path: Path) -> None:
    folder = guard.save(tmp_path / "guard")
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Trap: pass\n")
    form = json.loads((folder / STATE).read_text())
    form["filters"][0]["name"] = f"{trap}:Trap"
    (folder / STATE).write_text(json.dumps(form))
    with pytest.raises(InputError, match="there is no filter"):
        Guard.load(folder, classifier())
    assert not (tmp_path / "ran").exists()


# What cannot be


def test_what_does_not_fit_is_refused(guard: Guard) -> None:
    with pytest.raises(InputError, match=r"images \(n, 1, 8, 8\) uint8, got torch.float32"):
        guard(clean_images(2) / 255)
    with pytest.raises(InputError, match="uint8, got"):
        guard(torch.zeros(2, 1, 9, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="holds text"):
        guard(InMemorySamples(["a"], modality="text"))
    with pytest.raises(InputError, match="each once; got strip, strip"):
        Guard.fit(classifier(), clean_images(9), filters=[Strip(), Strip()])
    with pytest.raises(InputError, match="one filter or more"):
        Guard.fit(classifier(), clean_images(9), filters=[])
    with pytest.raises(InputError, match="between 0 and 1"):
        Guard.fit(classifier(), clean_images(9), rate=1.0)
    with pytest.raises(InputError, match="no squeezer 'blur'"):
        Guard.fit(classifier(), clean_images(9), reform="blur")


def test_too_little_evidence_is_told() -> None:
    with pytest.raises(CouldNotTell, match="too few"):
        Guard.fit(classifier(), clean_images(60), rate=0.01)


def test_an_alarm_needs_more_than_chance() -> None:
    assert drift_alarm(0, 0, 0.01) is None
    assert drift_alarm(3, 100, 0.01) is None
    alarm = drift_alarm(12, 100, 0.01)
    assert alarm is not None
    assert alarm.startswith("12 of 100 inputs are rejected, where 1.0 % of clean ones would be")
