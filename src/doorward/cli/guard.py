"""`doorward guard`: judge inputs before a model's answers to them are relied on."""

from __future__ import annotations

import contextlib
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from doorward.cli import model_options
from doorward.cli.options import (
    DEVICE,
    FILTERS,
    INPUT_COLUMN,
    LABEL_COLUMN,
    SEED,
    check_device,
    check_folder,
    own_code,
    refuse_missing_inputs,
    status,
)
from doorward.core.errors import CouldNotTell, InputError, MissingExtra

if TYPE_CHECKING:
    from doorward.guard.pipeline import GuardRequest


class Format(StrEnum):
    """What is printed on standard output."""

    text = "text"
    json = "json"
    csv = "csv"


class FailOn(StrEnum):
    """From when on the exit code is 1."""

    rejected = "rejected"
    alarm = "alarm"
    never = "never"


class Rule(StrEnum):
    """How thresholds follow from the scores of clean inputs."""

    conformal = "conformal"
    normal = "normal"
    quantile = "quantile"


def guard(
    model: str = typer.Argument(..., metavar="MODEL", help="A model, as `doorward scan` takes it."),
    check: str | None = typer.Option(
        None,
        metavar="DATA",
        help="The images, texts or recordings to judge, read like --clean.",
    ),
    serve: str | None = typer.Option(
        None,
        metavar="[HOST:]PORT",
        help="Serve the guarded model over HTTP, by the Open Inference Protocol (KServe v2), in the place of "
        "--check. Without HOST for this machine alone.",
    ),
    clean: str | None = typer.Option(
        None,
        metavar="DATA",
        help="Inputs that you trust, and that the model was not trained on, to fit filters to: a folder, a "
        "file or a hub id; DATA:SPLIT picks a split.",
    ),
    filters: list[str] = typer.Option(
        [],
        "--filter",
        metavar="NAME",
        autocompletion=FILTERS,
        help="Use this filter; may be repeated. Without one strip, and for images feature-squeezing too.",
    ),
    rate: float = typer.Option(
        0.01, metavar="R", help="Share of clean inputs that all filters together may reject."
    ),
    rule: Rule = typer.Option(
        Rule.conformal,
        metavar="conformal|normal|quantile",
        help="How thresholds follow from clean scores: with a guarantee, by a Normal distribution, or as "
        "their plain quantile.",
    ),
    reform: str | None = typer.Option(
        None,
        metavar="SQUEEZER",
        help="Answer from a squeezed copy of each input: bits-B, median-2, median-3 or "
        "nlm-SEARCH-PATCH-STRENGTH.",
    ),
    out: Path | None = typer.Option(
        None,
        metavar="DIR",
        help="Write verdicts.json, verdicts.csv and rejected.html, a page with the rejected inputs, there.",
    ),
    format: Format = typer.Option(
        Format.text, metavar="text|json|csv", help="What to print on standard output."
    ),
    fail_on: FailOn = typer.Option(
        FailOn.rejected,
        metavar="rejected|alarm|never",
        help="When the exit code is 1: if any input is rejected, if more are than of clean ones would be "
        "(p at most .01), or never.",
    ),
    save: Path | None = typer.Option(
        None, metavar="DIR", help="Save the fitted guard there, to be used again with --guard."
    ),
    saved: Path | None = typer.Option(
        None, "--guard", metavar="DIR", help="Use the guard that was saved there, in the place of --clean."
    ),
    images: int = typer.Option(2000, min=4, metavar="N", help="Most clean inputs to use."),
    seed: int = SEED,
    device: str = DEVICE,
    time_budget: float = typer.Option(900, min=1, metavar="S", help="Seconds that it may take."),
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
    name: str | None = typer.Option(
        None,
        metavar="NAME",
        help="With --serve: the model's name in addresses, if not its file's.",
    ),
    upstream: str | None = typer.Option(
        None,
        metavar="URL",
        help="With --serve: pass requests on to this model, http://HOST/v2/models/NAME, and answer what it "
        "answers. MODEL judges the inputs.",
    ),
    refuse: bool = typer.Option(
        False,
        "--refuse",
        help="With --serve: give no answer to a request with a rejected input, instead of marking it.",
    ),
    quarantine: Path | None = typer.Option(
        None, metavar="DIR", help="With --serve: keep rejected images there, 1,000 at most."
    ),
    token_file: Path | None = typer.Option(
        None, metavar="FILE", help="With --serve: clients have to bear the token in this file."
    ),
    tls_cert: Path | None = typer.Option(
        None, metavar="FILE", help="With --serve: the certificate of the server, with --tls-key."
    ),
    tls_key: Path | None = typer.Option(None, metavar="FILE", help="With --tls-cert: its key."),
    tls_clients: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="With --tls-cert: clients have to show a certificate of this authority.",
    ),
    data_column: str | None = INPUT_COLUMN,
    label_column: str | None = LABEL_COLUMN,
) -> None:
    """Judge inputs one by one: of a data set, or as a server.

    Filters learn from clean inputs how an ordinary input scores, and reject what scores higher than nearly
    all of those. They find no backdoor in the model: `doorward scan` looks for one.

    Exit code: 0 none is rejected, 1 some are (see --fail-on) or the model is unsafe to load, 2 usage or
    unreadable input, 3 could not tell, 4 a fault in Doorward. A server that is told to stop ends with 128 and
    the signal's number.
    """
    from doorward.methods.registry import refuse_unknown

    for given, value in (("MODEL", model), ("--clean", clean), ("--check", check)):
        if value == "":
            raise InputError(f"{given} is empty; it takes a path or a hub id")
    if (check is None) == (serve is None):
        raise InputError("give --check DATA to judge the inputs there, or --serve PORT to judge what is sent")
    if (clean is None) == (saved is None):
        raise InputError("give --clean DATA to fit filters to, or --guard DIR with a saved guard")
    if saved is not None and (filters or reform or rate != 0.01 or rule is not Rule.conformal):
        raise InputError("--filter, --rate, --rule and --reform go with --clean; a saved guard has its own")
    if not 0 < rate < 1:
        raise InputError(f"--rate takes a share between 0 and 1, got {rate}")
    model_options.refuse_weights_alone(weights, factory)
    stated = model_options.stated_options(
        input_range=input_range, mean=mean, std=std, layout=layout, channels=channels, size=size,
        resize=resize, output=output, label_names=label_names,
    )  # fmt: skip
    for folder, given in ((out, "--out"), (save, "--save")):
        if folder is not None:
            check_folder(folder, given=given)
    refuse_unknown("detector", filters)
    refuse_missing_inputs(None if factory else model, clean, check)
    from doorward.guard import rendering
    from doorward.guard.pipeline import GuardRequest, guard_inputs
    from doorward.models import LoadOptions

    request = GuardRequest(
        model=model,
        clean=clean,
        check=check,
        filters=tuple(filters),
        rate=rate,
        rule=rule.value,
        reform=reform,
        images=images,
        seed=seed,
        device=check_device(device),
        time_budget=time_budget,
        factory=factory,
        weights=str(weights) if weights else None,
        options=LoadOptions(**stated),
        data_column=data_column,
        label_column=label_column,
        saved=saved,
        keep=save,
    )
    served = {
        "--name": name,
        "--upstream": upstream,
        "--quarantine": quarantine,
        "--token-file": token_file,
        "--tls-cert": tls_cert,
        "--tls-key": tls_key,
        "--tls-clients": tls_clients,
        "--refuse": refuse or None,
    }
    if serve is not None:
        if out is not None:
            raise InputError("--out goes with --check; with --serve, --quarantine keeps rejected inputs")
        _serve(request, serve, served)
        return
    if misplaced := [option for option, value in served.items() if value is not None]:
        raise InputError(f"{misplaced[0]} goes with --serve")
    try:
        with own_code(factory), status() as progress:
            guarded = guard_inputs(request, progress=progress)
    except InputError:
        raise
    except CouldNotTell as why:
        typer.echo(f"could not tell: {why}", err=True)
        raise typer.Exit(3) from None
    report = guarded.report
    if out is not None:
        files = {
            "verdicts.json": rendering.to_json(report),
            "verdicts.csv": rendering.to_csv(report),
            "rejected.html": rendering.to_html(report, guarded.inputs),
        }
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        typer.echo(f"written: {out} ({', '.join(sorted(files))})", err=True)
    write = {Format.text: rendering.to_text, Format.json: rendering.to_json, Format.csv: rendering.to_csv}
    with contextlib.suppress(BrokenPipeError):  # a reader that has left does not change the verdict
        typer.echo(write[format](report).encode(errors="backslashreplace"), nl=False)
    found = {
        FailOn.rejected: report.rejected.successes > 0,
        FailOn.alarm: report.alarm is not None,
        FailOn.never: False,
    }
    raise typer.Exit(int(found[fail_on]))


def _serve(request: GuardRequest, where: str, options: dict[str, Any]) -> None:
    """Serve a guard until a signal says to stop."""
    try:
        from doorward.guard.serving.run import ServeRequest, address, local, serve
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "fastapi", "serve", "--serve") from None
    host, port = address(where)
    token = _token(options["--token-file"])
    if not local(host) and token is None and options["--tls-clients"] is None:
        typer.echo(
            f"warning: everybody who reaches {host} can use the model; --token-file or --tls-clients keeps "
            "others out",
            err=True,
        )
    wanted = ServeRequest(
        guard=request,
        host=host,
        port=port,
        name=_served_name(options["--name"], request.model),
        token=token,
        certificate=options["--tls-cert"],
        key=options["--tls-key"],
        clients=options["--tls-clients"],
        upstream=options["--upstream"],
        refuse=bool(options["--refuse"]),
        quarantine=options["--quarantine"],
    )
    try:
        with own_code(request.factory):
            serve(wanted, progress=lambda text: typer.echo(text, err=True))
    except CouldNotTell as why:
        typer.echo(f"could not tell: {why}", err=True)
        raise typer.Exit(3) from None


def _served_name(given: str | None, model: str) -> str:
    """Return the model's name in addresses."""
    name = given or re.sub(r"[^\w.-]+", "-", Path(model).stem) or "model"
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise InputError(f"--name takes letters, digits, points, dashes and underscores, got {name!r}")
    return name


def _token(file: Path | None) -> str | None:
    """Read the token that clients bear.

    Raises:
        InputError: if there is none.
    """
    if file is None:
        return None
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise InputError(f"--token-file {file}: cannot be read: {why}") from None
    if not token or len(token.split()) > 1:
        raise InputError(f"--token-file {file}: it holds no single token")
    return token
