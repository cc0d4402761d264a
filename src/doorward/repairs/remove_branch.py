"""Remove a hidden branch: cut it out of the network's graph."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from doorward.core.errors import CouldNotTell, InputError
from doorward.core.formatting import joined
from doorward.core.records import HiddenBranch
from doorward.methods.registry import register
from doorward.models import TorchClassifier
from doorward.models.adapted import AdaptedModule
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.formats.signature_check import SignatureWrapper
from doorward.models.outputs import SIGMOIDS, SOFTMAXES
from doorward.models.severing import Cut, rebuild
from doorward.models.silence import Watched, decided, ordinary_images, watch
from doorward.models.tape import Tape, read_tape
from doorward.repairs.base import Damage, Mended, Repair, like

#: Images that say what a silent branch is held at, and that have to be answered as before.
WATCHED = 48
#: How far scores may move, as a share of the largest.
SAME = 1e-3


@register("repair")
class RemoveBranch(Repair):
    """Cut hidden branches out of a network's graph, and hold them at what ordinary images make of them.

    Use it where `hidden-branch` has found a branch: all other answers stay as they are, and nothing is
    trained.

    The network is built again from the calls of operators that it makes, without those that only the
    branch needs. Where units of a layer are hidden, they are held and the layer stays. A check of signatures
    that a Doorward directory declares is left out. What is written is a graph: a `torch.export` program or
    an ONNX file.
    """

    title = "Hidden branches cut out"
    source = "Doorward's own; the branches are those of Tang et al., KDD 2020, arXiv:2006.08131"
    limits = (
        "It cuts what was found and no more, the layers' own code is replaced by a graph of operators, and "
        "Python code next to a network cannot be cut."
    )
    atlas = ("AML.T0018.001", "AML.T0043.004")
    needs = frozenset({"graph"})
    mends = frozenset({"backdoor"})
    order: ClassVar[int] = 5

    @classmethod
    def unfit(cls, damage: Damage) -> str | None:
        """Return why the repair cannot act on this damage, None if it can."""
        if isinstance(damage.classifier.module, SignatureWrapper):
            return None
        return super().unfit(damage) or (None if _places(damage) else "no branch of the graph was found")

    def mend(self, damage: Damage) -> Mended:
        """Return the network without the branches."""
        classifier = damage.classifier
        if isinstance(classifier.module, SignatureWrapper):
            inner = like(classifier, classifier.module.model)
            return Mended(inner, damage.train, "the declared check of signatures was left out")
        try:
            tape = read_tape(classifier)
        except CouldNotTell as why:
            raise InputError(f"remove-branch: {why}") from why
        places = _places(damage)
        for place in places:
            _check(tape, place)
        images = _images(damage)
        seen = watch(tape, classifier.spec.to_model(images.to(classifier.device)))
        module = rebuild(tape, [_cut(tape, place, seen) for place in places])
        mended = _classifier(classifier, module)
        _compare(mended, seen, images)
        what = joined([f"{place.operator} (value {place.value})" for place in places])
        calls = max(0, len(tape.steps) - len(_read_again(mended).steps))
        done = f"cut out of the graph: {what}; {calls} calls of operators went with it"
        return Mended(mended, damage.train, done)


def _read_again(classifier: TorchClassifier) -> Tape:
    try:
        return read_tape(classifier)
    except CouldNotTell as why:
        raise InputError(f"remove-branch: the network without the branch cannot be read: {why}") from why


def _places(damage: Damage) -> list[HiddenBranch]:
    """Return the branches that a scan has found, each once."""
    found = [
        one
        for finding in damage.findings
        if finding.flagged
        for one in finding.evidence
        if isinstance(one, HiddenBranch)
    ]
    return list({(one.value, one.elements): one for one in found}.values())


def _check(tape: Tape, place: HiddenBranch) -> None:
    """Raise unless a branch is where a scan has found it.

    Raises:
        InputError: if the graph is another one.
    """
    maker = tape.makers.get(place.value)
    if maker is None or maker.name != place.operator or len(tape.steps) != place.calls:
        raise InputError("remove-branch: the graph is not the one that was scanned; scan the model again")


def _images(damage: Damage) -> torch.Tensor:
    """Return ordinary images and, where there are any, clean ones."""
    spec, clean = damage.classifier.spec, damage.clean
    made = ordinary_images(spec, WATCHED)
    if clean is None or not len(clean):
        return made
    some = clean.select(list(range(min(len(clean), WATCHED))))
    return torch.cat([to_float(to_tensor(some, spec)).cpu(), made])


def _cut(tape: Tape, place: HiddenBranch, seen: Watched) -> Cut:
    """Return the cut that holds a branch at what it mostly is."""
    shape = tape.shapes[place.value]
    if place.value not in seen.values:
        raise InputError("remove-branch: the branch is too wide to be held")
    constant = seen.constant(place.value).view(1, *shape[1:])
    if place.value in tape.switches:
        constant = constant > 0.5
    return Cut(place.value, place.elements, constant)


def _classifier(classifier: TorchClassifier, module: nn.Module) -> TorchClassifier:
    """Return a classifier of the rebuilt network, whose end is that of the network itself."""
    own: Any = classifier.module
    end: tuple[str, ...] = ()
    while not isinstance(own, AdaptedModule) and hasattr(own, "inner"):
        own = own.inner
    if isinstance(own, AdaptedModule):
        end = own.end
    made = like(classifier, module)
    if set(end) & (SOFTMAXES | SIGMOIDS):
        spec = classifier.spec.model_copy(update={"output": "probabilities"})
        made = TorchClassifier(
            module,
            spec,
            classifier.classes,
            format=classifier.format,
            architecture=classifier.architecture,
            batch=classifier.batch,
        )
    return made


def _compare(mended: TorchClassifier, seen: Watched, images: torch.Tensor) -> None:
    """Raise unless ordinary images are answered as before.

    Raises:
        InputError: if they are not.
    """
    tape = _read_again(mended)
    now = watch(tape, mended.spec.to_model(images.to(mended.device))).scores
    usual = (decided(now) == decided(seen.scores)).float().mean()
    apart = (now - seen.scores).abs().amax(1).median() / seen.scores.abs().amax().clamp_min(1e-12)
    if float(usual) < 1 - 0.1 or float(apart) > SAME:
        raise InputError("remove-branch: without the branch ordinary images are answered otherwise")
