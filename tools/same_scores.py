"""Scan the models of a results store again with the code at hand, and compare all scores with those stored.

    python tools/same_scores.py --store sqlite:///results.sqlite --cache CACHE [--out FILE.json]

For changes that shall leave results as they are: run a suite before the change, and this after it. The models
are the cached ones, the images those that were given then (DOORWARD_DATA names the data).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sqlalchemy import create_engine, text

from doorward.bench.cache import ModelCache
from doorward.bench.plan import Sources, detectors_of
from doorward.bench.suite import Data, ScanSettings, content_key
from doorward.core.records import Observations
from doorward.core.seeds import derive_seed
from doorward.models import open_classifier
from doorward.scan.behaviour import observe
from doorward.scan.calibration import shipped
from doorward.scan.context import ScanContext
from doorward.scan.verdict import conclude

#: Largest difference of a score that counts as the same.
TOLERANCE = 1e-6


def stored(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the scores of a stored scan, by detector and class number."""
    result = json.loads(row["result"]) if isinstance(row["result"], str) else row["result"]
    seen = result.get("seen") or result.get("report")
    return {one["detector"]: one["per_class"] for one in seen.get("measurements") or seen["findings"]}


def scanned_again(row: dict[str, Any], cache: ModelCache, sources: Sources) -> Observations:
    """Scan the model of a stored result as it was scanned then."""
    given, resolved = (
        json.loads(row[name]) if isinstance(row[name], str) else row[name] for name in ("given", "resolved")
    )
    settings = ScanSettings.model_validate(given.get("scan_settings") or given["judging"])
    key = content_key(resolved["model"])
    folder = cache.get(key)
    if folder is None:
        raise SystemExit(f"{row['trial']}: its model is not in the cache")
    classifier = open_classifier(str(folder / cache.meta(key).get("file", "")))
    rng = np.random.default_rng(derive_seed(settings.draw, "given images"))
    samples = sources.part(Data.model_validate(given["data"]), "test").draw(settings.images, rng)
    context = ScanContext(seed=settings.seed, images=settings.images)
    return observe(classifier, samples, detectors_of(settings), context).observations


def difference(old: dict[str, dict[str, float | None]], new: Observations) -> float:
    """Return the largest difference of any score, infinite where one is missing."""
    largest = 0.0
    for one in new.measurements:
        for t, value in one.per_class.items():
            before = old.get(one.detector, {}).get(str(t))
            if before is None or value is None:
                largest = max(largest, 0.0 if before is value else float("inf"))
            else:
                largest = max(largest, abs(value - before))
    return largest


def main(
    store: Annotated[str, typer.Option(help="SQLAlchemy URL of the results store")],
    cache: Annotated[Path, typer.Option(help="Where the trained models are")],
    data: Annotated[Path | None, typer.Option(envvar="DOORWARD_DATA")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table there as JSON")] = None,
) -> None:
    """Compare all stored scans; exit code 1 if a score differs."""
    torch.set_num_threads(1)
    with create_engine(store).connect() as connection:
        found = connection.execute(text("select * from trials where status = 'done' order by trial"))
        rows = [dict(row) for row in found.mappings()]
    models, sources, table = ModelCache(cache), Sources(data), []
    for row in rows:
        new = scanned_again(row, models, sources)
        far = difference(stored(row), new)
        report = conclude(new, shipped())
        table.append({"trial": row["trial"], "largest difference": far, "verdict": report.verdict})
        typer.echo(f"{row['trial']}: {far:.2e} ({report.verdict})")
    if out is not None:
        out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(int(any(one["largest difference"] > TOLERANCE for one in table)))


if __name__ == "__main__":
    typer.run(main)
