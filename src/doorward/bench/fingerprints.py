"""Fingerprints: cached models and stored scans are known by the content of the code that makes them.

A unit is the code of one attack, one detector, the training loop and so on. Its fingerprint is a hash of that
code without comments, docstrings and spacing, so that a change of code means working again, and needs no
ritual. Where a change leaves results as they are, `same_results.json` says so: it names, for a unit and its
new hash, the old hash whose results are the same. It is written by

    python -m doorward.bench.fingerprints > old.json           (before the change)
    python -m doorward.bench.fingerprints old.json UNIT...     (after it)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from doorward.bench.suite import Trial
from doorward.core.errors import InputError
from doorward.core.records import Observations
from doorward.methods import registry
from doorward.methods.source import PACKAGE, reached, score_code, source_hash
from doorward.models import sequences

SAME_RESULTS = Path(__file__).parent / "same_results.json"

#: Code that makes every model, besides the attacks.
TRAINERS: dict[str, tuple[str, ...]] = {
    "training.loop": ("training/loop.py", "training/augment.py", "training/settings.py"),
    "models.architectures": ("models/architectures.py",),
}
#: Code that makes adversarially trained models as well; those alone depend on it.
ADVERSARIAL: dict[str, tuple[str, ...]] = {"training.adversarial": ("training/adversarial.py",)}
#: Code that makes models of texts and recordings as well; those alone depend on it.
SEQUENCES: dict[str, tuple[str, ...]] = {
    "models.sequences": (
        "models/sequences.py",
        "models/encode/text.py",
        "models/encode/words.py",
        "models/encode/audio.py",
    )
}
#: Code that makes data.
GENERATORS: dict[str, tuple[str, ...]] = {"bench.synthetic": ("bench/synthetic.py",)}

#: Modules that count for an attack where it uses them, and for what a detector sees.
_ATTACKING = (
    "doorward.attacks.",
    "doorward.triggers.",
    "doorward.data.imbalance",
    "doorward.training.adversarial",
)
_SEEING = (
    "doorward.detectors.",
    "doorward.inversion.",
    "doorward.scan.behaviour",
    "doorward.scan.images",
    "doorward.scan.confirmation",
    "doorward.stats.",
    "doorward.training.augment",
    "doorward.triggers.",
)


def units_of(trials: Iterable[Trial]) -> set[str]:
    """Return the units that make the models of some trials."""
    units = set(TRAINERS)
    for trial in trials:
        units |= {f"attack {trial.attack.name}"} if trial.attack else set()
        units |= set(GENERATORS) if trial.data.world else set()
        units |= set(ADVERSARIAL) if trial.robust is not None else set()
        units |= set(SEQUENCES) if trial.architecture in sequences.NAMES else set()
    return units


def units() -> list[str]:
    """Return the names of all units of the package."""
    methods = [f"{kind} {name}" for kind in ("attack", "detector") for name in registry.own_modules(kind)]
    return sorted([*methods, *(TRAINERS | ADVERSARIAL | SEQUENCES | GENERATORS)])


@cache
def fingerprint(unit: str) -> str:
    """Return a unit's fingerprint: the hash of its code, or the older hash whose results are the same."""
    return _oldest(unit, source(unit))


@cache
def detector_fingerprint(module: str) -> str:
    """Return the fingerprint of the detector in a module, which may be somebody else's."""
    return _oldest(f"detector {registry.method_name(module)}", _detector_source(module))


def _oldest(unit: str, now: str) -> str:
    return same_results().get(unit, {}).get(now, now)


def with_current_code(seen: Observations, resolved: Mapping[str, Any]) -> Observations:
    """Return stored observations under the hash of today's code, where that gives the same results.

    A calibration names the code that it holds for. What was measured before a change that leaves results as
    they are would not fit it.

    Args:
        resolved: what the key of the stored scan is made of.
    """
    own = registry.own_modules("detector")
    measured = {one["name"]: one["code"] for one in resolved.get("judging", {}).get("detectors", ())}
    same = {
        name: score_code(own[name])
        for name, code in measured.items()
        if name in own and code == detector_fingerprint(own[name])
    }
    measurements = tuple(
        one.model_copy(update={"code": same.get(one.detector, one.code)}) for one in seen.measurements
    )
    return seen.model_copy(update={"measurements": measurements})


def source(unit: str) -> str:
    """Return the hash of a unit's code as it is.

    Raises:
        InputError: if there is no such unit.
    """
    kind, _, name = unit.partition(" ")
    if kind == "attack" and name in registry.own_modules("attack"):
        module = registry.own_modules("attack")[name]
        return source_hash(reached([module], keep=lambda one: one.startswith(_ATTACKING)))
    if kind == "detector" and name in registry.modules("detector"):
        return _detector_source(registry.modules("detector")[name])
    covered = (TRAINERS | ADVERSARIAL | SEQUENCES | GENERATORS).get(unit)
    if covered is None:
        raise InputError(f"there is no unit {unit!r}; there are: {', '.join(units())}")
    return source_hash(PACKAGE / file for file in covered)


def _detector_source(module: str) -> str:
    start = ["doorward.scan.behaviour", module]
    return source_hash(reached(start, keep=lambda one: one == module or one.startswith(_SEEING)))


@cache
def repair_code() -> str:
    """Return the hash of the code of all repairs, and of the scans that they go by."""
    start = ["doorward.repair.by_clean_data", *registry.own_modules("repair").values()]
    start += [one for one in registry.own_modules("detector").values() if ".model." in one]
    seeing = (*_SEEING, "doorward.repair", "doorward.training", "doorward.scan.")
    return source_hash(reached(start, keep=lambda one: one.startswith(seeing)))


@cache
def same_results(file: Path = SAME_RESULTS) -> dict[str, dict[str, str]]:
    """Return, by unit and hash, the older hash whose results are the same."""
    found: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def record(names: Sequence[str], before: dict[str, str], file: Path = SAME_RESULTS) -> None:
    """Record that units give the same results as before a change.

    Args:
        before: the hashes of before the change, by unit.

    Raises:
        InputError: if a unit is unknown.
    """
    held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in names:
        now = source(name)
        if name not in before:
            raise InputError(f"nothing is known of {name!r} as it was before")
        oldest = held.get(name, {}).get(before[name], before[name])
        if now != oldest:
            held.setdefault(name, {})[now] = oldest
    text = json.dumps({name: held[name] for name in sorted(held)}, indent=2)
    file.write_text(text + "\n", encoding="utf-8")


def main(words: Sequence[str], file: Path = SAME_RESULTS) -> None:
    """Print all hashes, or record that some units give the same results as an earlier print says."""
    if not words:
        sys.stdout.write(json.dumps({name: source(name) for name in units()}, indent=2) + "\n")
        return
    try:
        record(words[1:], _printed(Path(words[0])), file)
    except InputError as error:
        sys.exit(f"error: {error}")


def _printed(file: Path) -> dict[str, str]:
    """Return the hashes that an earlier call printed into a file.

    Raises:
        InputError: if it cannot be read, or holds something else.
    """
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError:
        held = None
    if not isinstance(held, dict) or not all(isinstance(value, str) for value in held.values()):
        raise InputError(f"{file} holds no hashes as this command prints them")
    return held


if __name__ == "__main__":
    main(sys.argv[1:])
