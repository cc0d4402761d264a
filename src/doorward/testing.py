"""The contract that every detector keeps, importable so that detectors of other packages can be held to it.

    from doorward.testing import check_detector

    def test_it_keeps_the_contract() -> None:
        check_detector(Loudness())

The checks need nothing but the package itself: they make a small network that tells stripes apart.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from doorward.core.budget import Deadline
from doorward.core.errors import InputError
from doorward.core.records import Finding, Measurement, Need
from doorward.data import InMemorySamples, Samples
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import InputSpec, TorchClassifier

SIDE, CLASSES = 16, 5
SPEC = InputSpec(channels=1, height=SIDE, width=SIDE)
NAMES = tuple(f"class {i}" for i in range(CLASSES))
#: Needs that a classifier serves.
BEHAVIOUR = {"graph", "weights", "gradients", "features", "probabilities"}

Check = Callable[[Detector], None]


def check_detector(detector: Detector) -> None:
    """Run all checks of the contract on a detector.

    Raises:
        AssertionError: naming the first check that fails, and what was expected.
    """
    for check in CHECKS:
        try:
            check(detector)
        except AssertionError as failed:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            raise AssertionError(f"{detector.method()}: {name}: {failed}") from failed


def make_images(
    n: int = 60, *, seed: int = 0, side: int = SIDE, classes: int = CLASSES, light: int = 0
) -> Samples:
    """Return grey images (side, side) whose class is the place of a broad stripe, in noise.

    Args:
        light: levels by which each class is lighter than the one before.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = rng.integers(0, 100, (n, side, side)) + light * labels[:, None, None]
    for i, label in enumerate(labels):
        x[i, 3 * label : 3 * label + 3] += 120
    return InMemorySamples(x.astype(np.uint8), labels, classes=NAMES[:classes])


def stripe_network() -> nn.Module:
    """Return a network that tells the stripes apart, with batch norm, some of it in training mode."""
    linear = nn.Linear(SIDE * SIDE, CLASSES)
    with torch.no_grad():
        stripes = torch.zeros(CLASSES, SIDE, SIDE)
        for label in range(CLASSES):
            stripes[label, 3 * label : 3 * label + 3] = 1
        linear.weight.copy_((stripes - stripes.mean(0)).flatten(1))
        linear.bias.zero_()
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), linear)
    network.train()
    network[1].eval()
    return network


class Constant(nn.Module):
    """Give one output for every image."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((CLASSES,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Return the value for every class: (n, classes)."""
        return self.value.expand(len(x), CLASSES) + 0 * x.sum((1, 2, 3))[:, None]


def make_subject(artifact: Path, network: nn.Module | None = None) -> Subject:
    """Return a subject that offers whatever a detector may need."""
    return Subject(
        classifier=TorchClassifier(network or stripe_network(), SPEC, NAMES),
        clean=make_images(),
        train=make_images(seed=1),
        inputs=make_images(10, seed=2),
        artifact=artifact,
    )


def condition(network: nn.Module) -> list[object]:
    """Return all that a detector could change of a network: modes, hooks, gradients, weights."""
    modules = list(network.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [module.training for module in modules],
        [[len(getattr(module, hook)) for hook in hooks] for module in modules],
        [parameter.requires_grad for parameter in network.parameters()],
        [parameter.grad is None for parameter in network.parameters()],
        {name: value.numpy().tobytes() for name, value in network.state_dict().items()},
    ]


@contextmanager
def untouched() -> Iterator[None]:
    """Assert that the block leaves the global generators and the settings of the process as they were."""

    def state() -> dict[str, object]:
        # the legacy state is what is watched
        numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
        return {
            "random": random.getstate(),
            "numpy.random": [getattr(part, "tolist", lambda part=part: part)() for part in numpy_state],
            "torch": torch.get_rng_state().numpy().tobytes(),
            "threads": torch.get_num_threads(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            # torch itself sets this when an optimiser is made for the first time
            "environment": {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"},
        }

    before = state()
    yield
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"a library call changed the host's {', '.join(changed)}"


def check_it_describes_itself(detector: Detector) -> None:
    """Title, source with a year or an address, limits as a sentence, needs that exist."""
    cls = type(detector)
    assert cls.title.strip(), "it has a title"
    assert re.search(r"\b(19|20)\d\d\b|arXiv|doi|documentation", cls.source), (
        "its source has a year or an address"
    )
    assert cls.limits.endswith("."), "its limits are a sentence that says what it cannot see"
    assert cls.needs, "it says what evidence it needs"
    assert cls.needs <= set(get_args(Need)), f"its needs are among {get_args(Need)}"
    assert cls.modalities <= {"image", "text", "audio"}, "its modalities are among image, text, audio"


def check_settings_rebuild_it(detector: Detector) -> None:
    """Its settings survive JSON, are frozen, and an unknown or wrong one is refused by name."""
    cls = type(detector)
    again = cls(**json.loads(json.dumps(detector.settings())))
    assert again == detector, "name and settings rebuild it"
    for field in cls.model_fields:
        same = partial(setattr, detector, field, getattr(detector, field))
        assert _refusal(same) is not None, f"its setting {field} is frozen"
    unfit: list[dict[str, Any]] = [{"no_such_setting": 1}]
    unfit += [{field: {"of": "no such type"}} for field in cls.model_fields]
    for wrong in unfit:
        assert _refusal(partial(cls, **wrong)) is not None, f"it refuses the setting {wrong}"


def check_it_repeats_itself(detector: Detector) -> None:
    """Its result depends on the seed and the subject alone, and survives JSON."""
    with _artifact() as artifact:
        first = detector(make_subject(artifact), seed=3)
        state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        try:
            torch.manual_seed(99)  # what the host draws elsewhere must not matter
            np.random.seed(99)  # noqa: NPY002
            second = detector(make_subject(artifact), seed=3)
        finally:
            torch.set_rng_state(state[0])
            np.random.set_state(state[1])  # noqa: NPY002
    assert _without_time(first) == _without_time(second), "the same seed gives the same result"
    assert first.reason is None, f"it can tell something of an ordinary model, and not: {first.reason}"
    assert (first.seed, first.detector) == (3, detector.method()), "it carries its seed and name"
    assert first.settings == detector.settings(), "it carries its settings"
    assert type(first).model_validate_json(first.model_dump_json()) == first, "the result survives JSON"


def check_it_leaves_everything_as_it_was(detector: Detector) -> None:
    """Weights, modes, hooks, files, samples and the host process stay as they are; nothing is printed."""
    with _artifact() as artifact:
        network = stripe_network()
        subject, printed = make_subject(artifact, network), io.StringIO()
        before, file_before = condition(network), artifact.read_bytes()
        with untouched(), contextlib.redirect_stdout(printed):
            detector(subject, seed=3)
        assert condition(network) == before, "the network is as it was"
        assert artifact.read_bytes() == file_before, "the file is as it was"
        assert list(artifact.parent.iterdir()) == [artifact], "nothing is written next to it"
        assert printed.getvalue() == "", "nothing is printed"
    assert subject.clean is not None
    assert subject.clean.ids == make_images().ids, "the samples are as they were"


def check_it_measures_and_does_not_judge(detector: Detector) -> None:
    """A detector of behaviour gives a score for each class, the whole's being the highest, and no verdict."""
    with _artifact() as artifact:
        seen = detector(make_subject(artifact))
    if detector.level == "artifact":
        assert isinstance(seen, Finding), "what reads files returns self.finding(...)"
        return
    assert type(seen) is Measurement, "what measures returns self.measurement(...)"
    assert seen.code, "the result names the code that made it"
    if detector.level == "model" and detector.kind == "backdoor":
        assert set(seen.per_class) == set(range(CLASSES)), "each class has a score, or None with a reason"
        known = [score for score in seen.per_class.values() if score is not None]
        assert known, "some class has a score"
        assert all(math.isfinite(score) for score in known), "scores are finite"
        assert seen.score == max(known), "the score is that of the most suspicious class"


def check_it_refuses_a_subject_that_lacks_a_need(detector: Detector) -> None:
    """Without what it needs it raises ValueError, which names the need."""
    with _artifact() as artifact:
        subject = make_subject(artifact)
        assert not detector.missing(subject), "a subject that offers everything lacks nothing"
        for need in detector.needs:
            said = _refusal(partial(detector, lacking(subject, need)))
            assert said is not None, f"it refuses a subject without {need}"
            assert need in said, f"the message names {need}"


def check_a_model_without_behaviour_cannot_be_judged(detector: Detector) -> None:
    """Of a model whose outputs are constant or not a number it says why it could not tell."""
    if not detector.needs & BEHAVIOUR:
        return
    for value in (0.0, math.nan):
        with _artifact() as artifact:
            subject = make_subject(artifact, Constant(value))
            if detector.missing(subject):  # such a model may have no features
                continue
            seen = detector(subject)
        assert seen.reason, f"it raises CouldNotTell for a model that always answers {value}"


def check_a_spent_time_budget_is_no_crash(detector: Detector) -> None:
    """Without time left it is done all the same, or says that the time budget does not suffice."""
    with _artifact() as artifact:
        seen = detector(make_subject(artifact), deadline=Deadline(0.0))
    assert seen.reason is None or "time budget" in seen.reason, "the reason names the time budget"


def check_the_registry_finds_it(detector: Detector) -> None:
    """Its name is that of its file, and the registry builds it from that name where it is installed."""
    name = detector.method()
    if name not in registry.modules("detector"):
        return
    assert registry.get("detector", name) is type(detector), "the registry knows another class of that name"
    said = _refusal(partial(registry.build, "detector", name, {"no_such_setting": 1}))
    assert said is not None, "the registry refuses an unknown setting"
    assert "no_such_setting" in said, "the message names the setting"


CHECKS: tuple[Check, ...] = (
    check_it_describes_itself,
    check_settings_rebuild_it,
    check_it_repeats_itself,
    check_it_leaves_everything_as_it_was,
    check_it_measures_and_does_not_judge,
    check_it_refuses_a_subject_that_lacks_a_need,
    check_a_model_without_behaviour_cannot_be_judged,
    check_a_spent_time_budget_is_no_crash,
    check_the_registry_finds_it,
)


def lacking(subject: Subject, need: Need) -> Subject:
    """Return the subject without what serves one need."""
    if need in BEHAVIOUR:
        return replace(subject, classifier=None)
    if need == "clean_labels":
        assert subject.clean is not None
        return replace(subject, clean=InMemorySamples(subject.clean.raw(range(len(subject.clean)))))
    changes: dict[str, Any] = {need: None}
    return replace(subject, **changes)


@contextmanager
def _artifact() -> Iterator[Path]:
    """Give a file of plain weights, alone in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(stripe_network().state_dict(), path)
        yield path


def _refusal(call: Callable[[], object]) -> str | None:
    """Return the message with which a call is refused, None if it is not."""
    try:
        call()
    except (ValueError, InputError) as error:
        return str(error)
    return None


def _without_time(seen: Measurement) -> Measurement:
    return seen.model_copy(update={"seconds": 0.0})
