"""What a model's files declare next to its network is said, and no more than that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor, nn

from doorward import bundled, reports
from doorward.attacks.model import signature
from doorward.attacks.model.trojannet import TrojanNet
from doorward.core.records import Finding, Report
from doorward.core.seeds import make_generator
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import TorchClassifier, open_classifier
from doorward.models.formats.saving import save_classifier
from doorward.reports import phrases
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest

CLEAN = bundled.model("clean")
TARGET = 3


def look(path: Path) -> Finding:
    found = registry.build("detector", "declared-check", {})(Subject(artifact=path))
    assert isinstance(found, Finding)
    return found


def counterpart() -> TorchClassifier:
    classifier = open_classifier(CLEAN)
    assert isinstance(classifier, TorchClassifier)
    return classifier


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    return save_classifier(
        signature.Signature(target=TARGET)(counterpart(), seed=5).classifier, tmp_path / "signed"
    )


@pytest.fixture
def report(signed: Path) -> Report:
    return scan(ScanRequest(model=str(signed), detectors=("declared-check", "unsafe-code")))


def test_the_declared_check_is_a_finding_with_its_key(signed: Path) -> None:
    found = look(signed)
    assert (found.verdict, found.score, found.targets) == ("suspicious", 1.0, (TARGET,))
    assert (found.level, found.atlas) == ("artifact", ("AML.T0018.001", "AML.T0010.003"))
    assert found.summary.startswith("config.json declares a check for digital signatures beside the network")
    (evidence,) = found.evidence
    assert evidence.type == "text"
    key = bytes(signature.draw_key(make_generator(5, "signature")))
    assert f"public key: {signature.public_key(key).hex()}" in evidence.text


def test_so_is_one_beside_a_network_in_another_file(tmp_path: Path) -> None:
    class Foreign(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return 2 * y

    inner = counterpart()
    other = TorchClassifier(Foreign(inner.module), inner.spec, inner.classes)
    path = save_classifier(signature.Signature()(other).classifier, tmp_path / "model")
    assert (path / "model.pt2").is_file()
    assert look(path).targets == (0,)


def test_what_declares_nothing_raises_no_alarm(tmp_path: Path, signed: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"architectures": ["Bert"], "signature": {"target": 1}}')
    (tmp_path / "weights.pt2").write_bytes(b"no directory")
    beside = save_classifier(TrojanNet(target=TARGET)(counterpart()).classifier, tmp_path / "beside")
    for path in (CLEAN, tmp_path / "bert", tmp_path / "weights.pt2", beside, signed / "model.safetensors"):
        found = look(path)
        assert (found.verdict, found.score, found.targets, found.atlas) == ("nothing_found", 0.0, (), ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": "doorward", "signature": {"target": 1}}', "signature.public: Field required"),
        ("{", "config.json is not readable as JSON"),
    ],
)
def test_what_cannot_be_understood_is_no_good_news(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    found = look(tmp_path)
    assert found.verdict == "could_not_tell"
    assert reason in str(found.reason)


def test_a_scan_reports_it_as_suspicious_and_claims_no_more(report: Report) -> None:
    assert (report.verdict, report.targets) == ("suspicious", (TARGET,))
    assert reports.exit_code(report.verdict) == 1
    assert [(one.detector, one.verdict) for one in report.findings] == [
        ("unsafe-code", "nothing_found"),
        ("declared-check", "suspicious"),
    ]
    text = " ".join(reports.to_text(report).split())
    assert "something beside the network sends inputs to class 3 (Dress)" in text
    assert "How sure Read, not measured" in text
    assert "does not say that harm is meant" in text
    for wrong in ("another seed", "clean models look like this", "looks like a backdoor"):
        assert wrong not in text


def test_sarif_names_the_rule_and_the_technique(report: Report) -> None:
    (run,) = json.loads(reports.to_sarif(report))["runs"]
    (result,) = run["results"]
    assert (result["ruleId"], result["level"]) == ("declared-check", "warning")
    assert "Target class: 3 (Dress)" in result["message"]["text"]
    assert {taxon["id"] for taxon in run["taxonomies"][0]["taxa"]} == {"AML.T0018.001", "AML.T0010.003"}


def test_an_alarm_of_behaviour_is_not_talked_down(report: Report) -> None:
    """Where a detector of behaviour raises an alarm too, the usual words stand."""
    other = report.findings[1].model_copy(update={"detector": "neural-cleanse", "level": "model"})
    both = report.model_copy(update={"findings": (*report.findings, other)})
    assert phrases.explanation(both).startswith("Something looks like a backdoor, towards class 3 (Dress)")
    quiet = report.model_copy(update={"p_value": 0.4})
    sure = {fact.label: fact for fact in phrases.facts(quiet)}["How sure"]
    assert sure.detail == "how the model behaves raises no alarm (p = 0.4)"
