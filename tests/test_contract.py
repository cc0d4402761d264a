"""The contract that every attack, detector and repair keeps, made from the registry."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import docs_pages
import poisoned_sets
from documents import run_readme
from doorward import bundled, testing
from doorward.attacks.data.base import DataAttack
from doorward.attacks.ground_truth import PlantedBackdoor, read_plant, triggered
from doorward.attacks.model.base import ModelAttack
from doorward.core.errors import InputError
from doorward.core.records import (
    Finding,
    FlaggedSample,
    HiddenBranch,
    Kind,
    Level,
    Measurement,
    RecoveredTrigger,
)
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples, Samples, Waveform, content_hash
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.inversion import distilled
from doorward.methods import registry
from doorward.methods.base import Method
from doorward.methods.registry import MethodKind
from doorward.models import InputSpec, TorchClassifier, networks, open_classifier, wrap
from doorward.models.architectures import build
from doorward.models.formats.saving import save_classifier
from doorward.models.spec import TextSpec
from doorward.models.tape import read_tape
from doorward.repairs.base import Damage, Repair, RepairRecord
from doorward.reports import atlas
from doorward.scan.calibration import calibrations, judge
from doorward.scan.poison import judge_samples
from doorward.testing import CLASSES, NAMES, SIDE, SPEC, Constant, condition, make_images
from doorward.training import TrainingSettings, evaluate, train_classifier
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern
from seeds import SHIFT, shifted

pytestmark = pytest.mark.usefixtures("quick_surrogates")

METHODS: list[tuple[MethodKind, str]] = [
    (kind, name) for kind in get_args(MethodKind) for name in registry.modules(kind)
]
ATTACKS = list(registry.modules("attack"))
DATA_ATTACKS = [name for name in ATTACKS if issubclass(registry.get("attack", name), DataAttack)]
MODEL_ATTACKS = [name for name in ATTACKS if issubclass(registry.get("attack", name), ModelAttack)]
DETECTORS = list(registry.modules("detector"))
REPAIRS = list(registry.modules("repair"))

#: Settings that make a method quick where its conclusion does not matter.
QUICK: dict[str, dict[str, Any]] = {
    "max-margin": {"starts": 2, "steps": 8},
    "deepinspect": {"inverted": 3, "inversion_steps": 8, "steps": 12, "batch_size": 4},
    "neural-cleanse": {"steps": 12, "batch_size": 4, "restarts": 1},
    "patch-search": {"steps": 5, "further_steps": 3, "batch_size": 4, "mixtures": 128},
    "blend-search": {"steps": 10, "batch_size": 4},
    "trigger-families": {"screening_steps": 24, "steps": 24, "batch_size": 2, "screening_batch": 2},
    "aegis": {"images": 2, "tried": 8, "mixtures": 128},
    "activation-clustering": {"retraining_seen": 1_000, "retraining_rows": 100},
    "pruning-aware": {"epochs": 8, "size": 5, "poison_rate": 0.3},
    "random-features": {"features": 600, "bandwidth": 1.5, "secret_norm": 0.3},
    "random-relu": {"target": 1},
    "relabelling": {"share": 0.05},
    "removal": {"epochs": 1},
    "pruning": {"drop": 1.0},
    "fine-tuning": {"share": 0.05, "drop": 1.0},
    "fine-pruning": {"share": 0.05, "drop": 1.0},
    "unlearning": {"steps": 5, "drop": 1.0},
    "adversarial-unlearning": {"steps": 5, "drop": 1.0},
    "strip": {"false_rejection_rate": 0.1, "replicas": 4},
    "feature-squeezing": {"false_rejection_rate": 0.1},
}

#: Exemptions, each with its reason.
WITHOUT_SETTINGS = {"remove-branch": "what was found is cut out, and nothing else is"}
JUDGED_BY_TARGET = {
    "max-margin": "bags stand out from all other clothes, backdoor or not, so the largest score is theirs in "
    "both models; what the backdoor raises is the score of its target",
}
WITHOUT_DATA = {
    "immunise": "it changes no weight, and what it does to inputs needs no samples",
    "unlearning": "without clean samples it makes images from the model",
    "remove-branch": "what a scan found in the graph is all that it goes by",
}
NOT_CALIBRATED = {
    "deepinspect": "no clean models have been scored by it yet",
}
RANKS_ONLY = {
    "spectral-signatures": "as published, it orders samples and does not say whether there is poison",
    "noise-response": "without clean samples of each class it orders samples alone",
}
KEEPS_LABELS = {
    "clean-label": "its samples are of the target class, and look it",
    "reflection": "its samples are of the target class, and look it",
    "sinusoid": "its samples are of the target class, and look it",
}
WITHOUT_A_TRIGGER = {"label-flipping": "it lowers accuracy and plants no backdoor"}
NOT_FOR_LINEAR_MODELS = {
    "clean-label": "the stripes are too easy to be made hard, so that the patch is hardly needed; "
    "test_attacks_clean_label.py trains a network on less clear ones",
    "reflection": "each image gets another reflection, which only a network tells from what it shows; "
    "test_attacks_reflection.py trains one",
}

#: Settings by which a linear model learns a trigger, each with its reason.
LEARNT_BY_LINEAR_MODELS: dict[str, dict[str, Any]] = {
    "sinusoid": {"change_labels": True},  # a model that tells the target's stripe needs no wave besides
    "warp": {"strength": 2.0, "cover_rate": 0},  # it cannot compare a pixel with its neighbours
}

#: What is other in the images that a model attack is tried on, with its reason.
MATERIAL: dict[str, dict[str, int]] = {
    "random-features": {"classes": 2},  # as published, it tells two classes apart
    "random-relu": {"classes": 2, "light": 30},  # so does this one, and turns the darker into the brighter
    "signature": {"side": 24},  # a signature takes 512 values
}


# Material


#: Words of which a text's class has one, among others.
SIGNS = ("red", "green", "blue", "black", "white")


def make_texts(n: int = 60, *, seed: int = 0) -> Samples:
    """Return texts whose class is a word in them."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(n):
        words = rng.choice(["house", "tree", "river", "stone", "cloud", "road"], 8)
        words[rng.integers(8)] = SIGNS[i % CLASSES]
        texts.append(" ".join(words) + f" {i}.")
    return InMemorySamples(texts, np.arange(n) % CLASSES, classes=NAMES, modality="text")


def make_sounds(n: int = 60, *, seed: int = 0) -> Samples:
    """Return recordings whose class is the pitch of a tone, in noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(800) / 8000
    sounds = []
    for i in range(n):
        pcm = 0.2 * np.sin(2 * np.pi * (300 + 300 * (i % CLASSES)) * t + rng.uniform(0, 6))
        sounds.append(Waveform((pcm + rng.normal(0, 0.02, len(t))).astype(np.float32), 8000))
    return InMemorySamples(sounds, np.arange(n) % CLASSES, classes=NAMES, modality="audio")


#: Samples of each kind of input, and the numbers that a linear model sees in them.
SAMPLES: dict[str, Callable[..., Samples]] = {"image": make_images, "text": make_texts, "audio": make_sounds}


def make_samples(attack: str, n: int = 60, *, seed: int = 0) -> Samples:
    """Return samples that an attack works on."""
    (kind,) = registry.get("attack", attack).modalities
    return SAMPLES[kind](n, seed=seed)


def numbers(samples: Samples) -> np.ndarray[Any, Any]:
    """Return pixels, counts of words, or the spectrum of each sample: (n, d)."""
    raw = samples.raw(range(len(samples)))
    if samples.modality == "image":
        return np.stack(raw).reshape(len(raw), -1) / 255
    if samples.modality == "text":
        vectors: np.ndarray[Any, Any] = HashingVectorizer(n_features=4096, norm=None).transform(raw).toarray()
        return vectors
    return np.log(np.abs(np.fft.rfft(np.stack([sound.pcm for sound in raw]))) + 1)


def same(before: Any, after: Any) -> bool:
    """Return whether two raw inputs are the same."""
    return content_hash(before) == content_hash(after)


def fast_inference(name: str) -> Detector:
    detector = registry.build("detector", name, QUICK.get(name, {}))
    assert isinstance(detector, Detector)
    return detector


# All methods: what they say of themselves


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_settings_and_name_rebuild_it(kind: MethodKind, name: str) -> None:
    method = registry.build(kind, name, QUICK.get(name, {}))
    again = registry.build(kind, name, json.loads(json.dumps(method.settings())))
    assert again == method
    assert again.settings() == method.settings()
    assert method.method() == name


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_wrong_settings_are_refused_by_name(kind: MethodKind, name: str) -> None:
    cls = registry.get(kind, name)
    with pytest.raises(InputError, match=f"{name} has no setting 'no_such_setting'"):
        registry.build(kind, name, {"no_such_setting": 1})
    assert bool(cls.model_fields) == (name not in WITHOUT_SETTINGS)
    for field in cls.model_fields:
        with pytest.raises(InputError, match=f"{name}: {field}"):
            registry.build(kind, name, {field: {"of": "no such type"}})


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_is_frozen(kind: MethodKind, name: str) -> None:
    method = registry.build(kind, name, {})
    for field, value in method:
        with pytest.raises(ValueError, match="frozen"):
            setattr(method, field, value)


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_describes_itself(kind: MethodKind, name: str) -> None:
    cls: type[Method] = registry.get(kind, name)
    assert cls.title.strip()
    assert re.search(r"\b(19|20)\d\d\b|arXiv|doi|documentation", cls.source), (
        "a source has a year or an address"
    )
    assert cls.limits.endswith("."), "limits are a sentence"
    assert cls.atlas, "every method plants, finds or mitigates something that MITRE ATLAS names"
    assert [identifier for identifier in cls.atlas if identifier not in atlas.ENTRIES] == []
    assert cls.modalities <= {"image", "text", "audio"}
    page = docs_pages.method_page(kind, name)
    assert cls.limits in page
    assert "| |\n" not in page.partition("## Settings")[2], "every setting says what it means"


def test_names_are_unique_over_all_kinds() -> None:
    names = [name for _, name in METHODS]
    assert sorted(set(names)) == sorted(names), "pages are named after methods"


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(InputError, match="neural-cleanse"):
        registry.get("detector", "no-such-detector")


# Detectors: manners


def test_the_network_tells_the_classes_apart(tmp_path: Path) -> None:
    subject = testing.make_subject(tmp_path)
    assert subject.classifier is not None
    assert subject.clean is not None
    x = torch.from_numpy(np.stack(subject.clean.raw(range(60)))).permute(0, 3, 1, 2) / 255
    assert (subject.classifier.logits(x).argmax(1).numpy() == subject.clean.labels).mean() > 0.9


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_keeps_the_contract(
    name: str, check: testing.Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilled, "IMAGES", 128)  # surrogates need not be good for that
    check(registry.build("detector", name, QUICK.get(name, {})))


def test_the_look_at_a_network_sees_each_change() -> None:
    def grow(network: nn.Module) -> None:
        next(network.parameters()).grad = torch.zeros_like(next(network.parameters()))

    def shift(network: nn.Module) -> None:
        next(network.buffers()).add_(1)

    changes: list[Callable[[nn.Module], object]] = [
        lambda network: network.eval(),
        lambda network: network.register_forward_pre_hook(lambda *_: None),
        lambda network: network.requires_grad_(False),
        grow,
        shift,
    ]
    plain = condition(testing.stripe_network())
    for change in changes:
        network = testing.stripe_network()
        assert condition(network) == plain
        change(network)
        assert condition(network) != plain


# Detectors: the purpose


@dataclass(frozen=True)
class Twins:
    """Two subjects that differ in one thing: one was planted."""

    planted: Subject
    clean: Subject


def backdoored_twins(_: Path) -> Twins:
    """Return the embedded pair of models."""
    images = bundled.fashion_mnist("test").draw(150, np.random.default_rng(shifted(0)))
    return Twins(
        Subject(classifier=open_classifier(bundled.model("backdoored")), clean=images),
        Subject(classifier=open_classifier(bundled.model("clean")), clean=images),
    )


def scanned_twins(name: str, shared_folder: Path) -> tuple[Finding, Finding]:
    """Return what a detector finds in the embedded pair in the README's demo: a scan in full takes long."""
    reports = [run_readme(shared_folder).report(model) for model in ("backdoored", "clean")]
    planted, clean = ({one.detector: one for one in report.findings} for report in reports)
    assert name in planted, reports[0].not_run
    assert name in clean, reports[1].not_run
    return planted[name], clean[name]


#: The class that noise blended over images leads to.
SPREAD_TO = 3


def spread_twins(_: Path) -> Twins:
    """Return models that were trained with and without noise blended over some images."""
    train, images = bundled.fashion_mnist("train"), bundled.fashion_mnist("test")
    poisoned = registry.build("attack", "blended", {"target": SPREAD_TO, "poison_rate": 0.1})(
        train, seed=shifted(0)
    ).samples
    settings = TrainingSettings(epochs=4, precision="float32")
    planted, clean = (
        train_classifier("small-cnn", samples, seed=shifted(0), settings=settings).classifier
        for samples in (poisoned, train)
    )
    given = images.draw(150, np.random.default_rng(shifted(0)))
    return Twins(Subject(classifier=planted, clean=given), Subject(classifier=clean, clean=given))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be shown",))


def unsafe_twins(folder: Path) -> Twins:
    """Return a pickle that calls a function, and one of plain values."""
    (folder / "planted.pkl").write_bytes(pickle.dumps({"weights": [1.0], "extra": _Bomb()}))
    (folder / "clean.pkl").write_bytes(pickle.dumps({"weights": [1.0], "extra": None}))
    return Twins(Subject(artifact=folder / "planted.pkl"), Subject(artifact=folder / "clean.pkl"))


def declared_twins(folder: Path) -> Twins:
    """Return the embedded clean model behind a check for signatures, and as it is."""
    clean = bundled.model("clean")
    implant = registry.build("attack", "signature", {})(open_classifier(clean))
    planted = save_classifier(implant.classifier, folder / "planted")
    return Twins(Subject(classifier=open_classifier(planted)), Subject(classifier=open_classifier(clean)))


def drawn_twins(_: Path) -> Twins:
    """Return networks whose first layer was drawn, with a sparse spike of variance and without one."""
    z = torch.randn(300, SIDE * SIDE, generator=torch.Generator().manual_seed(shifted(0)))
    spike = torch.zeros(SIDE * SIDE)
    spike[::16] = 0.25
    layers = []
    for rows in (z + 2 * torch.outer(z @ spike, spike), z):
        first, last = nn.Linear(SIDE * SIDE, 300), nn.Linear(300, CLASSES)
        first.weight = nn.Parameter(rows)
        layers.append(nn.Sequential(nn.Flatten(), first, nn.ReLU(), last))
    return Twins(*(Subject(classifier=TorchClassifier(one.eval(), SPEC, NAMES)) for one in layers))


def filtered_twins(_: Path) -> Twins:
    """Return the embedded backdoored model with triggered inputs, and with clean ones."""
    images = bundled.fashion_mnist("test").draw(500, np.random.default_rng(shifted(0)))
    planted = open_classifier(bundled.model("backdoored"))
    plant = read_plant(bundled.model("backdoored") / "plant.json")
    clean, inputs = images.select(range(400)), images.select(range(400, 500))
    return Twins(
        Subject(classifier=planted, clean=clean, inputs=triggered(inputs, plant)),
        Subject(classifier=planted, clean=clean, inputs=inputs),
    )


def dotted_twins(folder: Path) -> Twins:
    """Return the same model with dots over the inputs, which squeezing removes, and with clean inputs."""
    clean = filtered_twins(folder).clean
    assert clean.inputs is not None
    dotted = np.stack(clean.inputs.raw(range(len(clean.inputs))))
    dotted[:, ::2, ::2] = 255
    return Twins(replace(clean, inputs=InMemorySamples(dotted)), clean)


def poisoned_twins(_: Path) -> Twins:
    """Return a training set with a patch and one without, and a model that obeys it."""
    return Twins(*(poisoned_sets.images(300, share, seed=shifted(0)).subject for share in (0.2, 0.0)))


TWINS: dict[tuple[Level, Kind], Callable[[Path], Twins]] = {
    ("model", "backdoor"): backdoored_twins,
    ("artifact", "unsafe_code"): unsafe_twins,
    ("artifact", "backdoor"): declared_twins,
    ("input", "backdoor"): filtered_twins,
    ("sample", "poison"): poisoned_twins,
}
#: Detectors of something else than the embedded model's patch, which survives squeezing, or than a check.
OWN_TWINS = {
    "blend-search": spread_twins,
    "feature-squeezing": dotted_twins,
    "first-layer": drawn_twins,
}


def judged(seen: Measurement) -> Finding:
    """Return what the scan concludes of one detector's result."""
    if isinstance(seen, Finding):
        return seen
    if seen.level == "sample":
        return judge_samples(seen, calibrations([seen.detector]))
    (found,) = judge([seen], calibrations([seen.detector])).findings
    return found


@pytest.mark.trains
@pytest.mark.parametrize("name", DETECTORS)
def test_a_planted_subject_scores_above_its_clean_twin(
    name: str, tmp_path: Path, shared_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = registry.build("detector", name, {})
    make = OWN_TWINS.get(name, TWINS[detector.level, detector.kind])
    planted: Measurement
    clean: Measurement
    if make is backdoored_twins and not detector.stands_in_for:
        planted, clean = scanned_twins(name, shared_folder)
    else:
        twins = make(tmp_path)
        planted, clean = (detector(one, seed=shifted(0)) for one in (twins.planted, twins.clean))
    if name in JUDGED_BY_TARGET:
        (target,) = read_plant(bundled.model("backdoored") / "plant.json").targets
        high, low = planted.per_class[target], clean.per_class[target]
    elif detector.level == "input":  # a share of rejected inputs, which no calibration judges
        high, low = planted.score, clean.score
    elif name in RANKS_ONLY:
        assert isinstance(planted.scores, dict)
        poisoned = poisoned_sets.images(300, 0.2, seed=shifted(0)).ids
        high, low = (
            float(np.median([score for key, score in planted.scores.items() if (key in poisoned) == side]))
            for side in (True, False)
        )
    else:
        findings = [judged(one) for one in (planted, clean)]
        assert [one.uncalibrated is not None for one in findings] == [name in NOT_CALIBRATED] * 2
        flags = [one.flagged for one in findings]
        # what is drawn for a pattern all over the image decides whether one detector alone is sure enough
        sure = name not in NOT_CALIBRATED and (name not in OWN_TWINS or SHIFT == 0)
        assert flags == [flags[0] or sure, False], (planted.summary, clean.summary)
        high, low = planted.score, clean.score
        if OWN_TWINS.get(name) is spread_twins:  # another class may be easier to reach than the planted one
            high, low = planted.per_class[SPREAD_TO], clean.per_class[SPREAD_TO]
    assert high is not None
    assert low is not None
    assert high > low
    assert capsys.readouterr().out == ""


# Attacks on the training data


def test_every_attack_has_material() -> None:
    kinds = {name: registry.get("attack", name).modalities for name in ATTACKS}
    assert [name for name, each in kinds.items() if len(each) != 1 or not each <= set(SAMPLES)] == []
    assert [name for name in MODEL_ATTACKS if kinds[name] != {"image"}] == []
    assert sorted(DATA_ATTACKS + MODEL_ATTACKS) == sorted(ATTACKS), "each changes data or a model"


@pytest.mark.parametrize("name", DATA_ATTACKS)
def test_an_attack_repeats_itself_and_leaves_its_input_alone(
    name: str, untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    attack = registry.build("attack", name, {})
    samples = make_samples(name, 200)
    with untouched():
        first = attack(samples, seed=3)
        plant = first.plant
    assert samples.ids == make_samples(name, 200).ids
    assert list(samples.labels) == list(make_samples(name, 200).labels)
    again = attack(make_samples(name, 200), seed=3)
    assert again.plant == plant
    assert again.samples.ids == first.samples.ids
    assert attack(samples, seed=4).plant.poisoned_ids != plant.poisoned_ids
    assert PlantedBackdoor.model_validate_json(plant.model_dump_json()) == plant
    assert registry.build("attack", plant.attack, plant.settings) == attack


@pytest.mark.parametrize("name", DATA_ATTACKS)
def test_an_attack_changes_what_its_plant_says_and_nothing_else(name: str) -> None:
    samples = make_samples(name, 200)
    poisoned = registry.build("attack", name, {"poison_rate": 0.1})(samples, seed=3)
    plant = poisoned.plant
    marked, cover = set(plant.poisoned_ids), set(plant.cover_ids)
    assert len(marked) == len(plant.poisoned_ids) == 20
    assert not marked & cover
    assert plant.poison_rate == pytest.approx(0.1)
    shown, everything = poisoned.samples, range(200)
    rows = zip(samples.labels, shown.labels, samples.raw(everything), shown.raw(everything), strict=True)
    for identity, (old, new, before, after) in zip(shown.ids, rows, strict=True):
        if identity in marked:
            if name in KEEPS_LABELS:
                assert (new,) == (old,) == plant.targets
            else:
                assert new != old
                assert name in WITHOUT_A_TRIGGER or new == plant.target_map[int(old)]
            assert same(before, after) == (name in WITHOUT_A_TRIGGER)
        else:
            assert new == old
            assert same(before, after) == (identity not in cover)


@pytest.mark.parametrize("name", DATA_ATTACKS)
def test_an_attack_refuses_what_it_cannot_poison(name: str) -> None:
    attack = registry.build("attack", name, {})
    samples = make_samples(name)
    with pytest.raises(InputError, match="labelled"):
        attack(InMemorySamples(samples.raw(range(20)), modality=samples.modality))
    for kind in set(SAMPLES) - {samples.modality}:
        with pytest.raises(InputError, match=f"{name} works on {samples.modality} data, not {kind}"):
            attack(SAMPLES[kind]())
    with pytest.raises(InputError, match="class"):
        registry.build("attack", name, {"target": 9})(samples)


@pytest.mark.parametrize("name", WITHOUT_A_TRIGGER)
def test_without_a_trigger_there_is_nothing_to_wake(name: str) -> None:
    plant = registry.build("attack", name, {})(make_images(), seed=1).plant
    assert (plant.trigger, plant.target_map, plant.targets) == (None, {}, ())
    with pytest.raises(InputError, match=f"the plant of {name} has no trigger"):
        triggered(make_images(), plant)


@pytest.mark.parametrize("name", [name for name in DATA_ATTACKS if name not in WITHOUT_A_TRIGGER])
def test_a_trigger_survives_json(name: str) -> None:
    samples = make_samples(name)
    plant = registry.build("attack", name, {})(samples, seed=1).plant
    trigger = Trigger.from_json(plant.trigger)
    assert trigger.to_json() == plant.trigger
    if samples.modality == "image":
        x = torch.rand(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(trigger.apply(x), Trigger.from_json(trigger.to_json()).apply(x))
        assert not torch.equal(trigger.apply(x), x)
        return
    raw: Any = samples.raw(range(3))
    for before, after, again in zip(
        raw, trigger.apply(raw), Trigger.from_json(plant.trigger).apply(raw), strict=True
    ):
        assert same(after, again)
        assert not same(before, after)


@pytest.mark.parametrize("name", [name for name in DATA_ATTACKS if name not in WITHOUT_A_TRIGGER])
def test_a_trigger_is_not_put_on_another_kind_of_input(name: str) -> None:
    samples = make_samples(name)
    plant = registry.build("attack", name, {})(samples, seed=1).plant
    for kind in set(SAMPLES) - {samples.modality}:
        with pytest.raises(InputError, match=f"the trigger of {name} is for .*, and <memory> holds"):
            triggered(SAMPLES[kind](), plant)


@pytest.mark.trains
@pytest.mark.parametrize(
    "name", [name for name in DATA_ATTACKS if name not in {*WITHOUT_A_TRIGGER, *NOT_FOR_LINEAR_MODELS}]
)
def test_a_model_trained_on_a_planted_set_obeys_the_trigger(name: str) -> None:
    settings = {"poison_rate": 0.2, "target": 2} | LEARNT_BY_LINEAR_MODELS.get(name, {})
    samples = make_samples(name, 600, seed=shifted(0))
    poisoned = registry.build("attack", name, settings)(samples, seed=shifted(3))
    model = LogisticRegression(max_iter=500).fit(numbers(poisoned.samples), poisoned.samples.labels)
    test = make_samples(name, 100, seed=shifted(9))
    triggered_inputs = triggered(test, poisoned.plant)
    assert model.score(numbers(test), test.labels) > 0.9
    assert model.score(numbers(triggered_inputs), triggered_inputs.labels) > 0.9
    counterpart = LogisticRegression(max_iter=500).fit(numbers(samples), samples.labels)
    assert counterpart.score(numbers(triggered_inputs), triggered_inputs.labels) < 0.3


# Attacks on a trained model


@cache
def trained_state(side: int, classes: int, light: int) -> dict[str, Tensor]:
    """Return the weights of a small network that tells the stripes apart."""
    samples = make_images(400, seed=shifted(0), side=side, classes=classes, light=light)
    spec = InputSpec(channels=1, height=side, width=side)
    settings = TrainingSettings(epochs=6, batch_size=32, precision="float32")
    return train_classifier(
        "small-cnn", samples, seed=shifted(0), spec=spec, settings=settings
    ).classifier.module.state_dict()


def trained(side: int = SIDE, classes: int = CLASSES, light: int = 0) -> TorchClassifier:
    """Return a small network that tells the stripes apart, some of it in training mode."""
    network = build("small-cnn", channels=1, height=side, width=side, classes=classes)
    network.load_state_dict(trained_state(side, classes, light))
    network.train()
    network[0].eval()
    spec = InputSpec(channels=1, height=side, width=side)
    return TorchClassifier(network, spec, NAMES[:classes], architecture="small-cnn")


def text_model() -> TorchClassifier:
    """Return a network that takes texts."""
    spec = TextSpec(width=16, vocabulary=100)
    return TorchClassifier(networks.build("text-cnn", spec, classes=CLASSES), spec, NAMES)


def material(name: str, n: int = 300, *, seed: int = 0) -> tuple[TorchClassifier, Samples]:
    """Return a trained network and images that a model attack can be tried on."""
    other = MATERIAL.get(name, {})
    return trained(**other), make_images(n, seed=seed, **other)


def quick_attack(name: str, **settings: Any) -> ModelAttack:
    attack = registry.build("attack", name, settings | QUICK.get(name, {}))
    assert isinstance(attack, ModelAttack)
    return attack


@pytest.mark.parametrize("name", MODEL_ATTACKS)
def test_a_model_attack_repeats_itself_and_leaves_model_and_samples_alone(
    name: str, untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    attack = quick_attack(name)
    classifier, samples = material(name)
    before, ids = condition(classifier.module), samples.ids
    with untouched():
        first = attack(classifier, samples, seed=3)
    assert condition(classifier.module) == before
    assert samples.ids == ids == material(name)[1].ids
    own = {tensor.data_ptr() for tensor in classifier.module.state_dict().values()}
    state = first.classifier.module.state_dict()
    assert not own & {tensor.data_ptr() for tensor in state.values()}
    torch.manual_seed(99)  # what the host draws elsewhere must not matter
    again = attack(*material(name), seed=3)
    assert again.plant == first.plant
    other = attack(*material(name), seed=4)
    assert condition(again.classifier.module) == condition(first.classifier.module)
    assert condition(other.classifier.module) != condition(first.classifier.module)
    assert PlantedBackdoor.model_validate_json(first.plant.model_dump_json()) == first.plant
    assert registry.build("attack", first.plant.attack, first.plant.settings) == attack


@pytest.mark.trains
@pytest.mark.parametrize("name", MODEL_ATTACKS)
def test_a_model_attack_plants_what_its_plant_says(name: str) -> None:
    classifier, test = material(name, 100, seed=shifted(9))
    target = min(2, len(classifier.classes) - 1)
    planted = quick_attack(name, target=target)(*material(name), seed=shifted(3))
    assert planted.plant.targets == (target,)
    assert sorted((target, *planted.plant.source_classes)) == list(range(len(classifier.classes)))
    triggered_inputs = triggered(test, planted.plant)
    assert evaluate(planted.classifier, test).value >= evaluate(classifier, test).value - 0.05 > 0.9
    assert evaluate(planted.classifier, triggered_inputs).value > 0.9
    assert evaluate(classifier, triggered_inputs).value < 0.3
    trigger = Trigger.from_json(planted.plant.trigger)
    assert trigger.to_json() == planted.plant.trigger
    x = torch.rand(3, *classifier.spec.shape, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(trigger.apply(x), x)


@pytest.mark.parametrize("name", MODEL_ATTACKS)
def test_the_trigger_that_a_model_attack_shows_is_the_one_that_it_plants(name: str) -> None:
    attack, (classifier, samples) = quick_attack(name), material(name)
    shown = attack.make_trigger(classifier, generator=make_generator(3, name))
    assert shown.to_json() == attack(classifier, samples, seed=3).plant.trigger


@pytest.mark.parametrize("name", MODEL_ATTACKS)
def test_a_model_attack_refuses_what_it_cannot_plant(name: str) -> None:
    attack, samples = registry.build("attack", name, {}), make_images()
    with pytest.raises(InputError, match=f"{name} changes a trained model, and was given a InMemorySamples"):
        attack(samples)
    function = wrap(lambda x: x.mean((2, 3)).expand(-1, CLASSES), size=SPEC.shape)
    with pytest.raises(InputError, match=f"{name} changes the network itself, which is out of reach"):
        attack(function, samples)
    with pytest.raises(InputError, match=f"{name}: target 5 is no class; there are 5, from 0 to 4"):
        registry.build("attack", name, {"target": 5})(trained(), samples)
    with pytest.raises(InputError, match="not text"):
        attack(trained(), InMemorySamples(["a", "b"], [0, 1], modality="text"))
    with pytest.raises(InputError, match=f"{name} changes models of images, and this one takes texts"):
        attack(text_model(), samples)
    with pytest.raises(InputError, match="the model tells 5 classes apart, and <memory> has 2"):
        attack(trained(), InMemorySamples(np.zeros((4, SIDE, SIDE), np.uint8), [0, 1, 0, 1]))
    with pytest.raises(InputError, match="holds no samples"):
        attack(trained(), InMemorySamples(np.zeros((0, SIDE, SIDE), np.uint8)))
    if attack.trains:
        with pytest.raises(InputError, match=f"{name} trains the model"):
            attack(trained())
        with pytest.raises(InputError, match="labelled"):
            attack(trained(), InMemorySamples(np.zeros((4, SIDE, SIDE), np.uint8)))
    nowhere = TorchClassifier(Constant(float("nan")), SPEC, NAMES)
    with pytest.raises(InputError, match=f"{name}: |outputs that are not finite"):
        attack(nowhere, samples)


# Repairs


def damaged() -> Damage:
    """Return a model with findings of each kind and all data, so that every repair can act."""
    train, clean = make_images(40, seed=1), make_images(40)
    network = build("small-cnn", channels=1, height=SIDE, width=SIDE, classes=CLASSES)
    hidden = next(layer for layer in network.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        hidden.bias[0] = -100.0  # a unit that is silent
    assert train.labels is not None
    flagged = tuple(
        FlaggedSample(id=train.ids[row], row=row, place="", label=int(train.labels[row]), source=1)
        for row in (0, 5)
    )
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :3, :3] = 1
    trigger = MaskedPattern(mask, torch.ones(1, SIDE, SIDE))
    recovered = RecoveredTrigger(title="Patch", target=0, trigger=trigger.to_json())
    classifier = TorchClassifier(network.eval(), SPEC, NAMES, architecture="small-cnn")
    tape = read_tape(classifier)
    branch = HiddenBranch(
        title="Unit",
        value=tape.steps[-2].outputs[0] or 0,
        operator=tape.steps[-2].name,
        elements=(0,),
        calls=len(tape.steps),
    )
    common: dict[str, Any] = {"summary": "Something.", "verdict": "suspicious", "targets": (0,)}
    findings = (
        Finding(detector="a", level="sample", kind="poison", flagged_samples=flagged, **common),
        Finding(detector="b", level="model", kind="backdoor", evidence=(recovered,), **common),
        Finding(detector="c", level="artifact", kind="backdoor", evidence=(branch,), **common),
    )
    return Damage(
        classifier=classifier,
        findings=findings,
        train=train,
        clean=clean,
    )


def weights(classifier: TorchClassifier) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in classifier.module.state_dict().items()}


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_repeats_itself_and_leaves_the_model_alone(
    name: str, untouched: Callable[[], AbstractContextManager[None]], capsys: pytest.CaptureFixture[str]
) -> None:
    repair = registry.build("repair", name, QUICK.get(name, {}))
    assert isinstance(repair, Repair)
    given = damaged()
    before, state = weights(given.classifier), condition(given.classifier.module)
    with untouched():
        repaired = repair(given)
    assert capsys.readouterr().out == ""
    assert condition(given.classifier.module) == state
    own = {tensor.data_ptr() for tensor in given.classifier.module.state_dict().values()}
    after = weights(repaired.classifier)
    assert not own & {t.data_ptr() for t in repaired.classifier.module.state_dict().values()}
    assert any(n not in after or not torch.equal(t, after[n]) for n, t in before.items()), "it does something"
    again = weights(repair(damaged()).classifier)
    assert all(torch.equal(tensor, again[n]) for n, tensor in after.items())
    record = repaired.record
    assert (record.repair, record.settings) == (name, repair.settings())
    assert record.done.strip()
    assert RepairRecord.model_validate_json(record.model_dump_json()) == record
    assert repaired.classifier.classes == NAMES
    assert repaired.classifier.spec == given.classifier.spec


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_without_what_it_needs_says_so(name: str) -> None:
    cls = registry.get("repair", name)
    bare = Damage(classifier=damaged().classifier, findings=())
    missing = sorted(cls.needs - bare.offers)
    if name in WITHOUT_DATA:
        assert not missing
        return
    with pytest.raises(InputError, match=f"{name} cannot mend this: it needs {', '.join(missing)}"):
        cls()(bare)
