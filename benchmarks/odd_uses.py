"""Use Doorward wrongly or oddly, as people do, and write down what it answers.

    python benchmarks/odd_uses.py

makes a small model, pictures and files, runs every use, and writes benchmarks/results/odd-uses.json and
odd-uses.md there. Ends with 4 if an answer is a traceback, more than one line of an error, or lacks the words
that a case asks for.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from doorward.cli.app import main as command_line
from doorward.core.errors import DoorwardError

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "odd-uses.json", HERE / "results" / "odd-uses.md"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 123456\n"
CODE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))

def number():
    return 3
"""
#: A factory's model with its size, and detectors that take a moment.
BUILT = ("--factory", "net.py:build", "--size", "3,8,8")
QUICK = ("--detector", "unsafe-code")


@dataclass(frozen=True)
class Use:
    """One use: what is typed or called, and words that the answer has to hold.

    Attributes:
        wrong: whether it is to be refused; an odd use that works ends otherwise.
    """

    typed: str | Callable[[], Any]
    said: str
    shown: str = ""
    wrong: bool = True


@dataclass(frozen=True)
class Answer:
    """What a use got."""

    use: str
    code: int | str
    answer: str
    useful: bool


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def prepare(folder: Path) -> None:
    """Write all files that the uses name."""
    (folder / "net.py").write_text(CODE)
    weights = network().state_dict()
    torch.save(weights, folder / "weights.pt")
    torch.save({"model_state_dict": weights, "epoch": 3}, folder / "checkpoint.pt")
    torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, folder / "compiled.pt")
    torch.save({f"module.{name}": value for name, value in weights.items()}, folder / "parallel.pt")
    torch.save({"my_weights": weights, "epoch": 3}, folder / "strange.pt")
    torch.save({"losses": [0.7, 0.5], "epoch": 3}, folder / "numbers.pt")
    torch.save(nn.Linear(2, 2), folder / "whole.pt")
    safetensors.torch.save_file(weights, folder / "weights.safetensors")
    whole = (folder / "weights.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.pt").write_bytes((folder / "weights.pt").read_bytes()[:-300])
    shutil.copy(folder / "weights.pt", folder / "renamed.onnx")
    shutil.copy(folder / "weights.safetensors", folder / "renamed.pt")
    for name in ("pointer.onnx", "pointer.parquet", "pointer.pt"):
        (folder / name).write_text(POINTER)
    (folder / "login.onnx").write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    (folder / "empty.onnx").write_text("")
    for name in ("Coat", "Dress", "Bag"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    (folder / "images" / "@eaDir").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "@eaDir" / "thumb.png")
    (folder / "grey").mkdir()
    Image.new("L", (8, 8)).save(folder / "grey" / "0.png")
    (folder / "large").mkdir()
    Image.new("RGB", (99, 99)).save(folder / "large" / "0.png")
    (folder / "names.csv").write_text("image,label\nCoat/0.png,0\nDress/1.png,1\n")
    (folder / "truth-of-two.csv").write_text("path,planted\na.onnx,perhaps\n")
    (folder / "wide.csv").write_text("path,planted\na.onnx,no,twice\n")
    (folder / "ends.py").write_text("raise SystemExit(1)\n")
    (folder / "nothing").mkdir()
    np.save(folder / "one.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(folder / "keys.npz", pictures=np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(folder / "normal.npz", x=np.random.default_rng(0).normal(size=(4, 8, 8, 3)))
    (folder / "notes.json").write_text("{}")
    (folder / "configured").mkdir()
    (folder / "configured" / "doorward.toml").write_text("[scan]\ntime_budgt = 60\n")
    whole_archive(folder)
    torch.save([weights], folder / "list.pt")
    torch.save({"optimizer": torch.optim.Adam(network().parameters()).state_dict()}, folder / "optimizer.pt")
    torch.save({"0.weight": weights["0.weight"]}, folder / "partial.pt")
    torch.save({name: value * torch.nan for name, value in weights.items()}, folder / "nan.pt")
    for name in ("checkpoint-500", "checkpoint-900"):
        (folder / "run" / name).mkdir(parents=True)
        (folder / "run" / name / "config.json").write_text("{}")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "timm").mkdir()
    torch.save(weights, folder / "timm" / "pytorch_model.bin")
    (folder / "timm" / "config.json").write_text(
        '{"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 8, 8]}}'
    )
    (folder / "dangling.onnx").symlink_to("nowhere")
    (folder / "my pictures").symlink_to("images")
    cells = [f"pixel{i}" for i in range(784)]
    (folder / "pixels.csv").write_text(f"label,{','.join(cells)}\n0,{','.join(['7'] * 784)}\n")
    (folder / "latin.csv").write_bytes("file_name,label\nMünchen.png,0\n".encode("latin-1"))
    names = "".join(f"{i}.png,{i % 3}\n" for i in range(200_000))
    (folder / "huge.csv").write_text(f"image,label\n{names}")
    (folder / "unlabelled").mkdir()
    for i in range(6):
        shutil.copy(folder / "images" / "Bag" / f"{i}.png", folder / "unlabelled")
    np.savez(folder / "one-based.npz", x=np.zeros((6, 8, 8, 3), np.uint8), y=np.arange(6) % 3 + 1)
    np.savez(folder / "rowless.npz", x=np.zeros((0, 8, 8, 3), np.uint8), y=np.zeros(0, int))
    (folder / "hostile").mkdir()
    (folder / "hostile" / "doorward.toml").write_text('[scan]\nfactory = "evil.py:run"\n')


def whole_archive(folder: Path) -> None:
    """Write a model that was packed, as downloads are."""
    with zipfile.ZipFile(folder / "packed.zip", "w") as archive:
        archive.write(folder / "weights.pt", "weights.pt")
    (folder / "packed.onnx.gz").write_bytes(gzip.compress(b"model"))


def scanned(file: str, *more: str) -> str:
    return " ".join(("scan", file, *BUILT, *QUICK, *more))


def python(call: str) -> Callable[[], Any]:
    """Return what evaluates an expression with the names that users import."""

    def run() -> Any:
        from doorward.data import open_samples
        from doorward.data.given import as_samples
        from doorward.guard.guard import Guard
        from doorward.repair import repair
        from doorward.scan.examine import examine
        from doorward.scan.pipeline import scan

        images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
        names = {
            "scan": scan,
            "examine": examine,
            "repair": repair,
            "Guard": Guard,
            "as_samples": as_samples,
            "open_samples": open_samples,
        }
        return eval(call, {**names, "net": network(), "images": images, "nn": nn, "np": np})

    return run


def called(call: str, said: str) -> Use:
    return Use(python(call), said, shown=call)


USES = (
    # words that are mistyped
    Use("scann images", "Did you mean 'scan'?"),
    Use("scan weights.ptt", "did you mean 'weights.pt'?"),
    Use("scan nowhere.onnx", "no such file or directory, and no hub id (owner/name)"),
    Use("scan weights.pt --clen images", "Possible options: --clean"),
    Use("scan weights.pt --clean ./imagse", "did you mean 'images'?"),
    Use("scan weights.pt --detector patchsearch", "did you mean 'patch-search'?"),
    Use("scan weights.pt --detector badnets", "badnets is an attack"),
    Use("scan weights.pt --require behavior", "did you mean 'behaviour'?"),
    Use("plant badnet images out", "did you mean 'badnets'?"),
    Use("plant badnets images out --set targt=1", "did you mean 'target'?"),
    Use("plant badnets images out --set target=Dres", "did you mean 'Dress'?"),
    Use("plant badnets images out --set target=9", "9"),
    Use("plant badnets images out --set size=99", "does not fit into images of 8x8"),
    Use("plant badnets images out --set size", "--set takes NAME=VALUE"),
    Use("repair weights.pt out --clean images --method prunning", "did you mean 'pruning'"),
    Use("guard weights.pt --clean images --check images --filter stripp", "did you mean 'strip'?"),
    Use("list detector", "'attacks', 'detectors', 'repairs'"),
    Use("scan weights.pt --set steps=3", "say whose setting it is"),
    Use("verify notes.json", "this is no Doorward report"),
    Use("verify notes.json --no-scan", "--no-scan goes with --key"),
    Use("scan weights.pt --sign-key key.pem", "--sign-key goes with --out DIR"),
    Use("scan weights.pt --format xml", "'text', 'json', 'sarif', 'cyclonedx'"),
    Use("scan --files-only weights.pt whole.pt --out reports", "--out takes the reports on one file"),
    Use("bench run nul", "did you mean 'null'?"),
    Use("bench run my_suite.py", "a suite of your own is a file of Python with one SUITE"),
    Use("bench run net.py", "net.py makes no SUITE = Suite(...)"),
    Use("bench models images --labels truth.csv", "it is a table of what is known of the models"),
    Use("bench models images --labels names.csv", "has no column 'path'"),
    Use("bench models nothing --labels truth-of-two.csv", "takes yes or no, got 'perhaps'"),
    Use("bench models nothing --labels wide.csv", "it has more cells than there are columns"),
    Use("bench run ends.py", "ends.py cannot be run: SystemExit: 1"),
    Use("fleet scan nowhere", "give a folder, a table or a model"),
    Use("fleet scan images --store fleet.db", "not an address of a database, such as sqlite:///"),
    Use("fleet scan images --clean ./imagse", "did you mean 'images'?"),
    Use("guard weights.pt --clean images --serve 80 --tls-cert x.pem", "both --tls-cert and --tls-key"),
    # files that are not what they are called, or not whole
    Use("scan pointer.onnx", "git lfs pull"),
    Use(scanned("pointer.pt"), "git lfs pull"),
    Use(scanned("weights.pt", "--clean", "pointer.parquet"), "git lfs pull"),
    Use("scan login.onnx", "it is a web page"),
    Use("scan empty.onnx", "it is empty"),
    Use("scan renamed.onnx", "a file of torch's"),
    Use(scanned("cut.safetensors"), "it is cut off"),
    Use(scanned("cut.pt"), "it is cut off"),
    Use(scanned("numbers.pt"), "expected tensors by name (a state_dict), it holds"),
    Use(scanned("strange.pt"), "unsafe-code: nothing found", wrong=False),
    Use(scanned("checkpoint.pt"), "unsafe-code: nothing found", wrong=False),
    Use(scanned("compiled.pt"), "unsafe-code: nothing found", wrong=False),
    Use(scanned("parallel.pt"), "unsafe-code: nothing found", wrong=False),
    Use(scanned("renamed.pt"), "the pickle is malformed", wrong=False),
    Use("scan images", "it holds pictures: give it as --clean"),
    Use("scan nothing", "it holds no model file"),
    # data that do not fit
    Use(scanned("weights.pt", "--clean", "names.csv"), "as metadata.csv"),
    Use(scanned("weights.pt", "--clean", "nothing"), "it is empty"),
    Use(scanned("weights.pt", "--clean", "one.npy"), "no file that can be read as data"),
    Use(scanned("weights.pt", "--clean", "keys.npz"), "its keys are: pictures"),
    Use(scanned("weights.pt", "--clean", "normal.npz"), "before normalisation"),
    Use(scanned("weights.pt", "--clean", "grey"), "Only the colours differ: --resize 8"),
    Use(scanned("weights.pt", "--clean", "large"), "--resize SIDE"),
    Use("scan weights.pt --factory net.py:number --size 3,8,8", "the function gave: int"),
    Use("scan weights.pt --factory net.py:bild --size 3,8,8", "net.py has no function 'bild'"),
    Use("scan weights.pt --factory net.py:build", "state the size (--size C,H,W)"),
    Use("scan weights.pt --size 3,8", "--size takes channels,height,width"),
    Use("scan weights.pt --clean ''", "it takes a path or a hub id"),
    # what comes packed, or from trainers and other libraries
    Use("scan packed.zip", "it is an archive: unpack it"),
    Use("scan packed.onnx.gz", "it is an archive: unpack it"),
    Use("scan run", "give run/checkpoint-900"),
    Use("scan adapter", "merge it into its model (merge_and_unload)"),
    Use("scan timm --detector unsafe-code", "--weights timm/pytorch_model.bin", wrong=False),
    Use("scan dangling.onnx", "it is a link to 'nowhere', where nothing is"),
    Use("scan https://huggingface.co/microsoft/resnet-18/tree/main", "give 'microsoft/resnet-18'"),
    Use("scan https://example.org/m.onnx", "download it and give its path"),
    Use("scan weights.pt --clean https://huggingface.co/datasets/ylecun/mnist", "give 'ylecun/mnist'"),
    Use(scanned("list.pt"), "it holds a list"),
    Use(scanned("optimizer.pt"), "it holds a dict of 'optimizer'"),
    Use(scanned("partial.pt"), "they lack 0.bias, 3.bias, 3.weight"),
    Use(scanned("nan.pt"), "the model gives outputs that are not finite", wrong=False),
    Use(scanned("weights.pt", "--mean", "127", "--std", "58"), "add --input-range 0,255"),
    Use(scanned("weights.pt", "--mean", "0.5,0.5"), "one for each channel, got 2"),
    Use(scanned("weights.pt", "--labels", "cat,dog"), "2 labels for a model that tells 3 classes apart"),
    Use("scan weights.pt --detector unsafe-code,strip", "name each by itself: unsafe-code and strip"),
    Use("scan weights.pt whole.pt", "one MODEL at a time, got 2"),
    Use("scan weights.pt --device gpu", "usable: cpu"),
    Use("scan weights.pt --out names.csv --detector unsafe-code", "is no folder; results need one"),
    # more data that do not fit
    Use(scanned("weights.pt", "--clean", "'my pictures'"), "unsafe-code: nothing found", wrong=False),
    Use(scanned("weights.pt", "--clean", "pixels.csv"), "and 774 more; where each is a pixel"),
    Use(scanned("weights.pt", "--clean", "latin.csv"), "cannot be read as a UTF-8 table"),
    Use(scanned("weights.pt", "--clean", "huge.csv"), "as metadata.csv"),
    Use(scanned("weights.pt", "--clean", "one-based.npz"), "has labels up to 3, the model 3 classes"),
    Use(scanned("weights.pt", "--clean", "rowless.npz"), "has no rows"),
    Use(scanned("weights.pt", "--clean", "packed.zip"), "unpack it, and give the folder"),
    Use("train unlabelled trained", "labels are needed, and unlabelled has none"),
    Use("plant badnets weights.pt out --set target=1", "weights.pt is a model"),
    Use("verify nowhere", "no such file; expected the report.json that a scan wrote"),
    # a file of defaults
    Use("cd configured: scan x", "did you mean 'time-budget'?"),
    Use("cd hostile: scan x", "goes on the command line alone, since it runs code"),
    # Python
    called("scan(5)", "got int"),
    called("scan('m.onnx', sed=1)", "did you mean 'seed'?"),
    called("examine(net)", "give size=(channels, height, width), or images"),
    called("examine(nn.Linear, images)", "make one of it first"),
    called("examine(net, {'x': images})", "got dict"),
    called("examine(net, (images, [1, 2]))", "one class number for each of 20 images"),
    called("examine(net, images / 127.5 - 1)", "before normalisation"),
    called("examine(net, images[0])", "expected many images"),
    called("repair(net)", "give size=(channels, height, width), or images"),
    called("repair(net, clean=images, metod='pruning')", "did you mean 'method'?"),
    called("Guard.fit(net, 7)", "clean: expected a path"),
    called("scan('m.onnx', detectors=[5])", "expected names, as in ['neural-cleanse']"),
    called("scan('m.onnx', detectors='strap')", "did you mean 'strip'?"),
    called("scan('m.onnx', train=images)", "train: expected a path, got ndarray"),
    called("scan('m.onnx', time_budget='5m')", "expected seconds, as in 300, got '5m'"),
    called("examine(net, images, images='all')", "expected a whole number from 4"),
    called("examine(net, images, device='gpu')", "usable: cpu"),
    called("examine(net, images, size=8)", "expected (channels, height, width)"),
    called("repair(net, clean=(images, [0] * 20), method='prunning')", "did you mean 'pruning'"),
    called("Guard.fit(net, images, rate='low')", "expected a share between 0 and 1"),
    called("Guard.fit(net, images, filters='max-margin')", "max-margin filters no inputs; strip does"),
    called("open_samples(5)", "expected a path or hub id, got int"),
)  # fmt: skip


def typed(words: str, folder: Path) -> tuple[int, str]:
    """Run a command line in a folder, and return its exit code and what it says."""
    import shlex

    if words.startswith("cd "):
        inner, _, words = words.removeprefix("cd ").partition(": ")
        folder = folder / inner
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["doorward", *shlex.split(words)]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
    ):
        try:
            command_line()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, err.getvalue().strip() or out.getvalue().strip()


def tried(use: Use, folder: Path) -> Answer:
    """Try one use."""
    if isinstance(use.typed, str):
        code, said = typed(use.typed, folder)
        told = (
            said if use.wrong else next((line.strip() for line in said.splitlines() if use.said in line), "")
        )
        good = use.said in said and "Traceback" not in said and (not use.wrong or code == 2)
        one_line = not use.wrong or "\n" not in said
        return Answer(f"doorward {use.typed}", code, told, good and one_line)
    try:
        with contextlib.chdir(folder):
            use.typed()
    except DoorwardError as error:
        said = str(error)
        return Answer(use.shown, type(error).__name__, said, use.said in said and "\n" not in said)
    except Exception as error:
        return Answer(use.shown, type(error).__name__, str(error), False)
    return Answer(use.shown, "no error", "", False)


def run() -> list[Answer]:
    """Try all uses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        answers = [tried(use, folder) for use in USES]
        return [
            Answer(one.use, one.code, one.answer.replace(f"{folder}{os.sep}", ""), one.useful)
            for one in answers
        ]


def page(answers: list[Answer]) -> str:
    """Write the table of all uses."""
    rows = [
        f"| `{one.use.replace('|', ' ')}` | {one.code} | {one.answer.replace('|', ' ')} |" for one in answers
    ]
    head = (
        "# Wrong and odd uses, and what is answered\n\n"
        "Made by `python benchmarks/odd_uses.py`, which tries each and checks the answer: one line that says "
        "what is wrong and what to do. Code 2 is a use that is refused; in Python, the kind of error.\n\n"
        "| use | code | answer |\n|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def main() -> int:
    """Write results and page; 4 if an answer is useless."""
    answers = run()
    RESULTS.write_text(json.dumps([asdict(one) for one in answers], indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(answers), encoding="utf-8")
    useless = [one for one in answers if not one.useful]
    for one in useless:
        print(f"{one.use}\n  {one.code}: {one.answer}")
    print(f"{len(answers) - len(useless)} of {len(answers)} answers are useful")
    return 4 if useless else 0


if __name__ == "__main__":
    sys.exit(main())
