"""Reports signed with a key, and checked: OpenSSF model signing, without a network."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from command_line import CLEAN, assert_one_line, call
from doorward.artifacts.digest import artifact_digest
from doorward.core.records import Report, SubjectRecord
from doorward.reports import signing, to_json, write_reports
from report_examples import ENVIRONMENT

PEM = serialization.Encoding.PEM


def write_keys(folder: Path, name: str, *, password: bytes | None = None) -> tuple[Path, Path]:
    """Write a new pair of keys; return the private one's file, and the public one's."""
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, form, locked))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_without_the_package_a_scan_ends_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    outcome = call("scan", CLEAN, "--out", "reports", "--sign-key", "key.pem", folder=tmp_path)
    assert_one_line(outcome, "needs the package 'model-signing'", "pip install 'doorward[sign]'")
    assert not (tmp_path / "reports").exists()


def test_a_key_needs_a_report_and_no_scan_needs_a_key(tmp_path: Path) -> None:
    assert_one_line(
        call("scan", CLEAN, "--sign-key", "key.pem", folder=tmp_path), "--sign-key goes with --out"
    )
    assert_one_line(call("verify", tmp_path, "--no-scan"), "--no-scan goes with --key")


class TestWithThePackage:
    """What needs the package that signs."""

    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("model_signing", reason="the extra `sign` is not installed")

        def refuse(*_: object) -> None:
            raise AssertionError("signing needs no network")

        monkeypatch.setattr(socket.socket, "connect", refuse)

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(CLEAN, tmp_path / "model"))

    @pytest.fixture
    def reports(self, model: Path, tmp_path: Path) -> Path:
        """Return a folder of reports on the model, signed with key.pem."""
        private, _ = write_keys(tmp_path, "key")
        subject = SubjectRecord(path="model", format="Doorward", **artifact_digest(model)._asdict())
        report = Report(subject=subject, verdict="nothing_found", environment=ENVIRONMENT)
        files = write_reports(report, tmp_path / "reports")
        signing.sign(files["json"], signing.signer(private))
        return tmp_path / "reports"

    def test_a_scan_signs_and_verify_checks_what_it_signed(self, model: Path, tmp_path: Path) -> None:
        private, public = write_keys(tmp_path, "key")
        words = ("--detector", "unsafe-code", "--out", "reports", "--sign-key", private)
        scanned = call("scan", "model", *words, folder=tmp_path)
        assert "report.json.sig" in scanned.err, scanned
        outcome = call("verify", "reports", "--key", public, folder=tmp_path)
        assert outcome.code == 0, outcome
        assert outcome.out.splitlines()[0] == "signed: the report is as the owner of the key signed it"
        again = call("scan", "model", *words[:4], folder=tmp_path)
        assert again.code == scanned.code
        assert not (tmp_path / "reports" / "report.json.sig").exists()

    def test_the_files_that_were_scanned_are_told_from_others(
        self, reports: Path, model: Path, tmp_path: Path
    ) -> None:
        words = ("verify", reports, "--key", tmp_path / "key.pub.pem", "--no-scan", "--model", model)
        outcome = call(*words)
        assert (outcome.code, outcome.out.count("\n")) == (0, 2), outcome
        (model / "more.safetensors").write_bytes(b"\0")
        outcome = call(*words)
        assert (outcome.code, "differs: the model's SHA-256" in outcome.out) == (1, True), outcome

    def test_a_changed_report_and_another_key_are_told(self, reports: Path, tmp_path: Path) -> None:
        _, other = write_keys(tmp_path, "other")
        outcome = call("verify", reports, "--key", other, "--no-scan")
        assert (outcome.code, outcome.out) == (1, "differs: the signature was not made with this key\n")
        file = reports / "report.json"
        form = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(form | {"verdict": "backdoored"}))
        outcome = call("verify", reports, "--key", tmp_path / "key.pub.pem", "--no-scan")
        assert (outcome.code, outcome.out) == (1, "differs: the report was changed after it was signed\n")

    @pytest.mark.parametrize("signature", ["", "{}", "[]", '{"mediaType": "x"}', "\0" * 100])
    def test_a_broken_signature_is_none(self, reports: Path, tmp_path: Path, signature: str) -> None:
        (reports / "report.json.sig").write_text(signature)
        outcome = call("verify", reports, "--key", tmp_path / "key.pub.pem", "--no-scan")
        assert (outcome.code, outcome.out) == (1, "differs: the signature cannot be read\n"), outcome

    def test_a_signature_by_the_same_key_of_another_report_is_none(
        self, reports: Path, tmp_path: Path
    ) -> None:
        other = Report(subject=None, verdict="backdoored", environment=ENVIRONMENT)
        (tmp_path / "report.json").write_text(to_json(other), encoding="utf-8")
        shutil.copy(reports / "report.json.sig", tmp_path)
        outcome = call("verify", tmp_path, "--key", tmp_path / "key.pub.pem", "--no-scan")
        assert (outcome.code, outcome.out) == (1, "differs: the report was changed after it was signed\n")

    def test_a_report_without_a_signature_is_told(self, reports: Path, tmp_path: Path) -> None:
        (reports / "report.json.sig").unlink()
        outcome = call("verify", reports, "--key", tmp_path / "key.pub.pem", "--no-scan")
        assert_one_line(outcome, "report.json.sig", "there is no such file")

    def test_keys_that_cannot_sign_are_refused_with_what_is_needed(self, tmp_path: Path) -> None:
        locked, _ = write_keys(tmp_path, "locked", password=b"secret")
        _, public = write_keys(tmp_path, "own")
        form = serialization.PrivateFormat.PKCS8
        key = rsa.generate_private_key(65537, 2048).private_bytes(PEM, form, serialization.NoEncryption())
        (tmp_path / "rsa.pem").write_bytes(key)
        (tmp_path / "text.pem").write_text("no key")
        for wrong in (locked, public, tmp_path / "rsa.pem", tmp_path / "text.pem"):
            outcome = call("scan", CLEAN, "--out", tmp_path / "reports", "--sign-key", wrong)
            assert_one_line(outcome, "a private key is needed, an elliptic-curve key")
        outcome = call("scan", CLEAN, "--out", tmp_path / "reports", "--sign-key", tmp_path / "none.pem")
        assert_one_line(outcome, "none.pem: cannot be read: No such file")
