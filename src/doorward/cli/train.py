"""`doorward train`: train a small classifier, and measure what a plant in its data did to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from doorward.cli.options import DEVICE, FORCE, INPUT_COLUMN, LABEL_COLUMN, SEED, check_device
from doorward.cli.plant import PLANT, check_out
from doorward.core import formatting
from doorward.core.errors import InputError, TrainingDiverged

if TYPE_CHECKING:
    from doorward.data import Samples
    from doorward.training import AdversarialSettings, TrainingProgress

#: Test images that robust accuracy is measured on, at most; each is attacked by 20 steps or more.
ROBUST_IMAGES = 500


class ModelFormat(StrEnum):
    """Formats of model files."""

    doorward = "doorward"
    onnx = "onnx"
    pt2 = "pt2"


class Norm(StrEnum):
    """How the distance of an attacked image from the original is measured."""

    linf = "linf"
    l2 = "l2"


def train(
    data: str = typer.Argument(
        ...,
        metavar="DATA",
        help="Labelled training images, texts or recordings: a folder, a file or a hub id; DATA:SPLIT picks "
        "a split.",
    ),
    out: Path = typer.Argument(
        ..., metavar="OUT", help="The folder to write the model and training.json to."
    ),
    architecture: str | None = typer.Option(
        None,
        metavar="NAME",
        help="For images small-cnn (the default below 32 pixels), vgg, resnet-8 (the default from there on), "
        "resnet-14 or resnet-18; for texts text-cnn; for recordings audio-cnn.",
    ),
    epochs: int | None = typer.Option(
        None, min=1, metavar="N", help="How often each sample is seen; by their number."
    ),
    limit: int | None = typer.Option(
        None, min=1, metavar="N", help="Train on so many samples, evenly over the classes."
    ),
    seed: int = SEED,
    test: str | None = typer.Option(
        None, metavar="DATA", help="Labelled test samples; the test split of DATA where there is one."
    ),
    robust: bool = typer.Option(
        False, "--robust", help="Train on images as attacked by PGD, and measure robust accuracy too."
    ),
    norm: Norm | None = typer.Option(
        None, metavar="linf|l2", help="With --robust: how the attack's reach is measured; linf if not given."
    ),
    eps: float | None = typer.Option(
        None,
        min=0,
        metavar="R",
        help="With --robust: the attack's reach in pixel values from 0 to 1; 8/255 for linf, 0.5 for l2.",
    ),
    steps: int | None = typer.Option(
        None,
        min=1,
        metavar="N",
        help="With --robust: steps of the attack on each batch, 7 if not given; 1 is the fast variant.",
    ),
    device: str = DEVICE,
    formats: list[ModelFormat] = typer.Option(
        [ModelFormat.doorward],
        "--format",
        metavar="doorward|onnx|pt2",
        help="Write the model in this format too; may be repeated.",
    ),
    data_column: str | None = INPUT_COLUMN,
    label_column: str | None = LABEL_COLUMN,
    force: bool = FORCE,
) -> None:
    """Train a classifier and measure it.

    The model is always written as a Doorward directory. Where DATA holds the plant.json of `doorward plant`,
    it is completed with clean accuracy and attack success and written next to the model.

    Exit code: 0, 2 for unreadable input, 4 if training failed.
    """
    import numpy as np

    from doorward._version import __version__
    from doorward.attacks.ground_truth import attack_success, read_plant, write_plant
    from doorward.core.seeds import derive_seed
    from doorward.data import open_samples
    from doorward.models import networks
    from doorward.models.encode.dispatch import NOUNS
    from doorward.models.formats.export import export_onnx, export_pt2
    from doorward.models.formats.native import save_native
    from doorward.training import (
        adversarial_batches,
        default_settings,
        measure_spec,
        robust_accuracy,
        train_classifier,
    )

    attack = _attack(robust, norm, eps, steps)
    check_out(out, force=force, inputs=[data])
    check_device(device)
    samples = open_samples(data, column=data_column, label_column=label_column, prefer=("train",))
    if samples.labels is None:
        raise InputError(f"labels are needed, and {data} has none")
    if architecture is not None:
        networks.check(architecture, samples.modality)
    _refuse_for_images_alone(samples, robust=robust, formats=formats)
    tests = _test_samples(data, test, data_column, label_column, samples)
    truth = _plant_file(data)
    plant = read_plant(truth) if truth else None
    if limit is not None:
        samples = samples.draw(limit, np.random.default_rng(derive_seed(seed, "limit")))
    spec = measure_spec(samples)
    architecture = architecture or networks.usual(spec)
    settings = default_settings(architecture, images=len(samples), side=min(spec.height, spec.width))
    if epochs is not None:
        settings = settings.model_copy(update={"epochs": epochs})
    try:
        with _bar() as progress:
            trained = train_classifier(
                architecture,
                samples,
                seed=seed,
                spec=spec,
                settings=settings,
                device=device,
                test=tests,
                progress=progress,
                on_batch=None if attack is None else adversarial_batches(attack),
            )
    except TrainingDiverged as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(4) from error
    classifier, record = trained.classifier, trained.record
    seen = f"{record.images:,} {NOUNS[samples.modality]}, {settings.epochs} epochs"
    typer.echo(
        f"trained {architecture} on {seen} in {formatting.duration(record.seconds)} ({record.precision})"
    )
    if record.test_accuracy is None:
        typer.echo("clean accuracy not measured: give --test DATA")
    else:
        typer.echo(f"clean accuracy {formatting.rate(record.test_accuracy)}")
    robustness = None
    if attack is not None and tests is not None:
        drawn = tests.draw(ROBUST_IMAGES, np.random.default_rng(derive_seed(seed, "attacked images")))
        held = robust_accuracy(classifier, drawn, settings=attack.stronger(), seed=seed)
        typer.echo(f"robust accuracy {formatting.rate(held)}, attacked by {attack.stronger().describe()}")
        robustness = {
            "attack": attack.stronger().model_dump(mode="json"),
            "accuracy": held.model_dump(mode="json"),
        }
    if plant is not None and tests is not None:
        success = None if plant.trigger is None else attack_success(classifier, tests, plant)
        plant = plant.model_copy(update={"clean_accuracy": record.test_accuracy, "attack_success": success})
        if success is not None:
            typer.echo(f"attack success {formatting.rate(success)}")
    story = {
        "architecture": architecture,
        "seed": seed,
        "data": {"path": data, "sha256": samples.provenance.sha256, "limit": limit},
        "test": None if tests is None else {"path": test or data, "sha256": tests.provenance.sha256},
        "training": record.model_dump(mode="json"),
        "adversarial": None if attack is None else attack.model_dump(mode="json"),
        "robustness": robustness,
        "versions": {"doorward": __version__} | _versions(),
    }
    save_native(
        classifier.module, architecture=architecture, spec=spec, classes=samples.classes, directory=out
    )
    (out / "training.json").write_text(json.dumps(story, indent=2) + "\n", encoding="utf-8")
    if plant is not None:
        write_plant(plant, out / PLANT)
    if ModelFormat.onnx in formats:
        export_onnx(classifier, out / "model.onnx")
    if ModelFormat.pt2 in formats:
        export_pt2(classifier, out / "model.pt2")
    typer.echo(f"written: {out} ({', '.join(sorted(file.name for file in out.iterdir()))})")


def _refuse_for_images_alone(samples: Samples, *, robust: bool, formats: list[ModelFormat]) -> None:
    """Raise if something is asked for that models of texts and recordings do not have.

    Raises:
        InputError: naming the option.
    """
    if samples.modality == "image":
        return
    problem = ["--robust"] if robust else [f"--format {each}" for each in formats if each != "doorward"]
    if problem:
        raise InputError(
            f"{problem[0]} is for images, and {samples.provenance.path} holds {samples.modality}"
        )


def _attack(
    robust: bool, norm: Norm | None, eps: float | None, steps: int | None
) -> AdversarialSettings | None:
    """Return the attack to train against, None for ordinary training.

    Raises:
        InputError: if options are given that mean nothing, or not together.
    """
    from pydantic import ValidationError

    from doorward.models.formats.input_options import describe_validation
    from doorward.training import AdversarialSettings
    from doorward.training.adversarial import USUAL_EPS

    if not robust:
        options = {"--norm": norm, "--eps": eps, "--steps": steps}
        if surplus := [name for name, value in options.items() if value is not None]:
            raise InputError(f"{surplus[0]} goes with --robust, which trains against an attack")
        return None
    kind = norm.value if norm else "linf"
    settings = {"norm": kind, "eps": USUAL_EPS[kind] if eps is None else eps}
    if steps is not None:
        settings |= {"variant": "fast" if steps == 1 else "pgd", "steps": steps}
    try:
        return AdversarialSettings.model_validate(settings)
    except ValidationError as error:
        raise InputError(f"--eps: {describe_validation(error).removeprefix('eps: ')}") from error


def _test_samples(
    data: str, test: str | None, column: str | None, label_column: str | None, samples: Samples
) -> Samples | None:
    """Open the test images with the classes of the training images; None where there are none."""
    from doorward.data import open_samples

    if test is not None:
        return open_samples(test, column=column, label_column=label_column, classes=samples.classes)
    try:
        return open_samples(
            data, column=column, label_column=label_column, split="test", classes=samples.classes
        )
    except InputError:
        return None  # not asked for, so not missed


def _plant_file(data: str) -> Path | None:
    """Return the plant.json next to the training data, where there is one."""
    path = Path(data if Path(data).exists() else data.rpartition(":")[0] or data)
    file = (path if path.is_dir() else path.parent) / PLANT
    return file if file.is_file() else None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "numpy")}


@contextmanager
def _bar() -> Iterator[Callable[[TrainingProgress], None] | None]:
    """Show a progress bar on standard error; silent when that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Bar(console=console, transient=True) as bar:
        task = bar.add_task("training", total=None)

        def show(now: TrainingProgress) -> None:
            loss = "" if now.loss is None else f", loss {now.loss:.3f}"
            text = f"epoch {now.epoch + 1} of {now.epochs}{loss}"
            bar.update(task, description=text, total=now.steps, completed=now.step)

        yield show
