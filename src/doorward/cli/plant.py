"""`doorward plant`: poison a data set, or change a model, on purpose."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from doorward.cli.options import ATTACKS, INPUT_COLUMN, LABEL_COLUMN, SEED, check_folder, status
from doorward.cli.settings import names_classes, settings_of, with_class_numbers
from doorward.core import formatting
from doorward.core.errors import DoorwardError, InputError

if TYPE_CHECKING:
    from doorward.attacks.data.base import DataAttack
    from doorward.attacks.model._fine_tuned import FineTunedAttack
    from doorward.attacks.model.base import ModelAttack
    from doorward.data import Samples

PLANT = "plant.json"
#: Asks for every attack.
ALL = "all"
#: What names of folders begin with into which results are written before they take their place.
UNFINISHED = ".doorward-"


def plant(
    attack: str = typer.Argument(
        ...,
        metavar="ATTACK",
        autocompletion=ATTACKS,
        help="Name of the attack; `doorward list attacks` shows them. Or all.",
    ),
    source: str = typer.Argument(
        ...,
        metavar="SOURCE",
        help="Labelled training images, texts or recordings (a folder, a file or a hub id; SOURCE:SPLIT "
        "picks a split), or the model, where the attack changes one.",
    ),
    out: Path = typer.Argument(
        ..., metavar="OUT", help="The folder to write train.parquet or the model to, and plant.json."
    ),
    set_: list[str] = typer.Option(
        [],
        "--set",
        metavar="K=V",
        help="A setting of the attack, as in poison_rate=0.02 or target=Dress; may be repeated. "
        "`doorward plant ATTACK --help` shows them.",
    ),
    data: str | None = typer.Option(
        None,
        metavar="DATA",
        help="With a model: clean images to train on, where the attack does, and to measure what it did.",
    ),
    seed: int = SEED,
    split: str | None = typer.Option(None, metavar="NAME", help="The split of the data; train if not given."),
    data_column: str | None = INPUT_COLUMN,
    label_column: str | None = LABEL_COLUMN,
    force: bool = typer.Option(
        False, "--force", help="Write to OUT even if it holds something; replace what is ours."
    ),
) -> None:
    """Poison a data set, or change a model, on purpose.

    With `all` as ATTACK every attack that fits SOURCE is planted, each in a folder of its own below OUT, and
    scanned; a table says what the scans find. That takes some minutes for each.

    Most attacks take training data, put a trigger on some samples and change their labels; others take a
    trained model and change that. Where SOURCE is a model and --data gives images of its classes, an attack
    of the first kind teaches the model its trigger by a short fine-tune, and its other answers stay. The
    truth of the plant (trigger, targets, ids of the poisoned samples) goes to plant.json.

    Exit code: 0, or 2 for unreadable input.
    """
    from doorward.data.sources import open_samples, refuse_missing
    from doorward.methods import registry

    settings = settings_of(set_)
    if attack != ALL:
        registry.refuse_unknown("attack", [attack])
    elif settings:
        raise InputError(f"--set goes with one attack; {ALL} plants each as it is by default")
    for path in (source, data):
        if path is not None:
            refuse_missing(path)
    images = partial(open_samples, column=data_column, label_column=label_column)
    if attack == ALL:
        check_out(out, force=force, inputs=[source] if data is None else [source, data])
        _plant_all(source, out, data, seed=seed, split=split, force=force, images=images)
    else:
        _plant(attack, settings, source, out, data, seed=seed, split=split, force=force, images=images)


def _plant(
    attack: str,
    settings: dict[str, Any],
    source: str,
    out: Path,
    data: str | None,
    *,
    seed: int,
    split: str | None,
    force: bool,
    images: Callable[..., Samples],
) -> Path:
    """Plant one attack, say so, and return the poisoned data or the model."""
    from doorward.attacks.data.base import DataAttack
    from doorward.attacks.model.base import ModelAttack
    from doorward.methods import registry

    if names_classes(settings):
        settings = with_class_numbers(settings, _classes(source, data, split, images))
    method = registry.build("attack", attack, settings)
    if not isinstance(method, ModelAttack) and data is not None and _is_model(Path(source)):
        from doorward.attacks.model._fine_tuned import FineTunedAttack

        method = FineTunedAttack(method)
    if not isinstance(method, DataAttack):
        _check_model(method, source, data)
        check_out(out, force=force, inputs=[source] if data is None else [source, data])
        return _implant(method, source, out, data, seed=seed, split=split, images=images)
    if data is not None:
        raise InputError(f"{attack} poisons SOURCE itself; --data goes with a SOURCE that is a model")
    if _is_model(Path(source)):
        raise InputError(
            f"{attack} poisons training data, and {source} is a model: give labelled data, or images for "
            "the model to be taught on with --data DATA"
        )
    check_out(out, force=force, inputs=[source])
    return _poison(method, images(source, split=split, prefer=("train",)), out, seed=seed)


def _plant_all(source: str, out: Path, data: str | None, **how: Any) -> None:
    """Plant every attack, each in a folder of its own, scan what comes of it, and print a table."""
    from doorward.attacks.ground_truth import read_plant
    from doorward.methods import registry
    from doorward.reports.phrases import TITLES
    from doorward.scan.pipeline import scan_in_full
    from doorward.scan.request import ScanRequest

    rows = []
    for name in registry.modules("attack"):
        try:
            file = _plant(name, {}, source, out / name, data, **how)
            truth = read_plant(out / name / PLANT)
            poisoned = file.name == "train.parquet"
            request = ScanRequest(
                model=None if poisoned else str(file),
                train=str(file.parent) if poisoned else None,
                clean=data,
                seed=how["seed"],
            )
            with status() as progress:
                report = scan_in_full(request, progress=progress).report
        except DoorwardError as error:
            rows.append((name, "", "", str(error).removeprefix(f"{name}: ")))
            continue
        success = formatting.percent(truth.attack_success.value) if truth.attack_success else ""
        named = {*report.targets} & {*truth.targets}
        classes = "the planted class" if named else "another class" if report.targets else ""
        rows.append((name, success, TITLES[report.verdict].lower(), classes))
    if not any(verdict for _, _, verdict, _ in rows):
        raise InputError(f"no attack could be planted; {rows[0][0]}: {rows[0][3]}")
    typer.echo()
    for row in (("attack", "success", "the scan says", "it names"), *rows):
        typer.echo(
            "  ".join(cell.ljust(width) for cell, width in zip(row, (16, 8, 14, 0), strict=True)).rstrip()
        )


def _classes(source: str, data: str | None, split: str | None, images: Callable[..., Samples]) -> list[str]:
    """Return the class names of what is planted in: of the model, or of the data."""
    if _is_model(Path(source)):
        from doorward.models import open_classifier

        names = open_classifier(source).classes
        if data is None or names != tuple(map(str, range(len(names)))):
            return list(names)
    return list(images(data or source, split=split, prefer=("train",)).classes)


def _poison(method: DataAttack, samples: Samples, out: Path, *, seed: int) -> Path:
    from doorward.attacks.ground_truth import write_plant
    from doorward.data.parquet import write_parquet

    with status() as progress:
        progress("reading")
        poisoned = method(samples, seed=seed)
        truth = poisoned.plant  # reads every sample, so that nothing is written where one is damaged
        progress("writing")
        with replacing(out, [out / "train.parquet"]) as made:
            file = out / write_parquet(poisoned.samples, made, split="train").name
            write_plant(truth, made / PLANT)
    share = formatting.percent(truth.poison_rate or 0.0)
    what = f"{len(truth.poisoned_ids):,} of {len(poisoned.samples):,} samples ({share})"
    carry = f"carry the trigger and a label of {formatting.with_noun(truth.targets, samples.classes)}"
    done = carry if truth.trigger else "are poisoned; there is no trigger"
    typer.echo(f"planted {method.method()}: {what} {done}")
    if truth.cover_ids:
        typer.echo(f"{len(truth.cover_ids):,} more are changed too and keep their label")
    typer.echo(f"written: {file} and {out / PLANT}")
    return file


def _implant(
    method: ModelAttack | FineTunedAttack,
    source: str,
    out: Path,
    data: str | None,
    *,
    seed: int,
    split: str | None,
    images: Callable[..., Samples],
) -> Path:
    from doorward.attacks.ground_truth import attack_success, write_plant
    from doorward.models import open_classifier
    from doorward.models.formats.saving import save_classifier, saved_files
    from doorward.training import evaluate

    samples = tests = None
    if data is not None:
        samples = images(data, split=split, prefer=("train",))
        tests = _tests(data, samples, images, trained=method.trains)
    classifier = open_classifier(source)
    with status() as progress:
        progress("planting")
        planted = method(classifier, samples, seed=seed)
        truth = planted.plant
        progress("measuring")
        before, why = None, "give --data DATA with labels"
        if tests is not None:
            before = evaluate(classifier, tests)
            accuracy = evaluate(planted.classifier, tests)
            truth = truth.model_copy(update={"clean_accuracy": accuracy})
            try:
                success = attack_success(planted.classifier, tests, truth)
                truth = truth.model_copy(update={"attack_success": success})
            except InputError as error:
                why = str(error)  # images that the model's own processor resizes
        progress("writing")
        with replacing(out, saved_files(out)) as made:
            file = out / save_classifier(planted.classifier, made).relative_to(made)
            write_plant(truth, made / PLANT)
    wanted = formatting.with_noun(truth.targets, classifier.classes)
    typer.echo(f"planted {method.method()}: the trigger turns images of other classes into {wanted}")
    if before is not None and truth.clean_accuracy is not None:
        typer.echo(
            f"clean accuracy {formatting.rate(truth.clean_accuracy)}, before: {formatting.rate(before)}"
        )
    if truth.attack_success is None:
        typer.echo(f"attack success not measured: {why}")
    else:
        typer.echo(f"attack success {formatting.rate(truth.attack_success)}")
    typer.echo(f"written: {file} and {out / PLANT}")
    return file


@contextmanager
def replacing(out: Path, earlier: list[Path]) -> Iterator[Path]:
    """Give a folder to write results to; at the end they go to `out`, in place of those of an earlier run.

    Where writing fails, `out` is as it was. What an earlier run left that was killed is removed.

    Args:
        earlier: files of ours that may lie in `out`; any plant goes too.

    Raises:
        InputError: if something cannot be written.
    """
    near = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    made: Path | None = None
    try:
        _remove_leftovers(near)
        made = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{os.getpid()}-", dir=near))
        yield made
        out.mkdir(parents=True, exist_ok=True)
        for old in (*earlier, *out.glob("plant.*")):
            old.unlink(missing_ok=True)
        for file in sorted(made.iterdir()):
            file.replace(out / file.name)
    except OSError as error:
        raise InputError(f"{out}: cannot write the result: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(str(error).replace(str(made), str(out))) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished results in a folder whose process has ended, as far as that can be told."""
    if os.name != "posix":  # elsewhere there is no asking whether a process runs that does not end it
        return
    for left in folder.glob(f"{UNFINISHED}*-*"):
        number = left.name.removeprefix(UNFINISHED).partition("-")[0]
        if not number.isdecimal():
            continue
        try:
            os.kill(int(number), 0)
        except (ProcessLookupError, OverflowError):
            shutil.rmtree(left, ignore_errors=True)
        except OSError:  # it runs, and is somebody else's
            continue


def _check_model(method: ModelAttack | FineTunedAttack, source: str, data: str | None) -> None:
    """Raise unless a source is a model and data are given where they are needed.

    Raises:
        InputError: saying what is missing.
    """
    from doorward.models.formats.loading import detect_format, locate

    try:
        detect_format(locate(source))
    except InputError as error:
        raise InputError(f"{method.method()} changes a trained model, and here is none: {error}") from error
    if method.trains and data is None:
        raise InputError(
            f"{method.method()} trains the model: give labelled training images with --data DATA"
        )


def _is_model(path: Path) -> bool:
    """Return whether a model lies at a path, so that it is not taken for data."""
    from doorward.models.formats.loading import detect_format

    try:
        detect_format(path)
    except (InputError, OSError):
        return False
    return path.is_file() or any(_is_model(file) for file in path.iterdir() if file.is_file())


def _tests(data: str, samples: Samples, images: Callable[..., Samples], *, trained: bool) -> Samples | None:
    """Return labelled samples to measure a model on, not those that it was trained on; None without any."""
    if samples.labels is None:
        return None
    try:
        return images(data, split="test", classes=samples.classes)
    except InputError:
        return None if trained else samples


def check_out(out: Path, *, force: bool, inputs: list[str]) -> None:
    """Refuse a place for results that is no folder, or can be none, holds something, or is what is read.

    Args:
        force: whether it may hold something.

    Raises:
        InputError: saying which.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; a folder is needed")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out} is not empty; choose another folder, or give --force")
    for given in inputs:
        for path in (Path(given), Path(given.rpartition(":")[0] or given)):
            if path.exists() and out.resolve() in (path.resolve(), path.resolve().parent):
                raise InputError(f"{out} is where {given} is read from; choose another folder")
    check_folder(out, given="OUT")
