from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples
from doorward.detectors.base import Detector
from doorward.detectors.model.blend_search import BlendSearch
from doorward.detectors.model.max_margin import MaxMargin, maximum_margins
from doorward.detectors.model.neural_cleanse import NeuralCleanse, Run, Sizes
from doorward.detectors.model.patch_search import PatchSearch
from doorward.detectors.model.trigger_families import TriggerFamilies
from doorward.detectors.subject import Subject
from doorward.inversion import distilled, uniform_blend
from doorward.inversion.distilled import DistilledSurrogates
from doorward.inversion.masks import Inversion
from doorward.inversion.problem import InversionProblem
from doorward.inversion.sources import SourcePools, outside_class
from doorward.inversion.uniform_blend import OPACITIES, colours, uniform_opacity
from doorward.models import TorchClassifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.spec import InputSpec
from doorward.scan.calibration import calibrations, judge
from doorward.stats.outliers import gamma_order_p, gap_to_nearest, gap_to_others
from doorward.triggers.base import Trigger
from seeds import shifted

SIDE = 12


class Bands(nn.Module):
    """The class by the brightest of k rows; for a trigger, a bright last pixel adds `wired` to class 2.

    It has to be brighter than its neighbour, so that an uniform blend does nothing. What an image's
    mean is above .2 adds `sinking` to class 1, for which an uniform blend does as well as any.
    """

    def __init__(self, classes: int, wired: float, sinking: float = 0.0) -> None:
        super().__init__()
        self.classes, self.wired, self.sinking = classes, wired, sinking

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = 10 * x[:, 0, : self.classes, :-2].mean(2)  # (n, k)
        wire = torch.zeros(self.classes, device=x.device)
        wire[2 % self.classes] = self.wired
        sink = torch.eye(self.classes, device=x.device)[1 % self.classes]
        shown = x[:, 0, -1, -1] - x[:, 0, -1, -2]
        return z + shown[:, None] * wire + self.sinking * (x.mean((1, 2, 3)) - 0.2).relu()[:, None] * sink


def subject(
    classes: int, wired: float, *, images: int = 60, labelled: bool = True, sinking: float = 0.0
) -> Subject:
    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    network = Bands(classes, wired, sinking)
    classifier = TorchClassifier(network, spec, [f"band {i}" for i in range(classes)])
    rng = np.random.default_rng(shifted(0))
    x = rng.integers(0, 60, (images, SIDE, SIDE), dtype=np.uint8)
    x[:, -1, -2:] = 0  # no clean image shows the trigger
    labels = np.arange(images) % classes
    for image, label in zip(x, labels, strict=True):
        image[label] = 200
        # every class is a little easier or harder to reach than the next
        image[label] -= np.uint8(3 * label)
    return Subject(
        classifier=classifier,
        clean=InMemorySamples(x, labels if labelled else None, classes=classifier.classes),
    )


@pytest.mark.trains
@pytest.mark.parametrize("labelled", [True, False])
def test_neural_cleanse_finds_the_wired_pixel_and_its_class(labelled: bool) -> None:
    found = NeuralCleanse(steps=100)(subject(6, 12.0, labelled=labelled))
    assert max(found.per_class, key=lambda t: found.per_class[t] or float("-inf")) == 2
    (judged,) = judge(
        [found], calibrations([found.detector]).model_copy(update={"settings": {found.detector: {}}})
    ).findings
    assert judged.p_value is not None
    assert judged.p_value < 0.045
    trigger = Trigger.from_json(next(e.trigger for e in found.evidence if e.type == "trigger"))
    mask = trigger.tensors()["mask"]
    assert mask.argmax() == SIDE * SIDE - 1
    assert mask.sum() < 3


def test_neural_cleanse_says_how_far_each_class_lies() -> None:
    found = NeuralCleanse(steps=60)(subject(6, 12.0))
    assert sorted(found.per_class) == list(range(6))
    assert found.score == max(found.per_class.values())
    table = next(e for e in found.evidence if e.type == "table")
    norms = {row[0]: row[1] for row in table.rows}
    assert norms["band 2"] == min(norms.values())


def test_neural_cleanse_halves_the_batch_of_many_classes() -> None:
    many = NeuralCleanse(steps=10, restarts=0, batch_size=8, many_classes=5)
    # and one run of one class, in a whole batch, to confirm
    assert many(subject(6, 0.0)).cost.gradients == 6 * 4 * 10 + 8 * 10
    assert many(subject(5, 0.0)).cost.gradients == 5 * 8 * 10 + 8 * 10


@pytest.mark.trains
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_compared_too(classes: int) -> None:
    target = 2 % classes
    for detector in (NeuralCleanse(steps=100), MaxMargin(), PatchSearch(), BlendSearch()):
        found = detector(subject(classes, 40.0))
        assert found.score is not None
        if classes == 2 and isinstance(detector, NeuralCleanse | BlendSearch):
            continue  # a mask of one pixel, or a faint picture, turns either class into the other
        assert max(found.per_class, key=lambda t: found.per_class[t] or 0.0) == target
        assert found.score == found.per_class[target]


def test_a_single_class_cannot_be_compared() -> None:
    for detector in (NeuralCleanse(steps=10), MaxMargin(steps=5), PatchSearch(steps=5), BlendSearch(steps=5)):
        assert detector(subject(1, 0.0)).reason


@pytest.mark.parametrize("detector", [NeuralCleanse(), PatchSearch(), BlendSearch()])
def test_what_uses_images_wants_enough_of_them(detector: Detector) -> None:
    found = detector(subject(6, 12.0, images=12))
    assert found.reason
    assert found.reason == "12 clean images are too few; give at least 20"


@pytest.mark.trains
@pytest.mark.parametrize("labelled", [True, False])
def test_patch_search_finds_the_wired_pixel_and_its_class(labelled: bool) -> None:
    found = PatchSearch(steps=40, mixtures=400)(subject(6, 12.0, labelled=labelled))
    scores = [found.per_class[t] or 0.0 for t in range(6)]
    assert int(np.argmax(scores)) == 2
    assert scores[2] > sorted(scores)[-2] + 5
    trigger = Trigger.from_json(next(e.trigger for e in found.evidence if e.type == "trigger"))
    mask, pattern = trigger.tensors()["mask"], trigger.tensors()["pattern"]
    # .18 of 12 pixels are two; the wired one is in the last row and column
    assert mask.sum() == 4
    assert mask[0, -2:, -2:].all()
    assert pattern[0, -1, -1] > 0.9
    assert not pattern[0, :-2].any()


def test_a_patch_of_one_size_says_how_firmly_each_class_obeys() -> None:
    found = PatchSearch(steps=30, mixtures=400, contrast=0.0, trim_fraction=0.1)(subject(6, 12.0))
    table = next(e for e in found.evidence if e.type == "table")
    rows = {row[0]: row for row in table.rows}
    assert table.rows[0][0] == "band 2"
    for t in range(6):
        assert rows[f"band {t}"][1] == pytest.approx(found.per_class[t], abs=0.01)
    # the wire adds 12 to margins of about -8: the loss, and so the strength, can be told
    one = subject(6, 12.0)
    assert one.classifier is not None
    assert one.clean is not None
    trigger = Trigger.from_json(next(e.trigger for e in found.evidence if e.type == "trigger"))
    images = to_float(to_tensor(one.clean, one.classifier.spec))[one.clean.labels != 2]
    logits = one.classifier.logits(trigger.apply(images))
    others = logits.clone()
    others[:, 2] = -torch.inf
    losses = torch.log1p(torch.exp(others.amax(1) - logits[:, 2])).sort().values
    assert len(losses) == 50
    assert found.per_class[2] == pytest.approx(-float(losses[:45].mean().log()), abs=1e-3)
    assert rows["band 2"][2] == 1.0


def test_patch_search_reaches_every_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    # what the twins make of a patch is another matter: shifted bands light the wired pixel for them too
    monkeypatch.setattr(
        DistilledSurrogates, "all_predict", lambda _, x, target: torch.zeros(len(x), dtype=torch.bool)
    )
    # a stride of half the side must not step over the last places, where many triggers are
    found = PatchSearch(steps=1, side=0.4, places=200, mixtures=400)
    corners = {
        (row[4], row[5])
        for e in found(subject(3, 40.0)).evidence
        if e.type == "table"
        for row in e.rows
        if row[0] == "band 2"
    }
    assert corners == {(SIDE - 5, SIDE - 5)}


@pytest.mark.parametrize(
    "detector", [PatchSearch(steps=15, further_steps=10, mixtures=400), BlendSearch(steps=15)]
)
def test_obedience_does_not_depend_on_the_chunks(monkeypatch, detector: Detector) -> None:
    def run() -> list[float]:
        found = detector(subject(5, 3.0))
        return [found.per_class[t] or 0.0 for t in range(5)]

    whole = run()
    monkeypatch.setattr("doorward.models.batching.CHUNK_ELEMENTS", SIDE * SIDE * 20)
    np.testing.assert_allclose(run(), whole, atol=1e-3)


def test_patch_search_halves_the_batch_of_many_classes() -> None:
    few = {"steps": 10, "further_steps": 4, "places": 1, "candidates": 2, "restarts": 3, "mixtures": 64}
    many = PatchSearch(**few, batch_size=8, many_classes=5)
    # the restarts and further steps are for few classes and have whole batches
    assert many(subject(6, 0.0)).cost.gradients == 6 * 4 * 10 + 2 * 8 * (3 * 10 + 4)
    assert many(subject(5, 0.0)).cost.gradients == 5 * 8 * 10 + 2 * 8 * (3 * 10 + 4)


@pytest.mark.trains
def test_a_start_that_is_better_is_taken() -> None:
    # every further canvas can only raise the doubtful classes, and leaves the others as they are
    firmness = []
    for restarts in (0, 3):
        found = PatchSearch(
            steps=8, further_steps=1, mixtures=400, restarts=restarts, candidates=2, contrast=0.0
        )
        firmness.append(found(subject(6, 6.0)).per_class)
    changed = {t for t in range(6) if firmness[0][t] != firmness[1][t]}
    assert 1 <= len(changed) <= 2
    assert all((firmness[1][t] or 0.0) > (firmness[0][t] or 0.0) for t in changed)


@pytest.mark.trains
def test_blend_search_finds_the_class_that_the_faintest_picture_reaches() -> None:
    found = BlendSearch(steps=60)(subject(6, 80.0))
    scores = [found.per_class[t] or 0.0 for t in range(6)]
    assert int(np.argmax(scores)) == 2
    assert found.score == scores[2] > 1  # less than a third of what the next class needs
    evidence = next(e for e in found.evidence if e.type == "trigger")
    table = next(e for e in found.evidence if e.type == "table")
    assert evidence.target == 2
    mask, pattern = (Trigger.from_json(evidence.trigger).tensors()[name] for name in ("mask", "pattern"))
    assert pattern[0, -1, -1] > 0.9
    assert torch.all(mask == mask[0, 0, 0])
    opacity = {row[0]: row[1] for row in table.rows}
    assert opacity["band 2"] == pytest.approx(float(mask[0, 0, 0]), abs=1e-4)
    # every class is measured from the best of the others
    least = min(value for name, value in opacity.items() if name != "band 2")
    for t in range(6):
        other = least if t == 2 else opacity["band 2"]
        assert scores[t] == pytest.approx(math.log(other / opacity[f"band {t}"]), abs=0.01)


@pytest.mark.trains
def test_the_picture_of_blend_search_does_what_the_table_says() -> None:
    one = subject(6, 80.0)
    found = BlendSearch(steps=60)(one)
    trigger = Trigger.from_json(next(e.trigger for e in found.evidence if e.type == "trigger"))
    table = next(e for e in found.evidence if e.type == "table")
    assert one.classifier is not None
    assert one.clean is not None
    images = to_float(to_tensor(one.clean, one.classifier.spec))
    sources = images[(one.clean.labels != 2) & (one.classifier.logits(images).argmax(1) != 2).numpy()]
    success = (one.classifier.logits(trigger.apply(sources)).argmax(1) == 2).float().mean()
    assert table.rows[0][2] == pytest.approx(float(success), abs=1e-3)
    assert success > 0.7


def test_a_class_that_no_picture_reaches_needs_a_whole_one() -> None:
    # one step is too few to hold any class
    found = BlendSearch(steps=1)(subject(4, 0.0))
    table = next(e for e in found.evidence if e.type == "table")
    assert {row[1] for row in table.rows} == {1.0}
    assert found.score == 0.0


def test_blend_search_takes_as_many_gradients_as_it_says() -> None:
    assert BlendSearch(steps=10, batch_size=8)(subject(6, 0.0)).cost.gradients == 6 * 8 * 10


def problem(one: Subject) -> InversionProblem:
    assert one.classifier is not None
    assert one.clean is not None
    images = to_float(to_tensor(one.clean, one.classifier.spec))
    return InversionProblem(one.classifier, images, SourcePools(outside_class(one.classifier, images, None)))


def test_even_pictures_by_hand() -> None:
    one = problem(subject(4, 40.0, sinking=100.0))
    colour = torch.tensor([[1.0], [0.9], [1.0], [0.0]])
    least = uniform_opacity(one, colour)
    # what an image's mean does for class 1, the definition without a shortcut
    sources = one.images[one.pools.order[1, :16]]
    shares = [
        float((one.classifier.logits((1 - o) * sources + o * 0.9).argmax(1) == 1).float().mean())
        for o in OPACITIES.tolist()
    ]
    first = next(i for i, share in enumerate(shares) if share >= 0.9)
    assert 0 < first < len(OPACITIES) - 1
    # no uniform blend moves anything to another class, wired or not
    assert least.tolist() == pytest.approx([1.0, float(OPACITIES[first]), 1.0, 1.0])


def test_even_pictures_of_many_classes_are_tried_on_fewer_images(monkeypatch) -> None:
    monkeypatch.setattr(uniform_blend, "CLASSES", 5)
    for held, images in ((problem(subject(5, 0.0)), 16), (problem(subject(6, 0.0)), 8)):
        before = held.classifier.cost.forwards
        uniform_opacity(held, torch.ones(len(held.classes), 1))
        assert held.classifier.cost.forwards - before == len(held.classes) * images * len(OPACITIES)


def test_the_mean_colour_is_that_which_the_mask_shows() -> None:
    pattern = torch.tensor([[[[0.2, 1.0]], [[0.4, 0.0]]]])  # (1, 2, 1, 2)
    assert colours(torch.tensor([[[[1.0, 0.0]]]]), pattern).tolist() == [pytest.approx([0.2, 0.4])]
    assert colours(torch.tensor([[[[0.1, 0.1]]]]), pattern).tolist() == [pytest.approx([0.6, 0.2])]
    assert colours(torch.zeros(1, 1, 1, 2), pattern).tolist() == [[0.0, 0.0]]


@pytest.mark.trains
@pytest.mark.parametrize(
    ("detector", "column"),
    [
        (NeuralCleanse(steps=60), "times smaller than any addition"),
        (BlendSearch(steps=60), "times fainter than that"),
    ],
)
def test_what_an_even_picture_does_as_well_is_no_sign(detector: Detector, column: str) -> None:
    # any addition sends images to class 1; only the wire, which one pixel activates, is a sign
    one = subject(6, 40.0, sinking=120.0)
    found = detector(one)
    table = next(e for e in found.evidence if e.type == "table")
    faint = {row[0]: row[1] for row in table.rows}
    others = [value for name, value in faint.items() if name not in ("band 1", "band 2")]
    assert faint["band 1"] < min(others) / 1.5, "it is easy to reach"
    scores = [found.per_class[t] or 0.0 for t in range(6)]
    assert int(np.argmax(scores)) == 2
    # what it is worth next to an uniform blend is the only thing that counts
    worth = {row[0]: float(row[table.columns.index(column)]) for row in table.rows}
    assert worth["band 1"] < worth["band 2"] / 3
    logs = np.log([worth[f"band {t}"] for t in range(6)])
    expected = gap_to_others(logs) + logs if isinstance(detector, NeuralCleanse) else gap_to_nearest(logs)
    assert scores == pytest.approx(expected.tolist(), abs=0.05)


@pytest.mark.trains
def test_a_mask_that_is_not_far_smaller_than_an_even_one_is_worth_less() -> None:
    # class 1 is reached by brightness alone, wherever it is: its mask is all over the image
    table = next(
        e for e in NeuralCleanse(steps=100)(subject(6, 40.0, sinking=120.0)).evidence if e.type == "table"
    )
    row = dict(zip(table.columns, next(row for row in table.rows if row[0] == "band 1"), strict=True))
    norm, pixels, even = (
        float(row[name])
        for name in ("mask norm (pixels)", "spread over pixels", "uniform mask that does the same")
    )
    assert even < 3 * norm, "a uniform mask does the same"
    worth = float(row["times smaller than any addition"])
    assert worth == pytest.approx(max(SIDE**2 / pixels, even / norm, 1.0), rel=0.02)
    assert worth < 0.8 * SIDE**2 / norm, "which is less than its own size says"


def test_even_pictures_keep_to_the_time_and_to_the_chunks(monkeypatch) -> None:
    one, colour = problem(subject(4, 40.0, sinking=100.0)), torch.full((4, 1), 0.9)
    with pytest.raises(CouldNotTell, match="trying uniform blends for 4 classes"):
        uniform_opacity(one, colour, Deadline(0.0))
    whole = uniform_opacity(one, colour)
    monkeypatch.setattr("doorward.models.batching.CHUNK_ELEMENTS", SIDE * SIDE * 20)
    assert one.chunk == 20
    assert uniform_opacity(one, colour).tolist() == whole.tolist()


def test_sizes_by_hand() -> None:
    # compact; faint all over, as a uniform mask is; faint, but far fainter than a uniform one; never
    # reached
    sizes = Sizes(
        norms=np.array([4.0, 5.0, 5.0, 100.0]),
        pixels=np.array([5.0, 80.0, 80.0, 100.0]),
        even=np.array([6.0, 10.0, 100.0, 90.0]),
        area=100,
    )
    assert sizes.smaller() == pytest.approx(np.log([100 / 5, 2.0, 20.0, 1.0]))


def test_over_how_many_pixels_a_mask_is_spread() -> None:
    masks = torch.zeros(3, 1, 4, 4)
    masks[0, 0, 1, :3] = 1.0  # three whole ones
    masks[1] = 0.25  # all, faintly
    masks[2, 0, 0, :2] = torch.tensor([1.0, 0.5])  # 1.5 squared by 1.25
    nothing = torch.zeros(3)
    patterns = torch.zeros(3, 1, 4, 4)
    found = Inversion(
        torch.arange(3), masks, patterns, masks.sum((1, 2, 3)), nothing, nothing > 0, nothing, nothing > 0
    )
    run = Run(found, np.array([5, 0, 7]))
    spread = [run.spread(t) * run.norm(t) for t in (5, 0, 7)]
    assert spread == pytest.approx([3.0, 16.0, 1.5**2 / 1.25])


@pytest.mark.trains
def test_max_margin_finds_the_class_with_the_wired_pixel() -> None:
    found = MaxMargin()(subject(6, 200.0))
    assert max(found.per_class, key=lambda t: found.per_class[t] or float("-inf")) == 2
    assert found.cost.gradients == 6 * 10 * 60


def test_max_margin_shows_the_published_statistic() -> None:
    found = MaxMargin()(subject(6, 4.0))
    margins, published = (e for e in found.evidence if e.type == "table")
    values = np.array([row[1] for row in margins.rows], dtype=float)
    assert published.rows[0][1] == pytest.approx(gamma_order_p(values), rel=0.02, abs=1e-4)


def test_maximum_margins_reach_the_known_maximum() -> None:
    one = subject(6, 0.0)
    assert one.classifier is not None
    # the largest margin is that of one full band among dark ones: 10
    reached = maximum_margins(
        one.classifier,
        starts=3,
        steps=80,
        learning_rate=0.05,
        generator=make_generator(0),
        deadline=Deadline(),
    )
    assert reached.shape == (6, 3)
    torch.testing.assert_close(reached, torch.full((6, 3), 10.0), atol=0.05, rtol=0)


def test_maximum_margins_do_not_depend_on_the_chunks(monkeypatch) -> None:
    one = subject(5, 3.0)
    assert one.classifier is not None

    def run() -> torch.Tensor:
        return maximum_margins(
            one.classifier,
            starts=2,
            steps=50,
            learning_rate=0.05,
            generator=make_generator(0),
            deadline=Deadline(),
        )

    whole = run()
    monkeypatch.setattr("doorward.models.batching.CHUNK_ELEMENTS", SIDE * SIDE * 3)
    torch.testing.assert_close(run(), whole, atol=1e-4, rtol=1e-4)


def test_the_time_budget_is_kept() -> None:
    for detector in (NeuralCleanse(), MaxMargin(), PatchSearch(), BlendSearch()):
        found = detector(subject(6, 12.0), deadline=Deadline(0.0))
        assert found.reason
        assert "time budget" in (found.reason or "")


def test_detectors_of_a_run_share_their_surrogates_and_say_what_they_say_alone(monkeypatch) -> None:
    taught = []
    teach = DistilledSurrogates.__init__

    def counted(self: DistilledSurrogates, *given: Any, **named: Any) -> None:
        taught.append(named["seed"])
        teach(self, *given, **named)

    monkeypatch.setattr(DistilledSurrogates, "__init__", counted)
    monkeypatch.setattr(distilled, "IMAGES", 128)
    patches = PatchSearch(steps=4, further_steps=2, restarts=0, mixtures=128)
    families = TriggerFamilies(screening_steps=24, steps=24)
    one = subject(4, 12.0)
    together = [patches(one, seed=1), families(one, seed=1)]
    assert len(taught) == 1
    assert families(one, seed=2).score != together[1].score
    assert len(set(taught)) == 2, "another seed, other surrogates"
    assert families(subject(4, 12.0), seed=1).scores == together[1].scores
