"""Revisions: a change of code that makes models is told by its source, and must be recorded.

`revisions.json` holds, for each unit of such code, its revision and a hash of its source. A changed source
with an unchanged revision is an error, since cached models would pass for new ones. After a change, raise the
unit's revision (an attack's `revision`, a module's `REVISION`) if results change, and run

    python -m doorward.bench.fingerprints [UNIT...]

where each UNIT is one whose source changed and whose results did not, as in a change of names alone.

Code that judges models needs no revisions: its hash is part of every result's key, and a change of it means
judging again. A change that leaves results as they are can be recorded as well, by `detector NAME` among
the units: `judging.json` then holds that the new source stands for the one that the keys are made of.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import sys
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

from doorward.bench.suite import Trial
from doorward.core.errors import InputError
from doorward.core.records import Record
from doorward.methods import registry
from doorward.models import sequences

PACKAGE = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "revisions.json"
JUDGING = Path(__file__).parent / "judging.json"

#: Code that makes models, next to the attacks: where its `REVISION` is, and the files that it covers.
TRAINERS: dict[str, tuple[str, ...]] = {
    "training.loop": ("training/loop.py", "training/augment.py", "training/settings.py"),
    "models.architectures": ("models/architectures.py",),
}
#: Code that makes adversarially trained models besides; those alone depend on it.
ADVERSARIAL: dict[str, tuple[str, ...]] = {"training.adversarial": ("training/adversarial.py",)}
#: Code that makes models of texts and recordings besides; those alone depend on it.
SEQUENCES: dict[str, tuple[str, ...]] = {
    "models.sequences": ("models/sequences.py", "modalities/text.py", "modalities/audio.py")
}
#: Modules of their own revision that no key of an attacked model holds, though the attack may use them.
_WITHOUT_KEY = tuple(f"doorward.{module}" for module in ADVERSARIAL)
#: Code that makes data.
GENERATORS: dict[str, tuple[str, ...]] = {"bench.synthetic": ("bench/synthetic.py",)}
#: What every attack builds on.
ATTACK_BASE = ("attacks/base.py", "data/imbalance.py", "triggers.py")

#: Rooms whose change does not make what a scan sees another thing, or only by an error that their
#: tests find. What it concludes is not kept but concluded again, so that a change of that costs nothing.
_NOT_JUDGING = {
    "artifacts",
    "calibration",
    "data",
    "errors",
    "measures",
    "models",
    "records",
    "registry",
    "reports",
    "verdict",
}


class Unit(Record):
    """A unit's revision and the hash of its source."""

    revision: int
    source: str


class DetectorFingerprint(Record):
    """The hash of a detector's source, and that of the source whose results are the same."""

    source: str
    key: str


def source_hash(files: Iterable[Path]) -> str:
    """Return the start of the sha256 of some Python files, without comments, docstrings and spacing."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(_bare(file.read_text(encoding="utf-8")).encode() + b"\0")
    return digest.hexdigest()[:16]


def _bare(text: str) -> str:
    """Return source text without comments, docstrings and white space, as every Python version does."""
    lines = [list(line) for line in text.splitlines(keepends=True)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1][column:] = "\n"
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [[]] * ((first.end_lineno or 0) - first.lineno + 1)
    return "".join("".join("".join(line).split()) for line in lines)


def units_of(trials: Iterable[Trial]) -> set[str]:
    """Return the units that make the models of some trials."""
    units = set(TRAINERS)
    for trial in trials:
        units |= {f"attack {trial.attack.name}"} if trial.attack else set()
        units |= set(GENERATORS) if trial.data.world else set()
        units |= set(ADVERSARIAL) if trial.robust is not None else set()
        units |= set(SEQUENCES) if trial.architecture in sequences.NAMES else set()
    return units


def current() -> dict[str, Unit]:
    """Return every unit as it is now."""
    units = {}
    for name, module in registry.modules("attack").items():
        revision = registry.get("attack", name).revision
        files = [*(PACKAGE / file for file in ATTACK_BASE), *_attack_files(module)]
        units[f"attack {name}"] = Unit(revision=revision, source=source_hash(files))
    for module, covered in (TRAINERS | ADVERSARIAL | SEQUENCES | GENERATORS).items():
        revision = import_module(f"doorward.{module}").REVISION
        units[module] = Unit(revision=revision, source=source_hash(PACKAGE / f for f in covered))
    return units


def _attack_files(module: str) -> list[Path]:
    """Return the files of an attack, of what it takes from other attacks, and of adversarial training."""
    parts = ("doorward.attacks.data.", "doorward.attacks.model.", "doorward.attacks._")
    todo, files = [module], dict[str, Path]()
    while todo:
        name = todo.pop()
        file = _file_of(name)
        if file is not None and name not in files:
            files[name] = file
            todo += [used for used in _imports(file) if used.startswith((*parts, *_WITHOUT_KEY))]
    return [files[name] for name in sorted(files)]


def recorded(file: Path = RECORDED) -> dict[str, Unit]:
    """Return every unit as it was when its revision was last recorded."""
    return {name: Unit(**form) for name, form in json.loads(file.read_text(encoding="utf-8")).items()}


def unrecorded(now: dict[str, Unit], then: dict[str, Unit]) -> list[str]:
    """Return the units whose source is not the one that their revision was recorded with."""
    changed = [name for name, unit in now.items() if name not in then or unit != then[name]]
    return sorted([*changed, *(then.keys() - now.keys())])


def check(units: Iterable[str]) -> None:
    """Raise unless these units are as recorded.

    Raises:
        InputError: naming those that are not, and what to do.
    """
    if wrong := sorted(set(units) & set(unrecorded(current(), recorded()))):
        raise InputError(
            f"the source of {', '.join(wrong)} is not the one that its revision was recorded with, so "
            "cached models may be of another make: raise it, then run python -m doorward.bench.fingerprints"
        )


def record(unchanged: Sequence[str], file: Path = RECORDED) -> None:
    """Record every unit as it is now.

    Args:
        unchanged: units whose source changed and whose results did not.

    Raises:
        InputError: if another unit's source changed and its revision did not, or a name is unknown.
    """
    now, then = current(), recorded(file) if file.exists() else {}
    if strange := set(unchanged) - set(now):
        raise InputError(f"there is no unit {min(strange)!r}; there are: {', '.join(now)}")
    for name, unit in now.items():
        before = then.get(name)
        if (
            before
            and before.source != unit.source
            and before.revision == unit.revision
            and name not in unchanged
        ):
            raise InputError(
                f"the source of {name!r} changed and its revision {unit.revision} did not: raise it, "
                "or name the unit here if its results are the same"
            )
    _write(now, file)


def record_judging(unchanged: Sequence[str], file: Path = JUDGING) -> None:
    """Record the source of every detector as it is now.

    Args:
        unchanged: detectors whose source changed and whose results did not.

    Raises:
        InputError: if a name is unknown.
    """
    names = registry.modules("detector")
    if strange := set(unchanged) - set(names):
        raise InputError(f"there is no detector {min(strange)!r}; there are: {', '.join(names)}")
    now = {name: judging_source(name) for name in names}
    then = judges(file) if file.exists() else {}
    same = {name for name in names if name in then and (name in unchanged or then[name].source == now[name])}
    _write(
        {n: DetectorFingerprint(source=now[n], key=then[n].key if n in same else now[n]) for n in names}, file
    )


def judges(file: Path = JUDGING) -> dict[str, DetectorFingerprint]:
    """Return the source of every detector as it was when it was last recorded."""
    return {
        name: DetectorFingerprint(**form)
        for name, form in json.loads(file.read_text(encoding="utf-8")).items()
    }


def _write(records: Mapping[str, Record], file: Path) -> None:
    text = json.dumps({name: one.model_dump() for name, one in sorted(records.items())}, indent=2)
    file.write_text(text + "\n", encoding="utf-8")


@cache
def judging_code(detector: str) -> str:
    """Return the hash of code whose results are those of the code that makes what a detector sees."""
    source, recorded = judging_source(detector), judges(JUDGING).get(detector)
    return recorded.key if recorded and recorded.source == source else source


def judging_source(detector: str) -> str:
    """Return the hash of all code of ours that makes what a detector sees."""
    todo = ["doorward.scan.behaviour", registry.modules("detector")[detector]]
    files: dict[str, Path] = {}
    while todo:
        name = todo.pop()
        file = _file_of(name)
        if file is None or name in files or name.split(".")[1] in _NOT_JUDGING:
            continue
        files[name] = file
        todo += _imports(file)
    return source_hash(files[name] for name in sorted(files))


def _imports(file: Path) -> list[str]:
    """Return the names of ours that a file imports, modules and what is in them alike."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.startswith("doorward.")]


def _file_of(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


if __name__ == "__main__":
    said = [name.partition("detector ") for name in sys.argv[1:]]
    try:
        record([before for before, _, name in said if not name])
        record_judging([name for _, _, name in said if name])
    except InputError as error:
        sys.exit(f"error: {error}")
