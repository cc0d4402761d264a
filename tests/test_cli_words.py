"""The command line's help, its questions where a word is mistyped, and its file of defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import CLEAN, Outcome, assert_one_line, call, environment
from doorward.core.errors import InputError
from doorward.methods import registry
from doorward.methods.describe import settings_of
from doorward.scan.behaviour import choose


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of two classes of pictures."""
    folder = tmp_path / "images"
    for name in ("Coat", "Dress"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_the_package_runs_as_a_module_and_tells_its_version() -> None:
    command = [sys.executable, "-m", "doorward", "-V"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == call("--version").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plant", "badnet", "images", "out"), "there is no attack named 'badnet'; did you mean 'badnets'?"),
        (("plant", "strip", "images", "out"), "'strip' (strip is a detector); there are: "),
        (("scan", "images", "--detector", "patchsearch"), "did you mean 'patch-search'?"),
        (("scan", "image"), "no hub id (owner/name); did you mean 'images'?"),
        (("scan", "images", "--clean", "./imagse"), "no file or folder 'imagse'; did you mean 'images'?"),
        (("scan", "images", "--require", "behavior"), "did you mean 'behaviour'?"),
        (("scan", "images", "--set", "steps=3"), "with no --detector, say whose setting it is"),
        (("scan", "images", "--detector", "max-margin", "--set", "strip.steps=3"), "name that detector"),
        (("scan", "images", "--detector", "max-margin", "--set", "steps"), "--set takes NAME=VALUE"),
        (("repair", "image", "out", "--clean", "images"), "did you mean 'images'?"),
        (("repair", "images", "out", "--method", "prunning"), "did you mean 'pruning' or 'fine-pruning'?"),
        (("guard", "image", "--clean", "images", "--check", "images"), "did you mean 'images'?"),
    ],
)  # fmt: skip
def test_a_mistyped_word_is_answered_with_the_right_one_and_without_torch(
    words: tuple[str, ...], said: str, images: Path
) -> None:
    assert_one_line(call(*words, folder=images.parent), said)
    code = (
        "import sys\nfrom doorward.cli.app import main\n"
        f"sys.argv = {['doorward', *words]!r}\n"
        "try:\n    main()\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=images.parent, check=False, capture_output=True, env=environment()
    )
    assert done.returncode == 0, "a refusal waits for no torch"


def test_settings_that_are_mistyped(images: Path) -> None:
    out = images.parent / "out"
    assert_one_line(call("plant", "badnets", images, out, "--set", "targt=1"), "did you mean 'target'?")
    assert_one_line(
        call("plant", "badnets", images, out, "--set", "target=dres"),
        "there is no class 'dres'; did you mean 'Dress'?",
    )
    assert not out.exists()


def test_settings_are_typed_as_people_would(images: Path, tmp_path: Path) -> None:
    words = ("--set", "target=dress", "--set", "place=1,2", "--set", "colour=red", "--set", "size=2")
    done = call("plant", "badnets", images, tmp_path / "out", *words)
    assert done.code == 0, done.err
    assert "a label of class 1 (Dress)" in done.out


@pytest.mark.parametrize("command", ["plant", "scan", "repair"])
def test_every_method_has_help_with_its_settings(command: str) -> None:
    kinds: dict[str, registry.MethodKind] = {"plant": "attack", "scan": "detector", "repair": "repair"}
    option = {"plant": (), "scan": ("--detector",), "repair": ("--method",)}[command]
    for name in registry.own_modules(kinds[command]):
        done = call(command, *option, name, "--help")
        assert (done.code, done.err) == (0, ""), name
        cls = registry.get(kinds[command], name)
        assert cls.title in " ".join(done.out.split())
        for one in settings_of(cls):
            assert f"\n  {one.name}: " in done.out
        commands = ("Usage: doorward ", "  doorward ")
        assert all(len(line) <= 80 or line.startswith(commands) for line in done.out.splitlines())


def test_help_of_an_attack_shows_how_values_are_typed() -> None:
    text = call("plant", "badnets", "--help").out
    for part in (
        "--set target=Dress",
        "--set place=5,5",
        "--set colour=red",
        "default 0",
        "or by their names",
    ):
        assert part in text


def test_settings_of_detectors_reach_them_and_take_their_calibration() -> None:
    (one,) = choose(("max-margin",), settings=("max-margin.starts=3", "strip.overlays=9"))
    assert one.settings()["starts"] == 3
    with pytest.raises(InputError, match="max-margin has no setting 'startz'; did you mean 'starts'"):
        choose(("max-margin",), settings=("max-margin.startz=3",))


def configured(folder: Path, text: str, *words: object, file: str = "doorward.toml") -> Outcome:
    (folder / file).write_text(text)
    return call(*words, folder=folder)


def test_a_file_of_defaults_is_used_and_told(images: Path) -> None:
    folder = images.parent
    text = '[plant]\nset = ["target=Dress", "poison-rate=0.3"]\n'
    done = configured(folder, text, "plant", "badnets", "images", "out")
    assert done.code == 0, done.err
    assert done.err.startswith("from ")
    assert "doorward.toml: plant set = " in done.err
    assert "class 1 (Dress)" in done.out
    typed = call("plant", "badnets", "images", "out2", "--set", "target=0", folder=folder)
    assert "class 0 (Coat)" in typed.out, "what is typed goes before"


def test_a_project_may_hold_the_defaults(images: Path) -> None:
    text = '[tool.doorward.plant]\nset = ["target=Dress"]\n'
    done = configured(images.parent, text, "plant", "badnets", "images", "out", file="pyproject.toml")
    assert "class 1 (Dress)" in done.out
    assert call("-V", folder=images.parent).code == 0
    other = configured(images.parent, "[tool.black]\n", "list", "repairs", file="pyproject.toml")
    assert (other.code, other.err) == (0, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[scann]\nseed = 1", "there is no command 'scann'; did you mean 'scan'?"),
        ("[scan]\nsed = 1", "there is no option 'sed'; did you mean 'seed'?"),
        ('[scan]\nfactory = "a.py:f"', "factory goes on the command line alone, since it runs code"),
        ('[scan]\nfail-on = "never"', "fail-on goes on the command line alone"),
        ('[scan]\ndetector = ["a.py:Mine"]', "runs code: command line alone"),
        ("[scan\n", "cannot be read as TOML"),
        ("seed = 1", "there is no command 'seed'"),
        ('[scan]\nseed = "much"', "Invalid value for '--seed'"),
        ("[scan]\nseed = {a = 1}", "seed takes a value, got a table"),
    ],
)
def test_a_wrong_file_of_defaults_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    done = configured(tmp_path, text, "scan", CLEAN)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def completed(words: str, at: int) -> list[str]:
    """Return what bash would offer for the last of some words."""
    done = subprocess.run(
        [sys.executable, "-m", "doorward"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(
            _DOORWARD_COMPLETE="complete_bash", COMP_WORDS=f"doorward {words}", COMP_CWORD=str(at)
        ),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("sc", ["scan"]),
        ("scan --files-o", ["--files-only"]),
        ("scan --detector patch", ["patch-search"]),
        ("plant bad", ["badnets"]),
        ("repair m out --method fine", ["fine-pruning", "fine-tuning"]),
        ("guard m --filter str", ["strip"]),
        ("bench run scan-p", ["scan-population"]),
        ("list att", ["attacks"]),
        ("scan m.on", []),  # the shell then offers files
    ],
)
def test_a_shell_completes_commands_options_and_methods(words: str, offered: list[str]) -> None:
    assert completed(words, len(words.split())) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_completion_is_shown_for_a_shell(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = call("--show-completion", shell)
    assert (done.code, done.err) == (0, "")
    assert "_DOORWARD_COMPLETE" in done.out


def test_a_shell_without_completion_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert_one_line(call("--show-completion", "tcsh"), "'tcsh' is not one of")
