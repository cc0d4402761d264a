"""Fingerprints: what is cached counts until the code that made it changes, which is noticed by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from bench_examples import clean, planted, robust, trials
from doorward.bench import fingerprints
from doorward.bench.fingerprints import fingerprint, main, record, source, units, units_of
from doorward.bench.suite import Data, World
from doorward.core.errors import InputError
from doorward.core.records import Measurement, Observations
from doorward.methods import registry
from doorward.methods import source as sources
from doorward.methods.source import PACKAGE, reached, score_code, source_hash
from doorward.scan.environment import environment

SOURCE = '''"""What it is."""

import math  # a comment


class A:
    """A class."""

    title = "Ä: circles"; unit = 1
    limits: ClassVar[str] = (
        "Round things "  # alone
        "alone."
    )
    source = "Euclid"
    steps: int = Field(
        5,
        ge=1,
        description="Steps, " + "all told",
    )

    def area(self, r: float) -> float:
        """Return the area."""
        text = "# no comment"
        return math.pi * r**2 * len(text)
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""What it is."""', '"""Something\nelse."""', True),
        ("  # a comment", "", True),
        ('        """Return the area."""\n', '        """Return it.\n\n        More.\n        """\n', True),
        ("math.pi * r**2 * len(text)", "(\n            math.pi*r**2\n * len(text))", False),
        ("return math.pi", "return  math.pi", True),
        ("import math", "\n\nimport math", True),
        ("r**2", "r**3", False),
        ('"# no comment"', '"# a comment"', False),
        ("class A", "class B", False),
        ("circles", "round things", True),
        ("; unit = 1", "; unit = 2", False),
        ("alone.", "and nothing else.", True),
        ('    source = "Euclid"\n', "", True),
        ("Euclid", "Archimedes", True),
        ('source = "Euclid"', 'source, b = "Euclid", 1', False),
        (',\n        description="Steps, " + "all told"', "", True),
        ("Steps, ", "How many steps, (", True),
        ("ge=1", "ge=2", False),
        ("        5,", "        6,", False),
        ("text =", "title =", False),
        ('description="Steps, "', 'alias="Steps, "', False),
    ],
)
def test_the_hash_of_a_source_is_that_of_its_code(tmp_path: Path, old: str, new: str, same: bool) -> None:
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(SOURCE)
    assert old in SOURCE
    after.write_text(SOURCE.replace(old, new))
    assert (source_hash([before]) == source_hash([after])) == same


def test_the_hash_is_of_all_files_in_their_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a = 1\n")
    two.write_text("b = 2\n")
    assert len({source_hash([one]), source_hash([one, two]), source_hash([two, one])}) == 3


# --- a package of a few files ------------------------------------------------------------------------

FILES = {
    "kept/first.py": "import doorward.kept.second\n\nfrom doorward.other import thing\n",
    "kept/second.py": "def late():\n    from doorward.kept import third\n\n    return third\n",
    "kept/third.py": "from doorward.kept.first import again\n\nimport numpy\n",
    "kept/unused.py": "a = 1\n",
    "kept/deep.py": "b = 1\n",
    "kept/inner/__init__.py": "c = 1\n",
    "kept/fourth.py": "from doorward.kept.inner import name\n",
    "other/__init__.py": "",
    "other/thing.py": "from doorward.kept import deep\n",
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def kept(name: str) -> bool:
    return name.startswith("doorward.kept.")


@pytest.mark.parametrize(
    ("start", "found"),
    [
        # what a function imports counts, a circle is no trouble, and what only `other` imports does not count
        ("first", ["first.py", "second.py", "third.py"]),
        ("unused", ["unused.py"]),
        ("fourth", ["fourth.py", "inner/__init__.py"]),
        ("missing", []),
    ],
)
def test_imports_are_followed_into_what_counts_alone(
    start: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, FILES)
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    assert reached([f"doorward.kept.{start}"], keep=kept) == [tmp_path / "kept" / name for name in found]
    assert reached(["doorward.other.thing"], keep=kept) == []


# --- the package itself ------------------------------------------------------------------------------


def test_every_unit_has_a_fingerprint_of_its_own() -> None:
    found = {unit: source(unit) for unit in units()}
    assert {"attack badnets", "detector max-margin", "training.loop", "bench.synthetic"} <= set(found)
    assert len(set(found.values())) == len(found)
    assert all(len(value) == 16 for value in found.values())


@pytest.mark.parametrize("unit", ["nonsense", "attack nonsense", "detector nonsense", "attack max-margin"])
def test_a_unit_that_is_not_there_is_named(unit: str) -> None:
    with pytest.raises(InputError, match=f"there is no unit '{unit}'; there are: attack badnets, "):
        source(unit)


def test_a_model_depends_only_on_what_makes_it() -> None:
    generated = clean(1, data=Data(name="glyphs", rows=100, world=World()))
    trainers = {"training.loop", "models.architectures"}
    assert units_of(trials(clean())) == trainers
    assert units_of(trials(planted())) == trainers | {"attack badnets"}
    assert units_of(trials(robust())) == trainers | {"training.adversarial"}
    assert units_of(trials(generated)) == trainers | {"bench.synthetic"}
    assert units_of(trials(clean(1, architectures=("text-cnn",)))) == trainers | {"models.sequences"}
    assert units_of(trials(planted(), robust())) <= set(units())


# --- a copy of the package, which a test may change --------------------------------------------------

T = TypeVar("T")


def by_content(inner: Callable[[Path], T]) -> Callable[[Path], T]:
    """Return a function of a file that remembers its answer for as long as the file stays the same."""
    known: dict[tuple[Path, bytes], T] = {}

    def outer(file: Path) -> T:
        key = (file, file.read_bytes())
        if key not in known:
            known[key] = inner(file)
        return known[key]

    return outer


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Have all fingerprints be those of a copy of the package's sources."""
    folder = tmp_path_factory.mktemp("package")
    write(folder, {str(f.relative_to(PACKAGE)): f.read_text() for f in PACKAGE.rglob("*.py")})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sources, "PACKAGE", folder)
        patched.setattr(fingerprints, "PACKAGE", folder)
        patched.setattr(sources, "_bare", by_content(sources._bare))
        patched.setattr(sources, "imports", by_content(sources.imports))
        patched.setattr(sources, "_tree", by_content(sources._tree.__wrapped__))
        for cached in (fingerprint, fingerprints.detector_fingerprint, score_code):
            patched.setattr(fingerprints, cached.__name__, cached.__wrapped__)
        yield folder


@pytest.fixture
def package(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of the copy, whose changes are undone, and record same results next to it."""
    before = {file: file.read_bytes() for file in copied.rglob("*.py")}
    file = tmp_path / "same_results.json"
    held = fingerprints.same_results.__wrapped__
    monkeypatch.setattr(fingerprints, "same_results", lambda: held(file) if file.exists() else {})
    yield copied
    for changed in (file for file, content in before.items() if file.read_bytes() != content):
        changed.write_bytes(before[changed])


def change(file: Path) -> None:
    with file.open("a") as text:
        text.write("\n\nADDED = 1\n")


def hashes() -> dict[str, str]:
    return {unit: source(unit) for unit in units()}


@pytest.fixture(scope="module")
def unchanged(copied: Path) -> dict[str, str]:
    """Return the hashes of the copy as it is between tests."""
    return hashes()


SEARCHES = {
    f"detector {name}"
    for name in ("aegis", "blend-search", "neural-cleanse", "patch-search", "trigger-families")
}
BEHAVIOUR = SEARCHES | {"detector max-margin"}
EVERY = {f"detector {name}" for name in registry.own_modules("detector")}


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("scan/behaviour.py", EVERY),
        ("scan/confirmation.py", EVERY),
        ("detectors/base.py", EVERY),
        (
            "stats/outliers.py",
            (BEHAVIOUR | {"detector deepinspect"}) - {"detector trigger-families"},
        ),
        ("inversion/sources.py", SEARCHES | {"detector deepinspect"}),
        ("inversion/masks.py", {"detector blend-search", "detector neural-cleanse"}),
        ("detectors/model/neural_cleanse.py", {"detector neural-cleanse"}),
        (
            "training/augment.py",
            {"detector aegis", "detector patch-search", "detector trigger-families", "training.loop"},
        ),
        ("training/loop.py", {"training.loop"}),
        ("training/adversarial.py", {"attack clean-label", "attack label-flipping", "training.adversarial"}),
        ("attacks/data/_surrogate.py", {"attack clean-label", "attack label-flipping"}),
        ("attacks/data/reflection.py", {"attack reflection"}),
        ("triggers/warp.py", {"attack warp", "detector trigger-families"}),
        ("models/architectures.py", {"models.architectures"}),
        ("models/encode/text.py", {"models.sequences"}),
        ("bench/synthetic.py", {"bench.synthetic"}),
        # what is concluded is not kept, and loading has tests of its own
        ("scan/verdict.py", set()),
        ("scan/calibration.py", set()),
        ("scan/pipeline.py", set()),
        ("models/formats/loading.py", set()),
        ("bench/tables.py", set()),
    ],
)
def test_a_change_of_code_makes_stale_what_it_makes(
    file: str, stale: set[str], package: Path, unchanged: dict[str, str]
) -> None:
    change(package / file)
    assert {unit for unit, code in hashes().items() if code != unchanged[unit]} == stale


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("inversion/masks.py", {"blend-search", "neural-cleanse"}),
        ("detectors/model/max_margin.py", {"max-margin"}),
        ("stats/outliers.py", {"aegis", "blend-search", "max-margin", "neural-cleanse", "patch-search"}),
        ("scan/confirmation.py", set()),
        ("detectors/base.py", set()),
    ],
)
def test_a_calibration_holds_until_the_code_of_scores_changes(
    file: str, stale: set[str], package: Path
) -> None:
    own = registry.own_modules("detector")

    def codes() -> dict[str, str]:
        names = [unit.removeprefix("detector ") for unit in BEHAVIOUR]
        return {name: fingerprints.score_code(own[name]) for name in names}

    before = codes()
    change(package / file)
    after = codes()
    assert {name for name in after if after[name] != before[name]} == stale


def test_a_comment_makes_nothing_stale(package: Path) -> None:
    before = hashes()
    for file in ("inversion/masks.py", "training/loop.py", "attacks/data/badnets.py"):
        with (package / file).open("a") as text:
            text.write("\n# nothing\n")
    assert hashes() == before


def test_what_gives_the_same_results_keeps_its_fingerprint(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "same_results.json"
    units_ = ("detector max-margin", "detector neural-cleanse", "detector patch-search")

    def now() -> list[str]:
        return [fingerprints.fingerprint(unit) for unit in units_]

    first, before = now(), hashes()
    record(units_, before, file)
    assert json.loads(file.read_text()) == {}, "nothing changed"
    change(package / "inversion/sources.py")
    assert now()[0] == first[0]
    assert now()[1] != first[1]
    record(["detector neural-cleanse"], before, file)
    assert now()[:2] == first[:2]
    assert now()[2] != first[2], "nobody said so of this one"
    module = registry.own_modules("detector")["neural-cleanse"]
    assert fingerprints.detector_fingerprint(module) == first[1]

    # a second change of the same kind leads back to the first code, and another one is a change again
    second = hashes()
    change(package / "inversion/sources.py")
    assert now()[1] not in (first[1], second[units_[1]])
    record(["detector neural-cleanse"], second, file)
    assert now()[1] == first[1]
    assert set(json.loads(file.read_text())["detector neural-cleanse"].values()) == {first[1]}
    change(package / "inversion/sources.py")
    assert now()[1] not in (first[1], second[units_[1]])


def test_stored_scans_go_on_counting_after_a_change_that_leaves_results_alone(
    package: Path, tmp_path: Path
) -> None:
    modules = registry.own_modules("detector")
    names = ("neural-cleanse", "patch-search")

    def measured(name: str) -> Measurement:
        code = fingerprints.score_code(modules[name])
        return Measurement(detector=name, level="model", kind="backdoor", summary="", code=code)

    seen = Observations(
        subject=None,
        measurements=(*map(measured, names), measured("max-margin").model_copy(update={"detector": "else"})),
        environment=environment("cpu"),
    )
    detectors = [{"name": name, "code": fingerprints.fingerprint(f"detector {name}")} for name in names]
    resolved = {"judging": {"detectors": [*detectors, {"name": "else", "code": "x"}]}}
    before = hashes()
    change(package / "inversion/sources.py")
    record(["detector neural-cleanse"], before, tmp_path / "same_results.json")
    now = fingerprints.with_current_code(seen, resolved)
    assert now.measurements[0].code == fingerprints.score_code(modules["neural-cleanse"])
    assert now.measurements[0].code != seen.measurements[0].code
    assert now.measurements[1:] == seen.measurements[1:], "these were measured by other code"
    assert fingerprints.with_current_code(seen, {}) == seen


def test_what_cannot_be_recorded_is_named(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "same_results.json"
    with pytest.raises(InputError, match="there is no unit 'nonsense'"):
        record(["attack badnets", "nonsense"], hashes(), file)
    with pytest.raises(InputError, match="nothing is known of 'attack warp' as it was before"):
        record(["attack badnets", "attack warp"], {"attack badnets": "0123"}, file)
    assert not file.exists(), "nothing is written by halves"


def test_the_command_prints_all_hashes_and_records_what_stays_the_same(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, old = tmp_path / "same_results.json", tmp_path / "old.json"
    main([], file)
    old.write_text(capsys.readouterr().out)
    assert json.loads(old.read_text()) == hashes()
    assert not file.exists()
    before = hashes()["attack warp"]
    change(package / "attacks/data/warp.py")
    main([str(old), "attack warp", "attack badnets"], file)
    assert json.loads(file.read_text()) == {"attack warp": {hashes()["attack warp"]: before}}
    assert fingerprints.fingerprint("attack warp") == before
    content = file.read_bytes()
    (tmp_path / "list.json").write_text('["attack warp"]')
    (tmp_path / "text.json").write_text("attack warp")
    for name, unit, why in (
        ("old.json", "nonsense", "error: there is no unit 'nonsense'; there are: attack badnets, "),
        ("missing.json", "attack warp", r"error: .*missing\.json cannot be read \(No such file"),
        ("list.json", "attack warp", r"error: .*list\.json holds no hashes as this command prints them"),
        ("text.json", "attack warp", r"error: .*text\.json holds no hashes as this command prints them"),
    ):
        with pytest.raises(SystemExit, match=why):
            main([str(tmp_path / name), unit], file)
    assert file.read_bytes() == content


def test_what_the_package_records_is_of_units_that_there_are() -> None:
    assert set(fingerprints.same_results()) <= set(units())
