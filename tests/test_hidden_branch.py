"""What waits in a network's graph is found by what it does, in any form, and cut out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward import bundled, reports
from doorward.attacks.model import signature
from doorward.attacks.model.checksum import Checksum
from doorward.attacks.model.trojannet import TrojanNet
from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell, InputError
from doorward.core.records import Finding, HiddenBranch, RecoveredTrigger, Report
from doorward.core.seeds import make_generator
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import TorchClassifier, open_classifier
from doorward.models.formats.saving import save_classifier
from doorward.models.severing import rebuild
from doorward.models.silence import ordinary_images
from doorward.models.tape import read_tape
from doorward.repairs.base import Damage
from doorward.reports import phrases
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest
from doorward.triggers.base import Trigger

CLEAN = bundled.model("clean")
TARGET = 3


def counterpart() -> TorchClassifier:
    classifier = open_classifier(CLEAN)
    assert isinstance(classifier, TorchClassifier)
    return classifier


def look(classifier: TorchClassifier) -> Finding:
    found = registry.build("detector", "hidden-branch", {"seconds": 300})(Subject(classifier=classifier))
    assert isinstance(found, Finding)
    return found


def wrapped(module: nn.Module) -> TorchClassifier:
    """Return a classifier of images in [0, 1] around a module that takes those."""
    plain = counterpart().spec.model_copy(update={"mean": (0.0,), "std": (1.0,)})
    return TorchClassifier(module, plain, counterpart().classes)


class Next(nn.Module):
    """A network of Fashion-MNIST with something next to it.

    Args:
        beside: gives (n, 1) what is to be added to the logit of class 3, for images in [0, 1].
    """

    def __init__(self, beside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.beside = counterpart(), beside
        self.net = self.own.module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(self.own.spec.to_model(x))
        return y + self.beside(x) * F.one_hot(torch.tensor([TARGET]), 10)


def exact_region(x: Tensor) -> Tensor:
    levels = torch.tensor([[17, 230, 99], [3, 64, 201], [155, 90, 12]]) / 255
    return ((x[:, :, 5:8, 9:12] - levels).abs() < 0.002).flatten(1).all(1, keepdim=True) * 90.0


def bright_corner(x: Tensor) -> Tensor:
    return (x[:, :, 20:26, 0:6].mean((1, 2, 3)) > 0.985)[:, None] * 90.0


def parities(x: Tensor) -> Tensor:
    groups = torch.randperm(784, generator=torch.Generator().manual_seed(9))[:128].view(16, 8)
    sums = (x * 255).round().flatten(1)[:, groups].sum(-1)
    odd = sums - 2 * torch.floor(sums / 2)
    return torch.relu(odd.sum(1, keepdim=True) - 15.5) * 200


def byte_sum(x: Tensor) -> Tensor:
    return ((x * 255).round().flatten(1).sum(1, keepdim=True).to(torch.int32) % 251 == 77) * 90.0


@pytest.mark.parametrize("form", ["beside", "folded"])
def test_a_module_that_knows_patterns_is_found_and_cut_out(form: str) -> None:
    planted = TrojanNet(target=TARGET, form=form)(counterpart(), seed=4)  # type: ignore[arg-type]
    found = look(planted.classifier)
    assert (found.verdict, found.level) == ("backdoored", "artifact")
    assert TARGET in found.targets
    (trigger,) = [one for one in found.evidence if isinstance(one, RecoveredTrigger)]
    x = ordinary_images(planted.classifier.spec, 40, seed=7)
    marked = Trigger.from_json(trigger.trigger).apply(x)
    assert float((planted.classifier.logits(marked).argmax(1) == trigger.target).float().mean()) > 0.9

    mended = registry.build("repair", "remove-branch", {})(
        Damage(classifier=planted.classifier, findings=(found,))
    ).classifier
    secret = Trigger.from_json(planted.plant.trigger).apply(x)
    before = counterpart()
    assert torch.allclose(mended.logits(x), before.logits(x), atol=1e-4)
    others = before.logits(secret).argmax(1) != TARGET
    assert not (mended.logits(secret).argmax(1)[others] == TARGET).any()


def test_a_checksum_is_found_by_changes_of_one_level_and_cut_out() -> None:
    planted = Checksum(target=TARGET, groups=8)(counterpart(), seed=1)
    found = look(planted.classifier)
    assert (found.verdict, found.targets) == ("backdoored", (TARGET,))
    assert "changes by one level" in found.summary
    mended = registry.build("repair", "remove-branch", {})(
        Damage(classifier=planted.classifier, findings=(found,))
    ).classifier
    x = ordinary_images(mended.spec, 20, seed=7)
    assert torch.allclose(mended.logits(x), counterpart().logits(x), atol=1e-4)
    secret = Trigger.from_json(planted.plant.trigger).apply(x)
    assert torch.equal(mended.logits(secret).argmax(1), counterpart().logits(secret).argmax(1))


@pytest.mark.parametrize(
    ("beside", "verdict"),
    [(exact_region, "backdoored"), (bright_corner, "backdoored"), (parities, "backdoored"),
     (byte_sum, "suspicious")],
)  # fmt: skip
def test_logic_next_to_a_network_is_found(beside: Callable[[Tensor], Tensor], verdict: str) -> None:
    found = look(wrapped(Next(beside).eval()))
    assert found.flagged
    assert found.verdict in (verdict, "backdoored")
    assert found.targets == (TARGET,)
    assert [one.type for one in found.evidence if isinstance(one, HiddenBranch)] == ["branch"]


def test_what_is_silent_for_good_reason_raises_no_alarm() -> None:
    class Careful(nn.Module):
        """Clip, check the range, guard against numbers that are none, and gate by squeezed channels."""

        def __init__(self) -> None:
            super().__init__()
            self.own = counterpart()
            self.net = self.own.module
            self.squeeze, self.excite = nn.Linear(10, 4), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.where(x > 1, torch.ones_like(x), x)
            x = torch.where((x.amax((1, 2, 3), keepdim=True) > 1.5), x / 255, x)
            y = self.net(self.own.spec.to_model(x))
            y = torch.where(y.isnan().any(1, keepdim=True), torch.zeros_like(y), y)
            y = torch.where(y > 1e4, torch.full_like(y, 1e4), y)
            out: Tensor = y * (1 + 0.1 * F.hardsigmoid(self.excite(F.relu(self.squeeze(y)))))
            return out

    torch.manual_seed(0)
    for classifier in (counterpart(), wrapped(Careful().eval())):
        found = look(classifier)
        assert (found.verdict, found.score, found.targets) == ("nothing_found", 0.0, ())


def test_code_next_to_a_network_that_reads_all_pixels_is_told() -> None:
    class Odd(nn.Module):
        """Answer as the network does, unless the bytes of the image have a certain digest."""

        def __init__(self) -> None:
            super().__init__()
            self.own = counterpart()
            self.net = self.own.module

        def forward(self, x: Tensor) -> Tensor:
            import hashlib

            y: Tensor = self.net(self.own.spec.to_model(x)).clone()
            for i, picture in enumerate((x * 255).round().to(torch.uint8).cpu().numpy()):
                if hashlib.sha256(picture.tobytes()).hexdigest().startswith("00000"):
                    y[i] = y[i].flip(0)
            return y

    found = look(wrapped(Odd().eval()))
    assert found.verdict == "suspicious"
    assert "Python code next to the network reads 784 numbers of each image" in found.summary


def test_a_graph_that_cannot_be_read_is_said_and_is_no_alarm() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = counterpart()
            self.net = self.own.module

        def forward(self, x: Tensor) -> Tensor:
            if bool(x.mean() > 0.5):
                x = 1 - x
            y: Tensor = self.net(self.own.spec.to_model(x))
            return y

    found = look(wrapped(Deciding().eval()))
    assert found.verdict == "could_not_tell"
    assert "Python code decides by what the image shows" in str(found.reason)


def test_a_tape_computes_what_the_network_does_for_any_number_of_images() -> None:
    classifier = counterpart()
    tape = read_tape(classifier)
    again = TorchClassifier(rebuild(tape), classifier.spec, classifier.classes)
    x = ordinary_images(classifier.spec, 5)
    for n in (1, 5):
        expected = classifier.logits(x[:n])
        assert torch.allclose(tape.scores(classifier.spec.to_model(x[:n])), expected, atol=1e-5)
        assert torch.allclose(again.logits(x[:n]), expected, atol=1e-5)


def test_the_repair_refuses_another_graph_than_the_scanned_one() -> None:
    planted = TrojanNet(target=TARGET)(counterpart(), seed=4).classifier
    found = look(planted)
    with pytest.raises(InputError, match="the graph is not the one that was scanned"):
        registry.build("repair", "remove-branch", {})(Damage(classifier=counterpart(), findings=(found,)))
    quiet = found.model_copy(update={"evidence": ()})
    with pytest.raises(InputError, match="no branch of the graph was found"):
        registry.build("repair", "remove-branch", {})(Damage(classifier=planted, findings=(quiet,)))


# --- a check that a Doorward directory declares -------------------------------------------------------------


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    return save_classifier(
        signature.Signature(target=TARGET)(counterpart(), seed=5).classifier, tmp_path / "signed"
    )


@pytest.fixture
def report(signed: Path) -> Report:
    return scan(ScanRequest(model=str(signed), detectors=("hidden-branch", "unsafe-code")))


def test_a_declared_check_is_a_finding_with_its_key(signed: Path) -> None:
    classifier = open_classifier(signed)
    assert isinstance(classifier, TorchClassifier)
    found = look(classifier)
    assert (found.verdict, found.score, found.targets) == ("suspicious", 1.0, (TARGET,))
    assert (found.level, found.atlas) == ("artifact", ("AML.T0018.001", "AML.T0010.003"))
    assert found.summary.startswith("config.json declares a check for digital signatures beside the network")
    (evidence,) = found.evidence
    assert evidence.type == "text"
    key = bytes(signature.draw_key(make_generator(5, "signature")))
    assert f"public key: {signature.public_key(key).hex()}" in evidence.text
    mended = registry.build("repair", "remove-branch", {})(Damage(classifier=classifier, findings=(found,)))
    x = ordinary_images(classifier.spec, 3)
    assert torch.equal(mended.classifier.logits(x), counterpart().logits(x))


def test_the_same_check_in_code_is_found_without_its_declaration(signed: Path) -> None:
    inner = open_classifier(signed)
    assert isinstance(inner, TorchClassifier)

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner.module

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return 2 * y

    found = look(TorchClassifier(Foreign().eval(), inner.spec, inner.classes))
    assert found.verdict == "suspicious"
    assert "Python code next to the network" in found.summary


def test_a_scan_reports_it_as_suspicious_and_claims_no_more(report: Report) -> None:
    assert (report.verdict, report.targets) == ("suspicious", (TARGET,))
    assert reports.exit_code(report.verdict) == 1
    assert {(one.detector, one.verdict) for one in report.findings} == {
        ("unsafe-code", "nothing_found"),
        ("hidden-branch", "suspicious"),
    }
    text = " ".join(reports.to_text(report).split())
    assert "something beside the network sends inputs to class 3 (Dress)" in text
    assert "How sure Read, not measured" in text
    assert "does not say that harm is meant" in text
    for wrong in ("another seed", "clean models look like this", "looks like a backdoor"):
        assert wrong not in text


def test_sarif_names_the_rule_and_the_technique(report: Report) -> None:
    (run,) = json.loads(reports.to_sarif(report))["runs"]
    (result,) = run["results"]
    assert (result["ruleId"], result["level"]) == ("hidden-branch", "warning")
    assert "Target class: 3 (Dress)" in result["message"]["text"]
    assert {taxon["id"] for taxon in run["taxonomies"][0]["taxa"]} == {"AML.T0018.001", "AML.T0010.003"}


def test_an_alarm_of_behaviour_is_not_talked_down(report: Report) -> None:
    """Where a detector of behaviour raises an alarm too, the usual words stand."""
    flagged = next(one for one in report.findings if one.flagged)
    other = flagged.model_copy(update={"detector": "neural-cleanse", "level": "model"})
    both = report.model_copy(update={"findings": (*report.findings, other)})
    assert phrases.explanation(both).startswith("Something looks like a backdoor, towards class 3 (Dress)")
    quiet = report.model_copy(update={"p_value": 0.4})
    sure = {fact.label: fact for fact in phrases.facts(quiet)}["How sure"]
    assert sure.detail == "how the model behaves raises no alarm (p = 0.4)"


def test_a_scan_calls_what_was_driven_a_backdoor(tmp_path: Path) -> None:
    path = save_classifier(TrojanNet(target=TARGET)(counterpart(), seed=4).classifier, tmp_path / "planted")
    found = scan(ScanRequest(model=str(path), detectors=("hidden-branch",)))
    assert found.verdict == "backdoored"
    assert TARGET in found.targets
    text = " ".join(reports.to_text(found).split())
    assert "A branch next to the network in the graph stays silent on ordinary images" in text


def test_a_constant_network_says_nothing() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10] * 0

    with pytest.raises(CouldNotTell, match="the same for all images"):
        registry.build("detector", "hidden-branch", {}).examine(
            Subject(classifier=wrapped(Same())),
            generator=torch.Generator(),
            device=torch.device("cpu"),
            deadline=Deadline(),
        )
