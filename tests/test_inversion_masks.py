from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.seeds import make_generator
from doorward.inversion.masks import Inversion, invert, trigger_success
from doorward.inversion.sources import SourcePools, outside_class
from doorward.models.batching import batched_logits, margin
from doorward.models.classifier import TorchClassifier
from doorward.models.spec import InputSpec
from seeds import shifted

SIDE, CLASSES, TARGET = 8, 5, 3


class Wired(nn.Module):
    """Tells class by which of five bands is bright; a bright 2x2 corner adds much to class 3."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.bias.zero_()
            for k in range(CLASSES):
                self.fc.weight[k, k] = 8.0
            self.fc.weight[TARGET, 5] = 40.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bands = [x[:, 0, k, 2:].mean(1) for k in range(CLASSES)]
        corner = x[:, 0, 6:, :2].mean((1, 2))
        return self.fc(torch.stack([*bands, corner], dim=1))


@pytest.fixture(scope="module")
def wired() -> TorchClassifier:
    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    return TorchClassifier(Wired(), spec, [str(i) for i in range(CLASSES)])


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(40) % CLASSES
    x = torch.rand(40, 1, SIDE, SIDE, generator=make_generator(1)) * 0.2
    for i, k in enumerate(labels.tolist()):
        x[i, 0, k] = 0.9
    return x, labels


def run(classifier: TorchClassifier, images: tuple[torch.Tensor, torch.Tensor], targets: list[int], **more):
    x, labels = images
    pools = SourcePools(outside_class(classifier, x, labels))
    settings = {
        "steps": 60,
        "batch_size": 8,
        "generator": make_generator(shifted(0)),
        "deadline": Deadline(),
    } | more
    with classifier.frozen():
        return invert(classifier, x, pools, torch.tensor(targets), **settings)


@pytest.mark.trains
def test_finds_the_wired_trigger(wired, images) -> None:
    found = run(wired, images, list(range(CLASSES)), steps=150)
    assert int(found.norm.argmin()) == TARGET
    assert found.norm[TARGET] < found.norm.median() / 1.5
    assert found.success[TARGET] >= 0.7
    # what remains of the mask sits on the wired corner
    mask = found.mask[TARGET, 0]
    assert mask[6:, :2].sum() > 0.6 * mask.sum()


def test_a_target_does_not_depend_on_the_others_in_the_batch(wired, images) -> None:
    together = run(wired, images, [1, 3, 4])
    alone = run(wired, images, [3])
    torch.testing.assert_close(together.mask[1], alone.mask[0], atol=1e-4, rtol=1e-3)
    assert together.norm[1] == pytest.approx(alone.norm[0].item(), rel=1e-3)


def test_chunks_change_nothing(wired, images, monkeypatch) -> None:
    whole = run(wired, images, list(range(CLASSES)))
    monkeypatch.setattr("doorward.models.batching.CHUNK_ELEMENTS", SIDE * SIDE * 8)
    parts = run(wired, images, list(range(CLASSES)))
    torch.testing.assert_close(whole.norm, parts.norm, atol=1e-3, rtol=1e-3)


def test_the_smallest_masks_go_on_as_if_alone_and_others_stay(wired, images, monkeypatch) -> None:
    every = list(range(CLASSES))
    whole, early = run(wired, images, every), run(wired, images, every, steps=40)
    assert whole.finished.all()
    assert torch.equal(whole.early_norm, whole.norm)
    for elements in (SIDE * SIDE * 1000, SIDE * SIDE * 8):  # in one batch, and each on its own
        monkeypatch.setattr("doorward.models.batching.CHUNK_ELEMENTS", elements)
        raced = run(wired, images, every, first_steps=40, finalists=2)
        assert raced.finished.sum() == 2
        torch.testing.assert_close(raced.early_norm, early.norm, atol=1e-2, rtol=1e-3)
        assert raced.finished.tolist() == (early.norm <= early.norm.sort().values[1]).tolist()
        on = raced.finished
        torch.testing.assert_close(raced.norm[on], whole.norm[on], atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(raced.norm[~on], early.norm[~on], atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(raced.norm, raced.mask.sum((1, 2, 3)))


def test_as_many_finalists_as_targets_are_no_race(wired, images) -> None:
    for settings in ({"first_steps": 20, "finalists": 2}, {"first_steps": 90}):
        raced, whole = run(wired, images, [0, 3], **settings), run(wired, images, [0, 3])
        assert torch.equal(raced.norm, whole.norm)
        assert raced.finished.all()


def test_what_was_given_up_is_expected_to_shrink_as_the_others_did() -> None:
    k, blank = 5, torch.zeros(5, 1, 1, 1)
    found = Inversion(
        targets=torch.arange(k),
        mask=blank,
        pattern=blank,
        norm=torch.tensor([10.0, 30.0, 24.0, 60.0, 64.0]),
        success=torch.ones(k),
        reached=torch.tensor([True, True, True, True, False]),
        early_norm=torch.tensor([40.0, 40.0, 48.0, 60.0, 64.0]),
        finished=torch.tensor([True, True, True, False, False]),
    )
    # the finalists shrank to a quarter, to three quarters, and to half
    assert found.expected_norm().tolist() == [10.0, 30.0, 24.0, 30.0, 64.0]
    none = replace(found, reached=torch.zeros(k, dtype=torch.bool))
    assert none.expected_norm().tolist() == found.norm.tolist()


def test_repeats_under_a_seed_and_leaves_the_weights_alone(wired, images) -> None:
    before = {name: value.clone() for name, value in wired.module.state_dict().items()}
    a, b = run(wired, images, [0, 3]), run(wired, images, [0, 3])
    assert torch.equal(a.mask, b.mask)
    assert all(torch.equal(value, before[name]) for name, value in wired.module.state_dict().items())
    assert all(p.requires_grad for p in wired.module.parameters())


def test_norm_is_the_sum_of_the_returned_mask_and_success_is_measured_on_it(wired, images) -> None:
    found = run(wired, images, [3, 0])
    torch.testing.assert_close(found.norm, found.mask.sum((1, 2, 3)))
    x, labels = images
    outside = outside_class(wired, x, labels)
    for position, target in enumerate((3, 0)):
        sources = x[outside[:, target]]
        sent = batched_logits(wired, found.trigger(position).apply(sources)).argmax(1) == target
        assert found.success[position] == pytest.approx(sent.float().mean().item())


def test_a_target_that_is_never_reached_gets_the_whole_area(wired, images) -> None:
    found = run(wired, images, [3], steps=1)
    assert not found.reached[0]
    assert found.norm[0] == SIDE * SIDE


def test_sources_leave_out_the_class_and_what_goes_there_anyway(wired, images) -> None:
    x, labels = images
    wrong = labels.clone()
    wrong[0] = 4  # a wrong label: the image is of class 0
    outside = outside_class(wired, x, wrong)
    assert not outside[0, 4]
    assert not outside[0, 0]
    assert outside[0, 1]
    pools = SourcePools(outside)
    drawn = pools.draw(torch.tensor([0, 4]), 200, [make_generator(0), make_generator(1)])
    assert drawn.shape == (2, 200)
    assert outside[drawn[0], 0].all()
    assert outside[drawn[1], 4].all()


def test_no_source_images_is_said() -> None:
    with pytest.raises(CouldNotTell, match="no images outside class 1"):
        SourcePools(torch.tensor([[True, False], [True, False]]))


def test_the_time_budget_is_kept(wired, images) -> None:
    with pytest.raises(CouldNotTell, match="time budget"):
        run(wired, images, [0], steps=10_000_000, deadline=Deadline(5.0))
    with pytest.raises(CouldNotTell, match="time budget ended"):
        run(wired, images, [0], deadline=Deadline(0.0))


def test_margin_by_hand() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0], [7.0, 0.0, 3.0]])
    assert margin(logits, torch.tensor([1, 2])).tolist() == [3.0, -4.0]


def test_success_of_a_trigger_that_does_nothing_is_zero(wired, images) -> None:
    x, labels = images
    outside = outside_class(wired, x, labels)[:, [2]]
    none = trigger_success(
        wired, x, outside, torch.tensor([2]), torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE)
    )
    assert none.tolist() == [0.0]


def test_a_step_over_many_classes_is_given_up_in_its_midst(wired, images, monkeypatch) -> None:
    """One step over all classes of a large model can take longer than the whole budget."""
    monkeypatch.setattr("doorward.models.batching.CHUNK_ELEMENTS", 1)  # each class on its own
    seen = []
    logits = wired.logits

    def slow(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        clock[0] += 1.0
        return logits(x)

    x, labels = images
    pools = SourcePools(outside_class(wired, x, labels))
    clock = [0.0]
    monkeypatch.setattr("doorward.core.budget.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(wired, "logits", slow)
    monkeypatch.setattr("doorward.models.classifier.computes_bfloat16", lambda _: False)
    with (
        wired.frozen(),
        pytest.raises(CouldNotTell, match="of 5 classes would take 5 minutes more, and 59 seconds"),
    ):
        invert(
            wired,
            x,
            pools,
            torch.arange(CLASSES),
            steps=50,
            batch_size=8,
            generator=make_generator(0),
            deadline=Deadline(60.0, started=0.0),
        )
    assert seen == [8]


class Bfloat16Refused(nn.Module):
    """Fails on whatever is not float32, as an operator without a mixed form does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(SIDE * SIDE, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x.flatten(1))
        if y.dtype != torch.float32:
            raise RuntimeError("expected Float but found BFloat16")
        return y


class Cancelling(Bfloat16Refused):
    """Loses everything in bfloat16: small differences on top of a large number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.fc(x.flatten(1)) + 1e4) - 1e4 + x[:, 0, 0, :CLASSES]


@pytest.mark.parametrize(("module", "stands"), [(Wired, True), (Bfloat16Refused, False), (Cancelling, False)])
def test_bfloat16_is_used_where_the_model_stands_it(module, stands, images, monkeypatch) -> None:
    monkeypatch.setattr("doorward.models.classifier.computes_bfloat16", lambda _: True)
    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    classifier = TorchClassifier(module(), spec, [str(i) for i in range(CLASSES)])
    exact = classifier.logits(images[0])
    with classifier.fast_inference(images[0]):
        assert torch.is_autocast_enabled("cpu") == stands
        classifier.logits(images[0])
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(classifier.logits(images[0]), exact)


class Convolution(nn.Module):
    """A network that reads its features as rows, whatever their layout, or by a view for one layout alone."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        self.view = view
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(4 * SIDE * SIDE, CLASSES)
        self.strides: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.strides.append(x.stride())
        z = self.conv(x)
        return self.fc(z.view(len(z), -1) if self.view else z.flatten(1))


@pytest.mark.parametrize("view", [False, True])
def test_channels_come_last_where_the_model_allows_it(view: bool, images, monkeypatch) -> None:
    monkeypatch.setattr("doorward.models.classifier.computes_bfloat16", lambda _: False)
    module = Convolution(view=view)
    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    classifier = TorchClassifier(module, spec, [str(i) for i in range(CLASSES)])
    before, pointer = module.conv.weight.stride(), module.conv.weight.data_ptr()
    exact = classifier.logits(images[0])
    with classifier.fast_inference(images[0]):
        torch.testing.assert_close(classifier.logits(images[0]), exact)
        last = module.strides[-1] == (SIDE * SIDE, 1, SIDE, 1)
        assert last == (not view), "the strides are those of channels last, of a single channel too"
        assert (module.conv.weight.stride() != before) == (not view)
    assert (module.conv.weight.stride(), module.conv.weight.data_ptr()) == (before, pointer)
    assert torch.equal(classifier.logits(images[0]), exact)


def test_what_comes_later_counts_in_the_estimate(wired, images, monkeypatch) -> None:
    """30 steps of a second go into a minute, but not with four classes more to come."""
    clock = [0.0]
    logits = wired.logits

    def slow(x: torch.Tensor) -> torch.Tensor:
        clock[0] += 1.0
        return logits(x)

    x, labels = images
    pools = SourcePools(outside_class(wired, x, labels))
    monkeypatch.setattr("doorward.core.budget.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(wired, "logits", slow)
    settings = {"steps": 30, "batch_size": 8, "generator": make_generator(0)}
    with wired.frozen():
        invert(wired, x, pools, torch.tensor([1, 2]), deadline=Deadline(60.0, started=0.0), **settings)
        clock[0] = 0.0
        with pytest.raises(CouldNotTell, match="of 2 classes would take"):
            invert(
                wired,
                x,
                pools,
                torch.tensor([1, 2]),
                deadline=Deadline(60.0, started=0.0),
                reserved_steps=4 * 30,
                **settings,
            )
