"""Write the calibration set of clean models that calibrates the verdict, from what suite `calibration set`
saw.

doorward bench run calibration --scale cpu --workers 2
python tools/rebuild_bank.py
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer

from doorward.bench.store import Row
from doorward.bench.suite import expand, get_suite
from doorward.cli.bench import default_cache, open_store
from doorward.core.records import Finding
from doorward.scan.calibration import BUCKETS, SHIPPED, CalibrationSet, CleanModel, bucket

DIGITS = 3
#: What each detector counts in the sum that is fused; chosen on suites `calibration set` and `tuning`, where
#: patches are found less often if margins and faint pictures count as much as masks and patches do.
WEIGHTS = {"patch-search": 1.0, "neural-cleanse": 1.0, "max-margin": 0.25, "blend-search": 0.25}


def clean_model(row: Row, settings: dict[str, dict[str, Any]]) -> CleanModel:
    """Return one line of the calibration set, and note the detectors' settings.

    Raises:
        ValueError: if a detector's settings are not those of the lines before.
    """
    assert row.result is not None
    report, truth = row.result["report"], row.result["truth"]
    scores: dict[str, tuple[float | None, ...] | None] = {}
    for form in report["findings"]:
        finding = Finding.model_validate(form)
        if finding.kind != "backdoor":
            continue
        if settings.setdefault(finding.detector, finding.settings) != finding.settings:
            raise ValueError(f"{row.trial}: {finding.detector} was run with settings of its own")
        own = [finding.per_class[t] for t in sorted(finding.per_class)]
        rounded = tuple(None if score is None else round(score, DIGITS) for score in own)
        scores[finding.detector] = None if finding.score is None else rounded
    spec = report["subject"]["spec"]
    return CleanModel(
        data=row.given["data"]["name"],
        architecture=row.given["architecture"],
        classes=truth["classes"],
        shape=(spec["channels"], spec["height"], spec["width"]),
        robust=bool(row.given.get("robust")),
        accuracy=round(truth["clean_accuracy"]["value"], DIGITS),
        scores=scores,
    )


def main(
    store: Annotated[str | None, typer.Option(help="Results store; that of the bench if not given")] = None,
) -> None:
    """Write the calibration set, and say what is in it."""
    trials = expand(get_suite("bank"), "cpu")
    rows = open_store(store, default_cache()).latest(trials)
    rows = {name: row for name, row in rows.items() if row.status == "done"}
    if not rows:
        raise SystemExit("nothing to make it of: run `doorward bench run bank --scale cpu` first")
    settings: dict[str, dict[str, Any]] = {}
    found = [rows[t.name] for t in trials if t.name in rows]
    judged = [row for row in found if row.result and row.result["report"]["findings"]]  # others, none judges
    models = [clean_model(row, settings) for row in judged]
    versions = {json.dumps(row.versions, sort_keys=True) for row in judged}
    images = {row.given["judging"]["images"] for row in judged}
    if len(versions) > 1 or len(images) > 1:
        raise SystemExit("the results are of several versions, or numbers of images: run the suite anew")
    bank = CalibrationSet(
        settings=settings,
        weights=WEIGHTS,
        images=images.pop(),
        made_with=json.loads(versions.pop()),
        models=tuple(models),
    )
    head = bank.model_dump(mode="json", exclude={"models"})
    lines = ",\n".join("    " + json.dumps(m.model_dump(mode="json")) for m in models)  # one line a model
    text = json.dumps(head, indent=2)[:-2] + ',\n  "models": [\n' + lines + "\n  ]\n}\n"
    SHIPPED.write_text(text, encoding="utf-8")
    counts = Counter(bucket(m.classes) for m in models)
    for number, (low, high) in enumerate(BUCKETS):
        typer.echo(f"{low} to {high} classes: {counts[number]} models")
    typer.echo(f"{len(models)} of {len(trials)} models, {len(text) / 1024:.0f} KiB in {SHIPPED}")
    typer.echo(f"{len(found) - len(judged)} models are no better than chance and left out")


if __name__ == "__main__":
    typer.run(main)
