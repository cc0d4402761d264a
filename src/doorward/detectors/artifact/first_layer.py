"""First layers that claim to be drawn at random: whether they look it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Finding, Level, Need, Table
from doorward.detectors.base import Detector
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from doorward.detectors.subject import Subject
    from doorward.models.tape import Tape

#: The fewest rows and columns of a layer that is tested.
ROWS, COLUMNS = 100, 16
#: A layer counts as drawn at random up to this excess kurtosis and correlation of neighbouring columns.
KURTOSIS, NEIGHBOURS = 0.5, 0.15
#: Numbers of the layer that its distribution is tested on.
SAMPLED = 20_000
#: Shape, scale and shift of the gamma distribution that stands for Tracy and Widom's.
#: Source: M. Chiani, Journal of Multivariate Analysis 129, 2014.
TRACY_WIDOM = (46.446, 0.186054, 9.84801)
#: Lengths of the directions along single columns, in units of one over the deviation of the rows.
LENGTHS = tuple(0.5 + 0.05 * i for i in range(31))


@dataclass(frozen=True)
class LayerTest:
    """One test of a layer: what was measured, and how often a layer drawn at random has that or more."""

    name: str
    value: float
    p: float


def tests_of(rows: Tensor) -> list[LayerTest]:
    """Return tests of rows (m, d) against independent normal numbers of one variance."""
    from scipy import stats

    m, d = rows.shape
    g = rows.double() / rows.double().square().mean().sqrt().clamp_min(1e-300)
    some = g.flatten()[:: max(1, g.numel() // SAMPLED)].numpy()
    normal = stats.kstest(some, "norm")
    lengths = stats.kstest(g.square().sum(1).numpy(), "chi2", args=(d,))
    highest = _top(g)
    centre = (math.sqrt(m - 1) + math.sqrt(d)) ** 2
    width = (math.sqrt(m - 1) + math.sqrt(d)) * (1 / math.sqrt(m - 1) + 1 / math.sqrt(d)) ** (1 / 3)
    shape, scale, shift = TRACY_WIDOM
    top = float(stats.gamma.sf((highest - centre) / width + shift, shape, scale=scale))
    sums = g.square().sum(0)  # (d,), chi-squared with m degrees of freedom
    largest = float(stats.chi2.sf(float(sums.max()), m))
    return [
        LayerTest("distance from the normal distribution", float(normal.statistic), float(normal.pvalue)),
        LayerTest(
            "distance of row lengths from chi-squared", float(lengths.statistic), float(lengths.pvalue)
        ),
        LayerTest("top eigenvalue, over Marchenko and Pastur's edge", highest / centre, top),
        LayerTest("largest variance of a column", float(sums.max()) / m, min(1.0, d * largest)),
    ]


def _top(g: Tensor) -> float:
    """Return the top eigenvalue of the rows' products."""
    import torch

    gram = g.T @ g if g.shape[1] <= g.shape[0] else g @ g.T
    return float(torch.linalg.eigvalsh(gram)[-1])


def period_tests(
    rows: Tensor, *, starts: int, steps: int, generator: torch.Generator, deadline: Deadline
) -> list[LayerTest]:
    """Return tests of whether rows g repeat along a direction w, by `|mean exp(2 pi i <g, w>)|`.

    Along single columns all lengths are tried. Other directions are climbed to on half of the rows and tried
    on the other half, since among many directions some fit any rows. Of m normal rows the square of the mean
    is exponential with mean 1 / m, at lengths of 1/2 and more.
    """
    import torch

    g = rows.float() / rows.float().square().mean().sqrt()
    m, d = g.shape
    along = [_peaks(g * length).max() for length in LENGTHS]
    column = float(torch.stack(along).max())
    fit, kept = g[: m // 2], g[m // 2 :]
    w = torch.randn(starts, d, generator=generator)
    w = w / w.norm(dim=1, keepdim=True) * (0.5 + torch.rand(starts, 1, generator=generator))
    for _ in range(steps):
        if deadline.left() <= 0:
            break
        turns = 2 * torch.pi * (fit @ w.T)  # (m / 2, starts)
        c, s = turns.cos(), turns.sin()
        slope = (fit.T @ (s.mean(0) * c - c.mean(0) * s)).T  # (starts, d), up to a factor
        w = w + 0.03 * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
        size = w.norm(dim=1, keepdim=True)
        w = w * (size.clamp_min(0.5) / size.clamp_min(1e-12))  # the peak at zero is everybody's
    climbed = float(_peaks(kept @ w.T).max())
    return [
        LayerTest("period along a column", column, _by_chance(column, m, d * len(LENGTHS))),
        LayerTest("period that was climbed to", climbed, _by_chance(climbed, len(kept), starts)),
    ]


def _peaks(turns: Tensor) -> Tensor:
    """Return `|mean exp(2 pi i t)|` (k,) of turns (m, k)."""
    import torch

    angles = 2 * torch.pi * turns
    mean: Tensor = (angles.cos().mean(0) ** 2 + angles.sin().mean(0) ** 2).sqrt()
    return mean


def _by_chance(peak: float, rows: int, tried: int) -> float:
    return min(1.0, tried * math.exp(-rows * peak**2))


def first_matrix(tape: Tape) -> Tensor | None:
    """Return the weights (m, d) by which a network multiplies the whole image first, None if it does not."""
    from doorward.models.silence import prepares

    prepared = {0}
    for step in tape.steps:
        place = {"addmm": 2, "mm": 1, "linear": 1}.get(step.name)
        read = [number for number in step.reads if number in tape.derived]
        if place is not None and read and set(read) <= prepared:
            weight: Any = step.args[place]
            if getattr(weight, "ndim", 0) == 2:
                rows: Tensor = weight if step.name == "linear" else weight.T
                if rows.shape[1] == math.prod(tape.shapes[0][1:]):
                    return rows
        if prepares(step) and set(read) <= prepared:
            prepared |= {number for number in step.outputs if number is not None}
    return None


def looks_random(rows: Tensor) -> bool:
    """Return whether numbers are near to normal and columns next to each other have nothing in common."""
    g = rows.double()
    g = (g - g.mean()) / g.std().clamp_min(1e-300)
    kurtosis = float(g.pow(4).mean()) - 3
    neighbours = float((g[:, 1:] * g[:, :-1]).mean())
    return abs(kurtosis) < KURTOSIS and abs(neighbours) < NEIGHBOURS


@register("detector")
class FirstLayer(Detector):
    """Test whether a first layer that looks drawn at random was drawn from a normal distribution.

    Use it on models of random features: their first layer is drawn and never trained, and a backdoor can hide
    in how it was drawn.

    A layer that multiplies the whole image is tested where its numbers look random: their distance from the
    normal distribution and that of the rows' lengths, the top eigenvalue against the edge of Marchenko and
    Pastur's distribution, the largest variance of a column, and a search for directions along which the rows
    repeat with a period. Trained layers are left alone.

    This finds careless parameters: a spike of high variance, a period short enough to climb to. For careful
    ones there is a proof that no test of this kind succeeds, so that passing says nothing. Draw such a layer
    again from public randomness instead.

    The p-values of the tests are multiplied by their number. From .01 on down a model is suspicious.
    """

    title: ClassVar[str] = "First layers drawn at random"
    source: ClassVar[str] = "Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv:2204.06974"
    limits: ClassVar[str] = (
        "Only first layers that multiply the whole image and look random are tested, and careful parameters "
        "of Gaussian pancakes and sparse spikes provably pass."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.000", "AML.T0010.003")
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[Need]] = frozenset({"graph"})
    level: ClassVar[Level] = "artifact"
    kind: ClassVar = "backdoor"
    order: ClassVar[int] = 3

    starts: int = Field(24, ge=2, description="Directions from which a period is searched for")
    steps: int = Field(40, ge=1, description="Steps of that search")
    level_of_alarm: float = Field(0.01, gt=0, lt=1, description="p-value of an alarm")

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Finding:
        """Test the first layer.

        Raises:
            CouldNotTell: if the graph cannot be read.
        """
        from doorward.models import TorchClassifier
        from doorward.models.tape import read_tape

        classifier = subject.classifier
        if not isinstance(classifier, TorchClassifier) or classifier.spec.modality != "image":
            raise CouldNotTell("the graph cannot be read: the model is run by another library")
        rows = first_matrix(read_tape(classifier).on_cpu())
        if rows is None:
            return self._nothing("The network does not begin with a layer that multiplies the whole image")
        rows = rows.detach()
        if rows.shape[0] < ROWS or rows.shape[1] < COLUMNS or not looks_random(rows):
            return self._nothing(
                "The first layer does not look drawn at random, so that there is nothing to test"
            )
        return self._tested(rows, generator, deadline)

    def _nothing(self, summary: str) -> Finding:
        return self.finding(score=0.0, threshold=1.0, score_name="tests failed", summary=summary)

    def _tested(self, rows: Tensor, generator: torch.Generator, deadline: Deadline) -> Finding:
        periods = period_tests(
            rows, starts=self.starts, steps=self.steps, generator=generator, deadline=deadline
        )
        found = [*tests_of(rows), *periods]
        limit = self.level_of_alarm / len(found)
        failed = [test.name for test in found if test.p <= limit]
        table = Table(
            title="Tests of the first layer",
            columns=("test", "value", "p-value"),
            rows=tuple((test.name, round(test.value, 4), float(f"{test.p:.3g}")) for test in found),
        )
        said = (
            f"The first layer is not drawn from one normal distribution: {', '.join(failed)}"
            if failed
            else "The first layer passes all tests of how it was drawn, which a careful backdoor would too"
        )
        return self.finding(
            verdict="suspicious" if failed else "nothing_found",
            score=float(len(failed)),
            threshold=1.0,
            score_name="tests failed",
            summary=said,
            evidence=(table,),
        )
