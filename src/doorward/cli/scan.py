"""`doorward scan`: give a model, get a verdict with evidence."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from doorward.cli import model_options
from doorward.cli.files import check_files
from doorward.cli.options import (
    DETECTORS,
    DEVICE,
    IMAGE_COLUMN,
    IMAGES,
    LABEL_COLUMN,
    SEED,
    FailOn,
    Format,
    check_device,
    check_folder,
    check_format,
    current_folder,
    own_code,
    refuse_missing_inputs,
    show,
    status,
    written,
)

if TYPE_CHECKING:
    from doorward.core.records import Report
    from doorward.scan.training_data import Inspection


def scan(
    model: list[str] = typer.Argument(
        None,
        metavar="MODEL",
        help="A Hugging Face model directory or hub id, an .onnx file, a torch.export .pt2 file, a "
        "Keras .keras or .h5 file, a .tflite file, or a Doorward directory. With --factory: the weights, or "
        "any name if --weights gives them. With --files-only: any number of files and folders. Without one, "
        "--train trains a model to inspect the data with.",
    ),
    clean: str | None = typer.Option(
        None,
        metavar="DATA",
        help="Images that you trust, best with labels: a folder, a file or a hub id; DATA:SPLIT picks a "
        "split.",
    ),
    train: str | None = typer.Option(
        None,
        metavar="DATA",
        help="The training set, with labels, read like --clean: images, texts or recordings. It is inspected "
        "for poison; its images serve where no clean ones are given.",
    ),
    write_clean: Path | None = typer.Option(
        None,
        metavar="OUT",
        help="With --train: write the training set there, in its own form, without the flagged samples.",
    ),
    keep_model: Path | None = typer.Option(
        None, metavar="OUT", help="With --train and no MODEL: write the model that is trained there."
    ),
    detector: list[str] = typer.Option(
        [],
        metavar="NAME",
        autocompletion=DETECTORS,
        help="Run this detector only; may be repeated. `doorward list detectors` shows them.",
    ),
    set_: list[str] = typer.Option(
        [],
        "--set",
        metavar="K=V",
        help="A setting of the detector that --detector names, as in steps=200; with several, DETECTOR.K=V. "
        "May be repeated. What affects the score makes it uncalibrated. `doorward scan --detector NAME "
        "--help` shows them.",
    ),
    out: Path | None = typer.Option(
        None, metavar="DIR", help="Write report.html, report.json, report.sarif and report.txt there."
    ),
    sign_key: Path | None = typer.Option(
        None,
        metavar="KEY",
        help="With --out: sign report.json with this private key, to report.json.sig; `doorward verify "
        "--key` checks it.",
    ),
    format: Format = typer.Option(
        Format.text,
        metavar="text|json|sarif|cyclonedx",
        help="What to print on standard output; cyclonedx is an ML-BOM.",
    ),
    files_only: bool = typer.Option(
        False,
        "--files-only",
        help="Only check what loading the files would run: in a second, without loading anything. Exit code: "
        "0 nothing, 1 unsafe, 2 unreadable, 3 could not tell.",
    ),
    strict_files: bool = typer.Option(
        False,
        "--strict-files",
        help="Files that loading the model never opens count as well if they would run code when opened.",
    ),
    require: list[str] = typer.Option(
        [],
        metavar="DETECTOR|behaviour",
        autocompletion=DETECTORS,
        help="End with exit code 3 unless this detector, or any that examines behaviour, had a part in the "
        "verdict; may be repeated.",
    ),
    fail_on: FailOn = typer.Option(
        FailOn.suspicious,
        metavar="suspicious|backdoored|never",
        help="From which verdict on the exit code is 1; with never it is 0 for every verdict.",
    ),
    seed: int = SEED,
    device: str = DEVICE,
    time_budget: float = typer.Option(900, min=1, metavar="S", help="Seconds that the scan may take."),
    memory: float | None = typer.Option(
        None,
        min=0.25,
        metavar="GIB",
        help="GiB of memory that the scan may take beyond the model; half of what is free if not given, and "
        "at most 4.",
    ),
    images: int = IMAGES,
    control: bool = typer.Option(
        False,
        "--control",
        help="If nothing is found, plant known triggers in copies of the model and scan those: which of them "
        "would have been found? Takes about four times as long.",
    ),
    factory: str | None = model_options.FACTORY,
    weights: Path | None = model_options.WEIGHTS,
    input_range: str | None = model_options.INPUT_RANGE,
    mean: str | None = model_options.MEAN,
    std: str | None = model_options.STD,
    layout: str | None = model_options.LAYOUT,
    channels: str | None = model_options.CHANNELS,
    size: str | None = model_options.SIZE,
    resize: str | None = model_options.RESIZE,
    output: str | None = model_options.OUTPUT,
    label_names: str | None = model_options.LABEL_NAMES,
    features: str | None = model_options.FEATURES,
    data_column: str | None = IMAGE_COLUMN,
    label_column: str | None = LABEL_COLUMN,
    skip_unreadable: int = typer.Option(
        0,
        min=0,
        metavar="N",
        help="Leave out up to so many samples that cannot be read, and say so; without it the first ends the "
        "scan.",
    ),
) -> None:
    """Look for a backdoor in a model, and for poison in training data.

    Exit code: 0 nothing found, 1 found or unsafe to load, 2 usage or unreadable input, 3 could not tell,
    4 a fault in Doorward.
    """
    from doorward import reports
    from doorward.core.errors import InputError
    from doorward.methods.registry import refuse_unknown
    from doorward.reports import signing

    model = model or []
    for name, value in (*(("MODEL", one) for one in model), ("--clean", clean), ("--train", train)):
        if value == "":  # as of a variable that a script forgot to set
            raise InputError(f"{name} is empty; it takes a path or a hub id")
    check_format(format)
    if sign_key is not None and (out is None or files_only):
        raise InputError("--sign-key goes with --out DIR and a whole scan: it signs the report there")
    if files_only and not model:
        raise InputError("--files-only checks the files of a model: name one")
    if files_only:
        raise typer.Exit(check_files(model, format, strict=strict_files, fail_on=fail_on, out=out))
    if len(model) > 1:
        raise InputError(f"one MODEL at a time, got {len(model)}; with --files-only there may be several")
    check_required(require)
    refuse_unknown("detector", detector)
    named = detector_settings(set_, detector)
    model_options.refuse_weights_alone(weights, factory)
    stated = model_options.stated_options(
        input_range=input_range, mean=mean, std=std, layout=layout, channels=channels, size=size,
        resize=resize, output=output, label_names=label_names, features=features,
    )  # fmt: skip
    for what, limit in (("--time-budget takes seconds", time_budget), ("--memory takes GiB", memory)):
        if limit is not None and not math.isfinite(limit):
            raise InputError(f"{what}, got {limit}")
    if not model and train is None:
        raise InputError(
            "give a MODEL to scan, or training data with --train DATA, or both; see doorward scan --help"
        )
    if write_clean is not None and train is None:
        raise InputError("--write-clean goes with --train DATA, the data to be cleaned")
    if keep_model is not None and (model or train is None):
        raise InputError(
            "--keep-model goes with --train DATA and no MODEL: the model trained on the data is kept"
        )
    if factory is not None and not model:
        raise InputError(
            "--factory builds the network of a MODEL: name its weights, or anything with --weights"
        )
    by = None if sign_key is None else signing.signer(sign_key)
    for folder, given in ((out, "--out"), (write_clean, "--write-clean"), (keep_model, "--keep-model")):
        if folder is not None:
            check_folder(folder, given=given)
    if write_clean is not None and write_clean.is_dir() and any(write_clean.iterdir()):
        raise InputError(f"--write-clean {write_clean}: the folder is not empty; name another")
    refuse_missing_inputs(None if factory or not model else model[0], clean, train)
    from doorward.models import LoadOptions
    from doorward.scan.pipeline import scan_in_full as run
    from doorward.scan.request import ScanRequest

    request = ScanRequest(
        model=model[0] if model else None,
        strict_files=strict_files,
        clean=clean,
        train=train,
        detectors=tuple(detector),
        settings=named,
        seed=seed,
        device=check_device(device),
        time_budget=time_budget,
        memory=memory,
        images=images,
        control=control,
        factory=factory,
        weights=str(weights) if weights else None,
        data_column=data_column,
        label_column=label_column,
        folder=current_folder(),
        skip_unreadable=skip_unreadable,
        keep_model=str(keep_model) if keep_model else None,
        options=LoadOptions(**stated),
    )
    with own_code(factory), status() as progress:
        scanned = run(request, progress=progress)
    report = scanned.report
    try:
        _print(report, format, fail_on)
    finally:
        if out is not None:
            files = reports.write_reports(report, out, fail_on=fail_on.value)
            files |= reports.write_flagged(report, out)
            if by is not None:
                files["signature"] = signing.sign(files["json"], by)
            else:  # that of an earlier report is none of this one's
                signing.signature_of(files["json"]).unlink(missing_ok=True)
            names = ", ".join(sorted(file.name for file in files.values()))
            typer.echo(f"written: {out} ({names})", err=True)
    if write_clean is not None and train is not None and scanned.inspection is not None:
        if scanned.inspection.verdict == "could_not_tell":
            typer.echo(f"not written: {write_clean}: nothing is known about the data yet", err=True)
        else:
            _write_clean(scanned.inspection, train, write_clean, data_column, label_column)
    code = reports.exit_code(report.verdict, fail_on.value)
    if code != 1 and (missing := reports.not_covered(report, require)):
        typer.echo(f"required and not run to its end: {', '.join(missing)}", err=True)
        code = 3
    raise typer.Exit(code)


def _write_clean(
    inspection: Inspection, train: str, out: Path, column: str | None, label_column: str | None
) -> None:
    """Write the training set without the samples that are flagged."""
    import numpy as np

    from doorward.data.kept import write_kept

    samples = inspection.samples
    kept = np.array(
        [row for row, one in enumerate(samples.ids) if one not in inspection.flagged], dtype=np.int64
    )
    write_kept(samples, kept, train, out, column=column, label_column=label_column)
    gone = len(samples) - len(kept)
    typer.echo(f"written: {out} ({len(kept):,} samples; {gone:,} flagged ones left out)", err=True)


def detector_settings(pairs: list[str], detectors: list[str]) -> tuple[str, ...]:
    """Return settings as DETECTOR.NAME=VALUE.

    Raises:
        InputError: if it cannot be told which detector one belongs to.
    """
    from doorward.core.errors import InputError

    whole = []
    for pair in pairs:
        name = pair.partition("=")[0]
        if "=" not in pair or not name:
            raise InputError(f"--set takes NAME=VALUE, as in steps=200, got {pair!r}")
        if "." in name:
            if name.rpartition(".")[0] not in detectors:
                raise InputError(f"--set {pair}: name that detector with --detector as well")
            whole.append(pair)
        elif len(detectors) == 1:
            whole.append(f"{detectors[0]}.{pair}")
        else:
            raise InputError(
                f"--set {pair}: with {len(detectors) or 'no'} --detector, say whose setting it is: "
                f"--detector NAME --set NAME.{pair}"
            )
    return tuple(whole)


def check_required(names: list[str]) -> None:
    """Refuse names for --require that no detector has.

    Raises:
        InputError: if there is one.
    """
    from doorward.core.errors import InputError
    from doorward.core.formatting import did_you_mean
    from doorward.methods import registry

    known = registry.modules("detector")
    if unknown := [name for name in names if name not in known and name != "behaviour"]:
        near = did_you_mean(unknown[0], [*known, "behaviour"])
        listed = f"; there are: behaviour, {', '.join(known)}"
        raise InputError(f"--require {unknown[0]!r}: there is no such detector{near or listed}")


def _print(report: Report, format: Format, fail_on: FailOn) -> None:
    with contextlib.suppress(BrokenPipeError):  # a reader that has left does not change the verdict
        if (text := written(report, format, fail_on)) is not None:
            typer.echo(text.encode(), nl=False)
        else:
            show(report)
