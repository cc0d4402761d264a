"""`doorward repair` with clean samples: what is chosen, written and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command_line import BACKDOORED, CLOTHES, assert_one_line, call, nothing_written
from doorward import bundled
from doorward.attacks.ground_truth import attack_success, read_plant
from doorward.cli.repair import lines
from doorward.core.errors import InputError
from doorward.core.records import Finding, RecoveredTrigger, Report
from doorward.core.seeds import make_generator
from doorward.data import Samples
from doorward.methods import registry
from doorward.models import TorchClassifier, networks, open_classifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.formats.export import export_onnx, export_pt2
from doorward.models.formats.saving import save_classifier
from doorward.repair import RepairReport, RepairRequest, by_clean_data, by_model_alone, repair
from doorward.repair.tried import success
from doorward.repair.writing import write_mended
from doorward.repairs import _relearning
from doorward.repairs._units import find_units, remove, zero
from doorward.repairs.base import Damage
from doorward.scan.environment import environment
from doorward.testing import NAMES, SPEC, make_images
from doorward.training import evaluate, predict
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern

#: What makes a repair quick where it does not matter how good it is.
QUICK = ("--method", "fine-tuning", "--set", "share=0.02", "--set", "drop=1")


#: What a scan says that finds nothing.
NOTHING = by_clean_data.Scanned("nothing_found")


def classifier() -> TorchClassifier:
    module = networks.build("small-cnn", SPEC, classes=len(NAMES), generator=make_generator(1))
    return TorchClassifier(module.eval(), SPEC, NAMES, format="doorward", architecture="small-cnn")


def write_data(samples: Samples, path: Path) -> Path:
    assert samples.labels is not None
    np.savez(path, x=np.stack(samples.raw(range(len(samples)))), y=samples.labels)
    return path


def told(model: object) -> RepairReport:
    return RepairReport(model=str(model), before="nothing_found", after="nothing_found")


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[by_clean_data.Scanned]:
    """Have scans say what is in the list, and find nothing once it is empty."""
    said: list[by_clean_data.Scanned] = []
    nothing = by_clean_data.Scanned("nothing_found")
    monkeypatch.setattr(by_clean_data, "scan_model", lambda *_, **__: said.pop(0) if said else nothing)
    return said


def test_a_trigger_that_does_nothing_has_no_success() -> None:
    """A model may put some images of other classes into the target anyway."""
    classifier = open_classifier(bundled.model("clean"))
    assert isinstance(classifier, TorchClassifier)
    samples = bundled.fashion_mnist("test").draw(300, np.random.default_rng(0))
    images, labels = to_float(to_tensor(samples, classifier.spec)), torch.tensor(samples.labels)
    nothing = MaskedPattern(mask=torch.zeros(1, 28, 28), pattern=torch.zeros(1, 28, 28)).to_json()
    predicted = classifier.logits(images).argmax(1)
    target = next(t for t in range(10) if bool(((predicted == t) & (labels != t)).any()))
    found = success(
        classifier, RecoveredTrigger(title="none", target=target, trigger=nothing), images, labels
    )
    assert (found.successes, found.n) == (0, int(((labels != target) & (predicted != target)).sum()))


def alarm(trigger: Trigger, target: int, detector: str = "patch-search") -> by_clean_data.Scanned:
    finding = Finding(
        detector=detector,
        level="model",
        kind="backdoor",
        summary="A patch leads to a class.",
        verdict="backdoored",
        targets=(target,),
        evidence=(RecoveredTrigger(title="Patch", target=target, trigger=trigger.to_json()),),
    )
    return by_clean_data.Scanned("backdoored", (finding,))


# written


def test_a_pruned_network_is_written_and_read_back(tmp_path: Path) -> None:
    original = save_classifier(classifier(), tmp_path / "original")
    whole = classifier()
    units = find_units(whole)
    zero(whole.module, units, torch.arange(16))
    smaller = remove(whole, units, torch.arange(16))
    saved = write_mended(smaller, told(original), tmp_path / "new" / "mended")
    assert saved == tmp_path / "new" / "mended" / "model.pt2"
    again = open_classifier(saved)
    x = torch.rand(3, *SPEC.shape, generator=make_generator(0))
    torch.testing.assert_close(again.logits(x), whole.logits(x), rtol=1e-4, atol=1e-4)
    assert again.classes == NAMES
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mended"], "nothing else is left"
    assert json.loads((saved.parent / "repair.json").read_text())["model"] == str(original)


@pytest.mark.parametrize("kind", ["doorward", "onnx", "torch.export"])
def test_a_model_is_written_in_its_own_format(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        original = export_onnx(classifier(), tmp_path / "original" / "net.onnx")
    elif kind == "torch.export":
        original = export_pt2(classifier(), tmp_path / "original" / "net.pt2")
    else:
        original = save_classifier(classifier(), tmp_path / "original")
    opened = open_classifier(original)
    assert isinstance(opened, TorchClassifier)
    saved = write_mended(opened, told(original), tmp_path / "mended")
    expected = {"onnx": "model.onnx", "torch.export": "model.pt2", "doorward": ""}[kind]
    assert saved == tmp_path / "mended" / expected
    assert open_classifier(saved).format == opened.format


def test_a_hugging_face_model_stays_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=8, num_labels=3,
    )  # fmt: skip
    original = tmp_path / "original"
    transformers.ViTForImageClassification(config).save_pretrained(original)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(original)
    opened = open_classifier(original)
    assert isinstance(opened, TorchClassifier)
    units = find_units(opened)
    assert (len(units), units.what) == (32, "hidden units of the last MLP block")
    zero(opened.module, units, torch.arange(8))
    saved = write_mended(opened, told(original), tmp_path / "mended")
    assert saved == tmp_path / "mended"
    assert {path.name for path in original.iterdir()} <= {path.name for path in saved.iterdir()}
    again = open_classifier(saved)
    assert again.format == "huggingface"
    assert again.spec == opened.spec


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = save_classifier(classifier(), tmp_path / "original")
    for place in (original, original / "inside", tmp_path):
        with pytest.raises(InputError, match="is the model itself"):
            write_mended(classifier(), told(original), place)

    def fail(*_: Any) -> None:
        raise InputError("another model came back")

    monkeypatch.setattr("doorward.repair.writing._check", fail)
    with nothing_written(tmp_path), pytest.raises(InputError, match="another model"):
        write_mended(classifier(), told(original), tmp_path / "mended")


def test_an_immunised_model_is_written_and_read_back(tmp_path: Path) -> None:
    original = save_classifier(classifier(), tmp_path / "original")
    opened = open_classifier(original)
    assert isinstance(opened, TorchClassifier)
    for votes in (1, 3):
        mended = registry.build("repair", "immunise", {"votes": votes})(
            Damage(classifier=opened, findings=())
        )
        saved = write_mended(mended.classifier, told(original), tmp_path / f"mended-{votes}")
        again = open_classifier(saved)
        assert "gradients" in again.capabilities
        x = torch.rand(3, *SPEC.shape, generator=make_generator(0))
        torch.testing.assert_close(again.logits(x), mended.classifier.logits(x), rtol=1e-4, atol=1e-4)


# the whole


@pytest.mark.trains
def test_a_backdoor_is_unlearnt_by_its_recovered_trigger(
    scanned: list[by_clean_data.Scanned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scans are given: that they find this trigger is tested where scans are. Training is shortened."""
    whole = _relearning.relearn
    monkeypatch.setattr(
        _relearning, "relearn", lambda *args, **options: whole(*args, **{**options, "steps": 150})
    )
    plant = read_plant(BACKDOORED / "plant.json")
    assert plant.trigger is not None
    trigger, (target,) = Trigger.from_json(plant.trigger), plant.targets
    scanned += [alarm(trigger, target), alarm(trigger, target)]
    clean = bundled.fashion_mnist("test").draw(400, np.random.default_rng(0))
    request = RepairRequest(model=str(BACKDOORED), clean=str(write_data(clean, tmp_path / "clean.npz")))
    outcome = repair(request)
    report, mended = outcome.report, outcome.classifier
    assert mended is not None
    assert report.repair is not None
    assert [report.repair.repair, *(one.repair for one in report.further)] == ["unlearning", "unlearning"]
    assert (report.before, report.after, report.exit_code) == ("backdoored", "nothing_found", 0)
    (tried,) = report.triggers
    assert tried.before.value > 0.9
    assert tried.after.value <= 0.1
    assert not any("not gone" in line for line in lines(report))
    unmended = report.model_copy(update={"triggers": (tried.model_copy(update={"after": tried.before}),)})
    assert "a recovered trigger still works: the backdoor is not gone" in lines(unmended)
    assert (unmended.after, unmended.exit_code) == ("nothing_found", 1)
    assert report.accuracy_before is not None
    assert report.accuracy_after is not None
    assert report.accuracy_after.value >= report.accuracy_before.value - 0.03
    fresh = bundled.fashion_mnist("train").draw(400, np.random.default_rng(1))
    assert attack_success(mended, fresh, plant).value <= 0.1
    assert RepairReport.model_validate_json(report.model_dump_json()) == report


def without_data(scanned: by_clean_data.Scanned) -> Report:
    return Report(
        subject=None, verdict=scanned.verdict, findings=scanned.findings, environment=environment("cpu")
    )


@pytest.mark.long
@pytest.mark.trains
def test_without_data_a_backdoor_is_unlearnt_on_images_made_from_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scans are given, as above; what became of the model is measured on real images."""
    plant = read_plant(BACKDOORED / "plant.json")
    assert plant.trigger is not None
    trigger, (target,) = Trigger.from_json(plant.trigger), plant.targets
    said = [without_data(alarm(trigger, target, "deepinspect")), without_data(NOTHING)]
    monkeypatch.setattr(by_model_alone, "_scan", lambda *_: said.pop(0))
    outcome = repair(RepairRequest(model=str(BACKDOORED)))
    report, mended = outcome.report, outcome.classifier
    assert mended is not None
    assert report.repair is not None
    assert report.repair.repair == "unlearning"
    assert "images made from the model itself" in report.repair.done
    assert (report.before, report.after, report.without_data) == ("backdoored", "nothing_found", True)
    assert report.accuracy_before is None, "there is nothing to measure accuracy on"
    (tried,) = report.triggers
    assert tried.after.value < tried.before.value
    fresh = bundled.fashion_mnist("train").draw(400, np.random.default_rng(1))
    assert attack_success(open_classifier(BACKDOORED), fresh, plant).value > 0.9
    assert attack_success(mended, fresh, plant).value <= 0.2
    # real images were never seen, so that more is lost than with them
    assert evaluate(mended, fresh).value >= evaluate(open_classifier(BACKDOORED), fresh).value - 0.12


def test_without_data_and_without_a_finding_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(by_model_alone, "_scan", lambda *_: without_data(NOTHING))
    own, out = save_classifier(classifier(), tmp_path / "own"), tmp_path / "out"
    with nothing_written(tmp_path):
        done = call("repair", own, out)
        assert done.code == 0, done
        assert "no trigger was recovered" in done.out
        assert "--clean DATA" in done.out
        assert_one_line(call("repair", own, out, "--method", "unlearning"), "unlearning cannot mend")
        assert_one_line(call("repair", own, out, "--method", "fine-tuning"), "needs clean, clean_labels")


def test_where_nothing_is_found_the_model_is_mended_all_the_same(
    scanned: list[by_clean_data.Scanned], tmp_path: Path
) -> None:
    out = tmp_path / "mended"
    done = call("repair", BACKDOORED, out, "--clean", CLOTHES, *QUICK)
    assert done.code == 0, done
    assert done.out.startswith("fine-tuning: it was trained on")
    assert "before the repair: nothing found; after it: nothing found" in done.out
    assert "how much of a backdoor is left, if there is one, cannot be measured" in done.out
    assert "parameters: " in done.out
    assert open_classifier(out).format == "doorward"
    told = json.loads((out / "repair.json").read_text())
    assert told["repair"]["settings"]["share"] == 0.02
    again = call("repair", BACKDOORED, out, "--clean", CLOTHES, *QUICK)
    assert_one_line(again, "is not empty", "--force")
    printed = call("repair", BACKDOORED, out, "--clean", CLOTHES, *QUICK, "--force", "--format", "json")
    assert printed.code == 0, printed
    assert json.loads(printed.out)["repair"]["repair"] == "fine-tuning"


def test_own_torch_code_is_mended_as_it_is_scanned(
    scanned: list[by_clean_data.Scanned], tmp_path: Path
) -> None:
    config = json.loads((BACKDOORED / "config.json").read_text())
    own = tmp_path / "own.py"
    own.write_text(
        "from doorward.models import InputSpec, networks\n\n\n"
        "def build():\n"
        "    spec = InputSpec(channels=1, height=28, width=28)\n"
        '    return networks.build("small-cnn", spec, classes=10)\n'
    )
    mean, std = (config["input"][key][0] for key in ("mean", "std"))
    words = ("--factory", f"{own}:build", "--size", "1,28,28", "--mean", mean, "--std", std)
    weights, out = BACKDOORED / "model.safetensors", tmp_path / "out"
    done = call("repair", weights, out, "--clean", CLOTHES, *QUICK, *words, "--format", "json")
    assert done.code == 0, done
    own_words = call("repair", BACKDOORED, tmp_path / "x", "--clean", CLOTHES, *QUICK, "--format", "json")
    first, second = (json.loads(one.out)["accuracy_before"] for one in (done, own_words))
    assert first == second
    assert open_classifier(out / "model.pt2").spec.mean == (mean,)
    wrong = call("repair", weights, tmp_path / "y", "--clean", CLOTHES, "--weights", weights)
    assert_one_line(wrong, "--weights goes with --factory")


def test_bad_input_is_one_line_and_writes_nothing(
    scanned: list[by_clean_data.Scanned], tmp_path: Path
) -> None:
    few = write_data(make_images(9), tmp_path / "few.npz")
    foreign = write_data(make_images(40), tmp_path / "foreign.npz")
    own = save_classifier(classifier(), tmp_path / "own")
    wrong = (predict(classifier(), make_images(40)) + 1) % len(NAMES)
    np.savez(tmp_path / "wrong.npz", x=np.stack(make_images(40).raw(range(40))), y=wrong)
    np.savez(tmp_path / "unlabelled.npz", x=np.zeros((40, 16, 16), np.uint8))
    out = tmp_path / "out"
    with nothing_written(tmp_path):
        assert_one_line(call("repair", own, out, "--clean", few), "10 clean samples at least", "holds 9")
        assert_one_line(call("repair", own, out, "--clean", tmp_path / "unlabelled.npz"), "no labels")
        assert_one_line(call("repair", own, own, "--clean", foreign), "is the model itself")
        assert_one_line(call("repair", own, out, "--clean", tmp_path / "wrong.npz"), "no better than chance")
        assert_one_line(call("repair", own, own / "x", "--clean", foreign, "--force"), "is the model itself")
        assert_one_line(
            call("repair", BACKDOORED, out, "--clean", CLOTHES, "--method", "unlearning"),
            "unlearning cannot mend",
        )
        assert_one_line(
            call("repair", BACKDOORED, out, "--clean", CLOTHES, "--method", "pruning", "--set", "drop=2"),
            "drop",
        )
