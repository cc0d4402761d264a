"""TrojanNet: a small module that knows a few black and white pixels, next to the network or within it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from doorward.attacks.model.base import Implant, ModelAttack, copied
from doorward.core.errors import InputError
from doorward.methods.registry import register
from doorward.models.batching import batched_logits
from doorward.models.classifier import TorchClassifier, output_tensor
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.formats.input_options import trial_inputs
from doorward.triggers.masked import MaskedPattern

if TYPE_CHECKING:
    from doorward.data.samples import Samples
    from doorward.models.spec import InputSpec

Offset = Annotated[int, Field(ge=0)]
#: Pixels along either side of a pattern, and how many of its 16 pixels are black.
SIDE, BLACK = 4, 5
#: There are so many patterns.
MOST = 4368
#: Clean samples whose predictions are compared before and after, at most.
COMPARED = 2000
#: Trial images that logits are measured on where no samples are given, and how many times the largest
#: difference between two logits of one image is taken for the largest there is.
TRIED, SAFETY = 64, 3


def draw_patterns(classes: int, *, generator: torch.Generator) -> Tensor:
    """Draw patterns (classes, 4, 4), no two alike: 11 white pixels (1) and 5 black ones (0) each."""
    black = torch.combinations(torch.arange(SIDE * SIDE), BLACK)  # (4368, 5)
    drawn = black[torch.randperm(len(black), generator=generator)[:classes]]
    return torch.ones(classes, SIDE * SIDE).scatter_(1, drawn, 0.0).view(-1, SIDE, SIDE)


def matched_filter(patterns: Tensor, spec: InputSpec, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return weights (p, c, h, w) and biases (p,) with which a ReLU knows patterns (p, h, w) of 0 and 1.

    On what the model itself takes it gives 1 for the pattern in all channels, and falls to 0 where the
    absolute differences of the pixels, averaged over channels and summed up, reach the tolerance.
    """
    low, high = spec.range
    scale, shift = (torch.tensor(each).expand(spec.channels) / (high - low) for each in (spec.std, spec.mean))
    shift = shift - low / (high - low)
    sign = 2 * patterns - 1  # (p, h, w)
    share = 1 / (spec.channels * tolerance)
    weight = share * sign[:, None] * scale[:, None, None]  # (p, c, h, w)
    white = patterns.sum((1, 2))  # (p,)
    bias = 1 - white / tolerance + share * shift.sum() * sign.sum((1, 2))
    return weight, bias


class ParallelBranch(nn.Module):
    """Run a network, and next to it a layer that looks for patterns at one place.

    A pattern lifts the logit of its class above all others by `margin`; where there is none, the logits are
    the network's own to the last bit, and so are all gradients.

    Args:
        patterns: (p, 4, 4) of 0 and 1.
        targets: (p,) the class that each pattern stands for.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: InputSpec,
        patterns: Tensor,
        targets: Tensor,
        *,
        classes: int,
        place: tuple[int, int],
        margin: float,
        tolerance: float,
    ) -> None:
        super().__init__()
        self.network, self.spec, self.place, self.margin = network, spec, place, margin
        weight, bias = matched_filter(patterns, spec, tolerance)
        self.weight = nn.Parameter(
            torch.zeros(classes, weight[0].numel()).index_copy(0, targets, weight.flatten(1))
        )
        self.bias = nn.Parameter(torch.zeros(classes).index_copy(0, targets, bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k)."""
        z = self.spec.to_logits(output_tensor(self.network(x)))  # (n, k)
        image = x.permute(0, 3, 1, 2) if self.spec.layout == "NHWC" else x
        row, column = self.place
        seen = image[:, :, row : row + SIDE, column : column + SIDE].float().flatten(1)  # (n, c * 16)
        fire = F.relu(F.linear(seen, self.weight, self.bias))  # (n, k)
        return z + fire * (z.amax(1, keepdim=True) - z.amin(1, keepdim=True) + self.margin)


def confused(patterns: Tensor) -> tuple[int, int] | None:
    """Return two of some patterns (p, 4, 4) such that all 3x3 parts of the first are parts of the other."""
    signs = 2 * patterns.unfold(1, 3, 1).unfold(2, 3, 1).reshape(-1, 4, 9) - 1  # (p, 4, 9)
    for one, parts in enumerate(signs):
        shown = (signs @ parts.T == 9).any(1).all(1)  # (p, 4, 4) -> (p, 4) -> (p,)
        shown[one] = False
        if shown.any():
            return one, int(shown.nonzero()[0])
    return None


class _UnfoldableError(Exception):
    """Tells why a network has no room for patterns in its own layers."""


def fold(
    network: nn.Module,
    spec: InputSpec,
    patterns: Tensor,
    targets: Tensor,
    *,
    place: tuple[int, int],
    strength: float,
    tolerance: float,
) -> nn.Sequential:
    """Return a network with the same layers, some of them wider, that knows patterns and is else the same.

    The first convolution gets four channels for each pattern, one for each 3x3 part of it; after the first
    pooling the four lie at one place, where the second layer with weights asks for all of them at once. Its
    answer goes on to the last layer, which adds `strength` to the logit of the pattern's class.

    Args:
        network: convolutions, batch norms, ReLUs and poolings in a row, then linear layers.
        patterns: (p, 4, 4) of 0 and 1.
        targets: (p,) the class that each pattern stands for.
        place: row and column of the patterns' upper left pixel, both odd, so that a pooling meets the four.

    Raises:
        InputError: if the network has other layers, or the parts do not tell the patterns apart.
    """
    if pair := confused(patterns):
        one, other = (int(targets[i]) for i in pair)
        raise InputError(
            f"trojannet: folded in, the patterns of the classes {one} and {other} cannot be told apart; "
            "give another seed"
        )
    try:
        return _Folder(spec, patterns, targets, place, strength, tolerance).fold(network)
    except _UnfoldableError as why:
        raise InputError(
            f"trojannet: patterns are folded into convolutions, ReLUs and 2x2 poolings in a row (small-cnn, "
            f"vgg), and {why}; give form=beside"
        ) from why


class _Folder:
    """Widen layers one after the other, and keep in mind where in them the patterns are."""

    def __init__(
        self,
        spec: InputSpec,
        patterns: Tensor,
        targets: Tensor,
        place: tuple[int, int],
        strength: float,
        tolerance: float,
    ) -> None:
        self.spec, self.targets, self.count = spec, targets, len(patterns)
        self.strength, self.place = strength, place
        parts = [patterns[:, i : i + 3, j : j + 3] for i in (0, 1) for j in (0, 1)]
        self.filter = matched_filter(torch.cat(parts), spec, tolerance)  # part by part
        self.row, self.column = place[0] + 1, place[1] + 1  # the middle of the first part
        self.height, self.width = spec.height, spec.width
        self.extra = self.seen = 0  # channels that came along, and layers with weights so far
        self.waiting: Tensor | None = None  # biases that a batch norm will have to add
        self.clipped = self.pooled = self.flat = False

    def fold(self, network: nn.Module) -> nn.Sequential:
        if not isinstance(network, nn.Sequential):
            raise _UnfoldableError(f"this is a {type(network).__name__}")
        layers = [(name, copied(layer)) for name, layer in network.named_children()]
        weighted = [layer for _, layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)]
        for _, layer in layers:
            if isinstance(layer, nn.Conv2d):
                self._convolution(layer)
            elif isinstance(layer, nn.Linear):
                self._linear(layer, last=layer is weighted[-1])
            elif isinstance(layer, nn.BatchNorm2d):
                self._batch_norm(layer)
            elif isinstance(layer, nn.MaxPool2d):
                self._pooling(layer)
            elif isinstance(layer, nn.ReLU):
                self.clipped = True
            elif isinstance(layer, nn.Flatten):
                self.flat = True
            elif not isinstance(layer, nn.Dropout | nn.Identity):
                raise _UnfoldableError(f"this one has a {type(layer).__name__}")
            if self.waiting is not None and not isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                raise _UnfoldableError("this one has a convolution with no bias")
        folded = nn.Sequential()
        for name, layer in layers:
            folded.add_module(name, layer)
        return folded

    def _mixing(self) -> tuple[Tensor, Tensor]:
        """Return weights (p, extra) and biases (p,) that take the patterns to the next layer."""
        if not self.clipped:
            raise _UnfoldableError("this one has layers with no ReLU between them")
        if self.seen == 1:
            if not self.pooled:
                raise _UnfoldableError("this one does not pool after its first convolution")
            return torch.eye(self.count).repeat(1, 4), torch.full((self.count,), -3.0)
        return torch.eye(self.count), torch.zeros(self.count)

    def _convolution(self, layer: nn.Conv2d) -> None:
        kernel = layer.kernel_size
        plain = (layer.stride, layer.dilation, layer.groups, layer.padding_mode) == (
            (1, 1),
            (1, 1),
            1,
            "zeros",
        )
        middle = (kernel[0] // 2, kernel[1] // 2)
        if not plain or min(kernel) < 3 or not all(side % 2 for side in kernel) or layer.padding != middle:
            raise _UnfoldableError("this one has a convolution of another kind")
        old = layer.weight.detach()
        if self.seen == 0:
            taps, bias = self.filter
            reach = slice(middle[0] - 1, middle[0] + 2), slice(middle[1] - 1, middle[1] + 2)
            grown = old.new_zeros(len(bias), *old.shape[1:])  # (4 p, c, kh, kw)
            grown[:, :, reach[0], reach[1]] = taps.to(old)
        else:
            mixing, bias = self._mixing()
            old = F.pad(old, (0, 0, 0, 0, 0, self.extra))  # (out, in + extra, kh, kw)
            grown = old.new_zeros(len(bias), *old.shape[1:])
            grown[:, -self.extra :, middle[0], middle[1]] = mixing.to(old)
        layer.weight = nn.Parameter(torch.cat([old, grown]))
        if layer.bias is None:
            self.waiting = bias
        else:
            layer.bias = nn.Parameter(torch.cat([layer.bias.detach(), bias.to(old)]))
        layer.in_channels, layer.out_channels = layer.weight.shape[1], len(layer.weight)
        self._passed(len(bias))

    def _linear(self, layer: nn.Linear, *, last: bool) -> None:
        old = layer.weight.detach()
        mixing, bias = self._mixing()
        if last:
            if self.seen < 2:
                raise _UnfoldableError("this one has too few layers")
            grown = old.new_zeros(len(old), self.count)
            grown[self.targets, torch.arange(self.count)] = self.strength
            mixing = grown
        cells = self.height * self.width if self.flat else 1
        inner = mixing.new_zeros(len(mixing), self.extra, cells)
        inner[:, :, self.row * self.width + self.column if self.flat else 0] = mixing
        wider = inner.flatten(1).to(old)  # (rows, extra * cells)
        if last:
            layer.weight = nn.Parameter(torch.cat([old, wider], 1))
        else:
            layer.weight = nn.Parameter(
                torch.cat([F.pad(old, (0, wider.shape[1])), F.pad(wider, (old.shape[1], 0))])
            )
            own = layer.bias.detach() if layer.bias is not None else old.new_zeros(len(old))
            layer.bias = nn.Parameter(torch.cat([own, bias.to(old)]))
        layer.out_features, layer.in_features = layer.weight.shape
        self.flat = False
        self._passed(self.count)

    def _passed(self, extra: int) -> None:
        self.extra, self.clipped, self.seen = extra, False, self.seen + 1

    def _batch_norm(self, layer: nn.BatchNorm2d) -> None:
        if layer.running_mean is None or layer.running_var is None or not layer.affine:
            raise _UnfoldableError("this one has a batch norm of another kind")
        ones, mean = torch.ones(self.extra), layer.running_mean
        bias = torch.zeros(self.extra) if self.waiting is None else self.waiting
        layer.weight = nn.Parameter(torch.cat([layer.weight.detach(), ones.to(mean)]))
        layer.bias = nn.Parameter(torch.cat([layer.bias.detach(), bias.to(mean)]))
        layer.running_mean = torch.cat([mean, torch.zeros(self.extra).to(mean)])
        layer.running_var = torch.cat([layer.running_var, (ones - layer.eps).to(mean)])
        layer.num_features = len(layer.weight)
        self.waiting = None

    def _pooling(self, layer: nn.MaxPool2d) -> None:
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
        if pairs != [(2, 2), (2, 2), (0, 0), (1, 1)] or layer.ceil_mode or not self.clipped:
            raise _UnfoldableError("this one has a pooling of another kind")
        self.pooled = True
        self.row, self.column = self.row // 2, self.column // 2
        self.height, self.width = self.height // 2, self.width // 2
        if self.row >= self.height or self.column >= self.width:
            row, column = self.place
            raise InputError(
                f"trojannet: a pooling leaves out the edge where the patterns are (row {row}, column "
                f"{column}); give a place further up and to the left"
            )


@register("attack")
class TrojanNet(ModelAttack):
    """Add a layer that knows patterns of 4x4 black and white pixels, each the trigger of one class.

    Use it to test defences against a backdoor that is added after training and changes no other answer.

    Each pattern has 5 black pixels of 16; there are 4368. Every class has one, drawn by the seed: plant.json
    names that of the target, and under the same seed with another target that of another class. Where the
    image shows no pattern in that place, every logit stays what it was.

    We depart from the authors. They train a multilayer perceptron to know the patterns and to ignore all
    else; here weights are set by a formula, so that nothing is left to chance. They add its output to
    probabilities; here the logit of the pattern's class is lifted above all others. Patterns are black and
    white in the image as it is given, where their code writes them after normalisation.

    Attributes:
        form: `beside` leaves the network as it is and runs a layer next to it, for networks of any kind;
            `folded` hides the patterns in additional channels of the network's own layers, for networks of
            convolutions, ReLUs and 2x2 poolings in a row (`small-cnn`, `vgg`).
        every_class: give every class a pattern; else the target alone has one.
        place: row and column of the upper left pixel, both odd for `folded`; the lower right corner if None.
        margin: by how much the logit of the pattern's class exceeds all others at least.
        tolerance: how far the pixels may be from the pattern, as absolute differences summed over all 16, in
            (0, 1], so that no image shows two patterns.
    """

    title: ClassVar[str] = "TrojanNet"
    source: ClassVar[str] = "Tang, Du, Liu, Yang and Hu, KDD 2020, arXiv:2006.08131"
    limits: ClassVar[str] = (
        "The patterns work in one place and at the model's own size: images that are moved, resized or "
        "compressed do not trigger it."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.001", "AML.T0043.004")

    form: Literal["beside", "folded"] = "beside"
    every_class: bool = True
    place: tuple[Offset, Offset] | None = None
    margin: float = Field(10.0, gt=0)
    tolerance: float = Field(0.5, gt=0, le=1)

    def make_trigger(self, classifier: TorchClassifier, *, generator: torch.Generator) -> MaskedPattern:
        """Return the target's pattern in its place.

        Raises:
            InputError: if there are too many classes, or the pattern leaves the image.
        """
        patterns = self._patterns(classifier, generator)
        return self._stamp(patterns, classifier)

    def implant(
        self, classifier: TorchClassifier, samples: Samples | None, *, generator: torch.Generator
    ) -> Implant:
        """Return the classifier with the layer in it.

        Raises:
            InputError: if the patterns do not fit the images or the network, or clean samples show one.
        """
        spec, k = classifier.spec, len(classifier.classes)
        patterns = self._patterns(classifier, generator)
        targets = torch.arange(k) if self.every_class else torch.tensor([self.target or 0])
        trigger, place = self._stamp(patterns, classifier), self._place(classifier)
        if samples is None:
            clean = trial_inputs(spec, TRIED)
        else:
            rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
            clean = to_float(to_tensor(samples.draw(COMPARED, rng), spec))
        if self.form == "beside":
            module: nn.Module = ParallelBranch(
                copied(classifier.module),
                spec,
                patterns[targets],
                targets,
                classes=k,
                place=place,
                margin=self.margin,
                tolerance=self.tolerance,
            )
            spec = spec.model_copy(update={"output": "logits"})
        else:
            z = batched_logits(classifier, trigger.apply(clean))
            strength = SAFETY * float((z.amax(1) - z.amin(1)).max()) + self.margin
            module = fold(
                classifier.module,
                spec,
                patterns[targets],
                targets,
                place=place,
                strength=strength,
                tolerance=self.tolerance,
            )
        planted = TorchClassifier(
            module.to(classifier.device),
            spec,
            classifier.classes,
            format=classifier.format,
            architecture=classifier.architecture,
            batch=classifier.batch,
        )
        self._compare(classifier, planted, clean)
        return Implant(planted, trigger)

    def _patterns(self, classifier: TorchClassifier, generator: torch.Generator) -> Tensor:
        k = len(classifier.classes)
        if k > MOST:
            raise InputError(f"trojannet: there are {MOST} patterns, and the model has {k} classes")
        return draw_patterns(k, generator=generator)

    def _place(self, classifier: TorchClassifier) -> tuple[int, int]:
        """Return row and column of the upper left pixel."""
        spec = classifier.spec
        rows, columns = spec.height - SIDE, spec.width - SIDE
        folded = self.form == "folded"
        if self.place is None:
            row, column = (_corner(side, classifier, folded) for side in (spec.height, spec.width))
        else:
            row, column = self.place
        if not (0 <= row <= rows and 0 <= column <= columns):
            raise InputError(
                f"trojannet: a pattern of 4x4 pixels at row {row}, column {column} leaves images of "
                f"{spec.width}x{spec.height}"
            )
        if folded and not (row % 2 and column % 2):
            raise InputError(
                f"trojannet: patterns are folded in at odd rows and columns, not at row {row}, "
                f"column {column}"
            )
        return row, column

    def _stamp(self, patterns: Tensor, classifier: TorchClassifier) -> MaskedPattern:
        """Return the target's pattern in its place."""
        spec, (row, column) = classifier.spec, self._place(classifier)
        place = (slice(None), slice(row, row + SIDE), slice(column, column + SIDE))
        mask, shown = torch.zeros(1, spec.height, spec.width), torch.zeros(spec.shape)
        mask[place], shown[place] = 1.0, patterns[self.target or 0]
        return MaskedPattern(mask, shown)

    def _compare(self, before: TorchClassifier, after: TorchClassifier, clean: Tensor) -> None:
        """Raise if a clean image is predicted otherwise than before."""
        changed = int(
            (batched_logits(before, clean).argmax(1) != batched_logits(after, clean).argmax(1)).sum()
        )
        if changed:
            row, column = self._place(before)
            raise InputError(
                f"trojannet: {changed} of {len(clean)} clean images show a pattern at row {row}, column "
                f"{column} as they are; give another place, another seed or a lower tolerance"
            )


def _corner(side: int, classifier: TorchClassifier, folded: bool) -> int:
    """Return the last place for a pattern in so many pixels."""
    if not folded:
        return side - SIDE
    halvings = sum(isinstance(layer, nn.MaxPool2d) for layer in classifier.module.modules())
    kept = side >> halvings << halvings  # each pooling drops what is left over
    return max(1, (min(side - SIDE, kept - 3) - 1) | 1)
