"""Hidden branches: what in a network's graph waits for a pattern and then answers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import (
    Evidence,
    Finding,
    HiddenBranch,
    Level,
    Need,
    Picture,
    RecoveredTrigger,
    Text,
)
from doorward.detectors.base import Detector
from doorward.methods.base import EVIDENCE_ONLY
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch

    from doorward.detectors.artifact._driving import Driven, Material
    from doorward.detectors.artifact._gates import Forced, Gate, HeavyUnit
    from doorward.detectors.subject import Subject
    from doorward.models import TorchClassifier
    from doorward.models.silence import Network

#: Images that the graph is watched on: made ones, fewer where they are large, and clean ones.
MADE, MADE_LARGE, CLEAN = 48, 16, 48
#: Side of an image that counts as large, and cells of the grid over images up to it and beyond.
LARGE, FINE, COARSE = 64, 14, 7
#: What the score counts.
SCORE = "hidden branches"


@register("detector")
class HiddenBranchSearch(Detector):
    """Search a network's graph for branches that ordinary images leave silent and that can answer alone.

    Use it on every model that others gave you: gradients do not see such a branch, the graph does, and no
    images are needed.

    The network is read as a list of operator calls, whatever its format. Three things are looked for:
    a comparison or a branch apart from the network, always the same for ordinary images, that joins the
    answer; a branch that reads a small part of the image; and silent units with far more weight than their
    neighbours. Each is set by hand, to see whether all images become one class. Then it is driven by its own
    input: black and white patterns at the place that the graph names, levels, and changes by one level.

    What is driven, and answers through this branch alone, is a backdoor, and its trigger is shown. A branch
    that can only be set by hand makes a model suspicious. So does Python code next to the network that reads
    all pixels and leaves the answers to ordinary images as they are, as a check of signatures does.

    Attributes:
        seconds: time for driving what is silent.
        proofs: how many branches are driven until they answer; the others are set by hand alone.
    """

    title: ClassVar[str] = "Hidden branches in the graph"
    source: ClassVar[str] = (
        "Doorward's own; the modules that it looks for are those of Tang et al., KDD 2020, arXiv:2006.08131, "
        "and of Goldwasser et al., FOCS 2022, arXiv:2204.06974"
    )
    limits: ClassVar[str] = (
        "A branch that moves with ordinary images, that is spread over units of usual weight, or that shares "
        "its layers with the network and waits for more than a small pattern passes, and so does what Python "
        "code does out of sight of torch."
    )
    #: Modify AI Model Architecture; AI Supply Chain Compromise: Model.
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.001", "AML.T0010.003")
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[Need]] = frozenset({"graph"})
    level: ClassVar[Level] = "artifact"
    kind: ClassVar = "backdoor"
    order: ClassVar[int] = 2

    seconds: float = Field(30.0, gt=0)
    proofs: int = Field(1, ge=1, json_schema_extra=EVIDENCE_ONLY)

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Finding:
        """Read the graph and drive what is silent in it.

        Raises:
            CouldNotTell: if the graph cannot be read.
        """
        from doorward.models import TorchClassifier
        from doorward.models.formats.signature_check import SignatureWrapper

        classifier = subject.classifier
        if not isinstance(classifier, TorchClassifier):
            raise CouldNotTell("the graph cannot be read: the model is run by another library")
        if classifier.spec.modality != "image":
            raise CouldNotTell("the graph is driven by images, which this model does not take")
        if isinstance(classifier.module, SignatureWrapper):
            return self._declared(classifier.module)
        return self._search(classifier, subject, generator, deadline)

    def _search(
        self,
        classifier: TorchClassifier,
        subject: Subject,
        generator: torch.Generator,
        deadline: Deadline,
    ) -> Finding:
        from doorward.detectors.artifact._escapes import find_escape
        from doorward.models.silence import Network
        from doorward.models.tape import read_tape

        try:
            tape = read_tape(classifier).on_cpu()
        except CouldNotTell:
            escape = find_escape(classifier)
            if escape is None or not escape.hidden:
                raise
            return self._code(escape.read)
        escape = find_escape(classifier) if tape.handed else None
        if escape is not None and escape.hidden:
            return self._code(escape.read)
        network = Network(classifier, tape)
        limit = Deadline(min(self.seconds, max(deadline.left(), 0.0)))
        material = _material(network, subject, limit)
        return self._judged(network, material, generator, limit)

    def _judged(
        self, network: Network, material: Material, generator: torch.Generator, deadline: Deadline
    ) -> Finding:
        """Set and drive each gate, and return what was found."""
        from doorward.detectors.artifact import _driving as driving
        from doorward.detectors.artifact import _gates as gates

        found = gates.find_gates(network, material.reach, material.seen)
        heavy = gates.silent_units(network.tape, material.reach, material.seen)
        forced: list[Forced] = []
        for gate in found:
            if gate.silent and deadline.left() > 0:
                one = gates.force(network, gate, material.images, material.answers, material.seen)
                forced += [] if one is None else [one]
        driven: list[Driven] = []
        units = [] if forced else driving.worth_driving(network, heavy, material, deadline)
        suspects = [*(one.gate for one in forced), *(gate for gate in found if gate.kind == "small branch")]
        done = 0
        for gate in dict.fromkeys([*suspects, *(unit.gate for unit in units)]):
            if deadline.left() <= 0 or len(driven) >= self.proofs:
                break
            first = next((one.first for one in forced if one.gate == gate), None)
            hit = driving.drive(network, gate, material, generator=generator, deadline=deadline, first=first)
            done += 1
            driven += [] if hit is None else [hit]
        swept = f"{done} of {len(set(suspects)) + len(units)} silent places were driven"
        if not forced and not driven:
            late = "; the time was over before all were" if deadline.left() <= 0 else ""
            return self.finding(
                score=0.0,
                threshold=1.0,
                score_name=SCORE,
                summary=f"No branch of the graph, of {len(network.tape.steps)} calls, waits for a pattern "
                f"and answers alone: {swept}{late}",
            )
        together = [_as_heavy(network, hit, heavy, material) for hit in driven if hit.gate.kind == "unit"]
        return self._found(network, [*forced, *together], driven, swept)

    def _found(self, network: Network, forced: list[Forced], driven: list[Driven], swept: str) -> Finding:
        places = {one.gate.value: one.gate for one in driven}
        places |= {one.gate.value: one.gate for one in forced}
        leads = {one.gate.value: tuple(dict.fromkeys(one.targets.values())) for one in forced}
        targets = [hit.target for hit in driven] + [one for each in leads.values() for one in each]
        evidence = [one for hit in driven for one in _shown(hit)]
        for value, gate in places.items():
            target = next((hit.target for hit in driven if hit.gate.value == value), None)
            evidence += _placed(network, gate, leads[value][0] if target is None else target)
        return self.finding(
            verdict="backdoored" if driven else "suspicious",
            score=float(len(places)),
            threshold=1.0,
            score_name=SCORE,
            targets=tuple(dict.fromkeys(targets)),
            summary=_told(driven, forced, swept),
            evidence=tuple(evidence),
        )

    def _code(self, read: int) -> Finding:
        """Return the finding on Python code that reads the image."""
        return self.finding(
            verdict="suspicious",
            score=1.0,
            threshold=1.0,
            score_name=SCORE,
            summary=f"Python code next to the network reads {read:,} numbers of each image and leaves the "
            "answers to ordinary images as they are; what it waits for cannot be read from the graph",
            evidence=(
                Text(
                    title="Code next to the network",
                    text=f"numbers of each image that leave torch: {read:,}\nanswers to ordinary images when "
                    "the code is given other images: unchanged",
                ),
            ),
        )

    def _declared(self, check: Any) -> Finding:
        """Return the finding on the check for signatures that a Doorward directory states."""
        key = bytes(check.public.tolist()).hex()
        return self.finding(
            verdict="suspicious",
            score=1.0,
            threshold=1.0,
            score_name=SCORE,
            targets=(check.target,),
            summary="config.json declares a check for digital signatures beside the network: whoever has the "
            f"private key can sign any image, and the model then answers class {check.target}, whatever the "
            "image shows",
            evidence=(
                Text(
                    title="The check in config.json",
                    text=f"Ed25519 signatures in the lowest bits\nclass of signed images: {check.target}\n"
                    f"public key: {key}",
                ),
            ),
        )


def _material(network: Network, subject: Subject, deadline: Deadline) -> Material:
    """Return what gates are looked for and driven with.

    Raises:
        CouldNotTell: if the network gives the same for all images, or what is no number.
    """
    import torch

    from doorward.detectors.artifact._driving import Material
    from doorward.models.encode.image import to_float, to_tensor
    from doorward.models.reach import find_reach
    from doorward.models.silence import check_scores, decided, ordinary_images, watch

    spec = network.spec
    large = max(spec.height, spec.width) > LARGE
    images = ordinary_images(spec, MADE_LARGE if large else MADE)
    if subject.clean is not None and len(subject.clean):
        rows = list(range(min(len(subject.clean), CLEAN // 2 if large else CLEAN)))
        images = torch.cat([to_float(to_tensor(subject.clean.select(rows), spec)).cpu(), images])
    with torch.no_grad():
        seen = watch(network.tape, spec.to_model(images))
    check_scores(seen.scores)
    grid = (min(COARSE if large else FINE, spec.height), min(COARSE if large else FINE, spec.width))
    reach = find_reach(network.tape, (spec.channels, spec.height, spec.width), spec.layout, grid, deadline)
    return Material(images, decided(seen.scores), seen, reach)


def _as_heavy(network: Network, hit: Driven, heavy: list[HeavyUnit], material: Material) -> Forced:
    """Return the silent units that were hidden together with one, and the classes that they lead to."""
    from doorward.detectors.artifact._gates import Forced, Gate, as_heavy, force

    gate = Gate(hit.gate.value, "unit", as_heavy(heavy, hit.gate))
    (own,) = hit.gate.elements
    found = force(network, gate, material.images, material.answers, material.seen)
    targets = {own: hit.target} | ({} if found is None else found.targets)
    return Forced(gate, targets, hit.turned, hit.of)


def _shown(hit: Driven) -> list[Evidence]:
    """Return the trigger that was recovered, and an image without and with it."""
    from doorward.models.encode.image import picture, side_by_side

    shown: list[Evidence] = []
    if hit.mask is not None and hit.pattern is not None:
        from doorward.triggers.masked import MaskedPattern

        shown.append(
            RecoveredTrigger(
                title=f"What moves the branch towards class {hit.target}",
                target=hit.target,
                trigger=MaskedPattern(hit.mask, hit.pattern).to_json(),
            )
        )
    else:
        changed = int((hit.before != hit.after).sum())
        shown.append(
            Text(
                title="What moves the branch",
                text=f"values of an image that change: {changed}\nby at most: "
                f"{float((hit.before - hit.after).abs().max()) * 255:.0f} of 255\n"
                f"class that it becomes: {hit.target}",
            )
        )
    shown.append(
        Picture(
            title="A made image without and with what moves the branch",
            alt=f"Two pictures; the model sees class {hit.target} in the second",
            png=picture(side_by_side([hit.before, hit.after])),
        )
    )
    return shown


def _placed(network: Network, gate: Gate, target: int) -> list[Evidence]:
    """Return where in the graph a gate is, for readers and for the repair."""
    tape, elements = network.tape, gate.elements
    own = [step for step in tape.ancestors([gate.value]) if step.derived]
    readers = sorted({step.name for step in tape.readers.get(gate.value, [])})
    lines = [f"{step.name} -> {'x'.join(map(str, tape.shapes[step.outputs[0] or 0][1:]))}" for step in own]
    shown = lines if len(lines) <= 24 else [*lines[:8], f"({len(lines) - 20} more)", *lines[-12:]]
    units = f"\nelements: {', '.join(map(str, elements[:32]))}" if elements else ""
    return [
        Text(
            title=f"The {gate.kind} in the graph, from the image on",
            text="\n".join(shown) + f"\nread by: {', '.join(readers)}{units}",
        ),
        HiddenBranch(
            title=f"A {gate.kind} that leads to class {target}",
            target=target,
            value=gate.value,
            operator=tape.makers[gate.value].name,
            elements=elements,
            calls=len(tape.steps),
        ),
    ]


_WORDS = {
    "comparison": "a comparison",
    "branch": "a branch next to the network",
    "small branch": "a branch that reads a small part of the image",
    "unit": "a unit",
}


def _told(driven: list[Driven], forced: list[Forced], swept: str) -> str:
    """Say what was found in one sentence."""
    if driven:
        hit = driven[0]
        how = "a recovered pattern" if hit.mask is not None else "changes by one level of 255"
        return (
            f"{_WORDS[hit.gate.kind].capitalize()} in the graph stays silent on ordinary images, and with "
            f"{how} turns {hit.turned} of {hit.of} images to class {hit.target}; held still, they turn back "
            f"({swept})"
        )
    one = forced[0]
    return (
        f"{_WORDS[one.gate.kind].capitalize()} in the graph stays silent on ordinary images, and set by hand "
        f"makes images of other classes class {one.targets[one.first]}; what sets it was not found ({swept})"
    )
