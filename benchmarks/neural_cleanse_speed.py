"""Compare Doorward's Neural Cleanse with the published schedule and with a serial loop of equal steps.

    python benchmarks/neural_cleanse_speed.py --subject MODEL DATA --subject MODEL DATA --threads 1

All run on the same models, images, device and number of threads, by turns, in one process. Without subjects
the two embedded models are compared. results/neural-cleanse-speed.json is written again after every model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from doorward import bundled
from doorward.attacks.ground_truth import read_plant
from doorward.core.budget import Deadline
from doorward.core.devices import keep_freed_memory
from doorward.core.records import Record
from doorward.core.seeds import derive_seed, make_generator
from doorward.data import Samples, open_samples
from doorward.detectors.model.neural_cleanse import NeuralCleanse
from doorward.detectors.subject import Subject
from doorward.inversion.masks import Inversion, invert, trigger_success
from doorward.inversion.sources import SourcePools, outside_class
from doorward.models import Classifier, open_classifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.scan.calibration import calibrations
from doorward.scan.calibration import judge as judge_scores
from doorward.scan.environment import environment
from doorward.stats import metrics
from doorward.stats.outliers import mad_index
from neural_cleanse_published import Found, Schedule, invert_class

RESULTS = Path(__file__).parent / "results" / "neural-cleanse-speed.json"
T = TypeVar("T")


class JudgedFindings(Record):
    """The masks of all classes and what the published rule makes of them.

    Attributes:
        norms: of each class's mask, in pixels.
        success: share of fresh images of other classes that each trigger sends to its class.
        index: the published anomaly index, above 0 for masks smaller than the median.
        flagged: classes with an index above 2.
    """

    norms: tuple[float, ...]
    success: tuple[float, ...]
    index: tuple[float, ...]
    flagged: tuple[int, ...]


class Ours(Record):
    """A run of the detector, and of its first inversion in three ways.

    Attributes:
        raced_seconds: as the detector does it: all classes in one batch, most given up early.
        batched_seconds: all classes in one batch, to the end.
        apart_seconds: the same code, class by class.
        serial_seconds: the published loop, class by class, with as many steps of as many images.
        expected: norms that the race gives: those of classes given up are estimated.
        judged: what the masks are when all classes go on to the end.
        alike: what they are when nearly as much success is asked for as with the published ones.
    """

    detector_seconds: float
    verdict: str
    targets: tuple[int, ...]
    raced_seconds: float
    batched_seconds: float
    apart_seconds: float
    serial_seconds: float
    expected: tuple[float, ...]
    judged: JudgedFindings
    alike: JudgedFindings


class Published(Record):
    """A run of the published schedule.

    Attributes:
        classes: those that were worked on.
        seconds: wall time for them.
        seconds_for_all: the same times the number of all classes over those worked on.
        judged: None unless all classes were worked on.
    """

    classes: tuple[int, ...]
    steps: tuple[int, ...]
    norms: tuple[float, ...]
    seconds: float
    seconds_for_all: float
    judged: JudgedFindings | None


class Row(Record):
    """What was measured on one model; `planted` is empty for a clean one."""

    model: str
    data: str
    classes: int
    planted: tuple[int, ...]
    ours: Ours
    early: Published | None
    full: Published | None


@dataclass(frozen=True)
class Case:
    """One model with the images given to the methods, and fresh ones to measure triggers on."""

    classifier: Classifier
    clean: Samples
    images: Tensor
    labels: Tensor
    fresh: Tensor
    fresh_labels: Tensor

    @property
    def targets(self) -> Tensor:
        return torch.arange(len(self.classifier.classes))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on every model, write and print."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command line does
    rows: list[Row] = []
    for model, data in options.subject or embedded():
        say(f"{model}: {options.images} images")
        rows.append(compare(model, data, options))
        results = {
            "settings": {k: v for k, v in vars(options).items() if k not in ("subject", "out")},
            "schedule": asdict(schedule(options)),
            "detector": NeuralCleanse().settings(),
            "environment": environment(options.device).model_dump(mode="json"),
            "summary": summarise(rows),
            "rows": [row.model_dump(mode="json") for row in rows],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summarise(rows), indent=2))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--subject", nargs=2, action="append", metavar=("MODEL", "DATA"), help="may be repeated")
    add("--images", type=int, default=100, help="clean images given")
    add("--fresh", type=int, default=500, help="further images, to measure the triggers on")
    add("--early", type=int, metavar="N", help="classes to run with early stopping; all if not given")
    add("--full", type=int, metavar="N", default=1, help="classes to run without it; times are scaled up")
    add("--steps", type=int, default=Schedule.steps, help="steps of the published schedule, to try it out")
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def schedule(options: argparse.Namespace) -> Schedule:
    """Return the published schedule, cut short where fewer steps are asked for."""
    return Schedule(steps=options.steps)


def embedded() -> list[tuple[str, str]]:
    """Return the models that come with the package, and their images."""
    data = f"{bundled.FOLDER / 'fashion_mnist'}:test"
    return [(str(bundled.model("backdoored")), data), (str(bundled.model("clean")), data)]


def compare(model: str, data: str, options: argparse.Namespace) -> Row:
    """Invert the classes of one model in every way."""
    classifier = open_classifier(model).to(options.device)
    samples = open_samples(data, classes=classifier.classes)
    drawn = samples.draw(options.images + options.fresh, np.random.default_rng(options.seed))
    clean = drawn.select(np.arange(min(options.images, len(drawn))))
    images = to_float(to_tensor(drawn, classifier.spec)).to(options.device)  # (n, c, h, w)
    labels = torch.from_numpy(drawn.labels)
    n = len(clean)
    case = Case(classifier, clean, images[:n], labels[:n], images[n:], labels[n:])
    truth = Path(model) / "plant.json"
    order = np.random.default_rng(derive_seed(options.seed, "classes")).permutation(len(classifier.classes))
    published = schedule(options)
    with classifier.frozen():
        return Row(
            model=Path(model).name,
            data=Path(data).name,
            classes=len(classifier.classes),
            planted=read_plant(truth).targets if truth.is_file() else (),
            ours=run_ours(case, options),
            early=run_published(case, order[: options.early], published, options),
            full=run_published(case, order[: options.full], replace(published, stop_after=None), options),
        )


def run_ours(case: Case, options: argparse.Namespace) -> Ours:
    """Run the detector, then its inversion for all classes at once, one by one, and by the published loop."""
    method = NeuralCleanse()
    pools = SourcePools(outside_class(case.classifier, case.images, case.labels))

    k = len(case.targets)
    race = {"first_steps": method.first_steps, "finalists": method.going_on(k)}

    def inversion(
        targets: Tensor, steps: int = method.steps, success: float = method.success, **more: int
    ) -> Inversion:
        return invert(
            case.classifier,
            case.images,
            pools,
            targets,
            steps=steps,
            batch_size=method.batch_size,
            learning_rate=method.learning_rate,
            success=success,
            generator=make_generator(options.seed, "inversion"),
            deadline=Deadline(),
            **more,
        )

    inversion(case.targets, steps=2)  # the first calls of a process are slower
    subject = Subject(classifier=case.classifier, clean=case.clean)
    seen, detector_seconds = timed(lambda: method(subject, seed=options.seed, device=options.device))
    (finding,) = judge_scores([seen], calibrations([seen.detector])).findings
    say(f"  detector: {detector_seconds:.1f} s, {finding.verdict}")
    raced, raced_seconds = timed(lambda: inversion(case.targets, **race))
    batched, batched_seconds = timed(lambda: inversion(case.targets))
    _, apart_seconds = timed(lambda: [inversion(one) for one in torch.split(case.targets, 1)])
    equal = Schedule(steps=method.steps, mini_batches=1, batch_size=method.batch_size, stop_after=None)
    say(f"  race {raced_seconds:.1f} s, one batch {batched_seconds:.1f} s, by class {apart_seconds:.1f} s")
    serial = run_published(case, np.arange(len(case.targets)), equal, options)
    assert serial is not None
    alike = inversion(case.targets, success=method.confirm_success)
    return Ours(
        detector_seconds=detector_seconds,
        verdict=finding.verdict,
        targets=finding.targets,
        raced_seconds=raced_seconds,
        batched_seconds=batched_seconds,
        apart_seconds=apart_seconds,
        serial_seconds=serial.seconds,
        expected=tuple(raced.expected_norm().tolist()),
        judged=judge(case, batched.mask, batched.pattern),
        alike=judge(case, alike.mask, alike.pattern),
    )


def run_published(
    case: Case, order: np.ndarray[Any, Any], settings: Schedule, options: argparse.Namespace
) -> Published | None:
    """Run the published schedule on some classes, one after the other."""
    found: list[Found] = []
    taken = 0.0
    for target in sorted(order.tolist()):
        generator = make_generator(options.seed, "published", str(target))
        invert_one = partial(
            invert_class, case.classifier, case.images, target, schedule=settings, generator=generator
        )
        one, seconds = timed(invert_one)
        way = "to the end" if settings.stop_after is None else "stopping early"
        say(f"  class {target}, {way}: {one.steps} steps, {seconds:.1f} s, norm {one.norm:.1f}")
        taken += seconds
        found.append(one)
    if not found:
        return None
    complete = len(found) == len(case.targets)
    masks, patterns = torch.stack([one.mask for one in found]), torch.stack([one.pattern for one in found])
    return Published(
        classes=tuple(one.target for one in found),
        steps=tuple(one.steps for one in found),
        norms=tuple(one.norm for one in found),
        seconds=taken,
        seconds_for_all=taken * len(case.targets) / len(found),
        judged=judge(case, masks, patterns) if complete else None,
    )


def judge(case: Case, masks: Tensor, patterns: Tensor) -> JudgedFindings:
    """Measure the triggers (k, 1, h, w), (k, c, h, w) of all classes, and apply the published rule."""
    outside = outside_class(case.classifier, case.fresh, case.fresh_labels)
    success = trigger_success(case.classifier, case.fresh, outside, case.targets, masks, patterns)
    norms = masks.sum((1, 2, 3)).cpu().numpy().astype(np.float64)
    index = np.nan_to_num(mad_index(-norms), posinf=1e9, neginf=-1e9)
    return JudgedFindings(
        norms=tuple(norms.tolist()),
        success=tuple(success.tolist()),
        index=tuple(index.tolist()),
        flagged=tuple(np.flatnonzero(index > 2).tolist()),
    )


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return a result and the wall time it took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return the ratios over all models, and how each way of judging did."""
    detector = [row.ours.detector_seconds for row in rows]
    serial, apart, batched, raced = (
        [getattr(row.ours, f"{way}_seconds") for row in rows]
        for way in ("serial", "apart", "batched", "raced")
    )
    summary: dict[str, Any] = {
        "serial_over_raced": ratio(serial, raced),
        "serial_over_batched": ratio(serial, batched),
        "apart_over_batched": ratio(apart, batched),
    }
    for name in ("early", "full"):
        runs: list[Published] = [run for row in rows if (run := getattr(row, name)) is not None]
        if len(runs) == len(rows):
            summary[f"published_{name}_over_detector"] = ratio(
                [run.seconds_for_all for run in runs], detector
            )
            summary[f"published_{name}_classes_run"] = sum(len(run.classes) for run in runs)
    suspicious = [row.ours.targets if row.ours.verdict == "suspicious" else () for row in rows]
    summary["detector"] = detection(rows, suspicious)
    medians = [[float(np.median(norms)) for norms in (r.ours.expected, r.ours.judged.norms)] for r in rows]
    summary["median_norm_raced_over_batched"] = ratio(*map(list, zip(*medians, strict=True)))
    ours, alike = [row.ours.judged for row in rows], [row.ours.alike for row in rows]
    theirs = [row.early.judged for row in rows if row.early is not None and row.early.judged is not None]
    summary["our_masks_by_published_rule"] = detection(rows, [one.flagged for one in ours]) | sizes(ours)
    if len(theirs) == len(rows):
        summary["published"] = detection(rows, [one.flagged for one in theirs]) | sizes(theirs)
        for name, some in (("median_norm_ours_over_published", ours), ("median_norm_at_like_success", alike)):
            medians = [[float(np.median(one.norms)) for one in masks] for masks in (some, theirs)]
            summary[name] = ratio(*medians)
    return summary


def detection(rows: list[Row], flagged: list[tuple[int, ...]]) -> dict[str, Any]:
    """Compare the classes flagged in each model with those planted."""
    planted = [row.planted for row in rows]
    counts = metrics.confusion(np.array([bool(f) for f in flagged]), np.array([bool(p) for p in planted]))
    exact = sum(set(f) == set(p) for f, p in zip(flagged, planted, strict=True))
    return {"models": counts.model_dump(), "exactly_right": metrics.rate(exact, len(rows)).model_dump()}


def sizes(judged: list[JudgedFindings]) -> dict[str, Any]:
    """Return each model's median mask norm, and median success on fresh images."""
    return {
        "median_norms": [float(np.median(one.norms)) for one in judged],
        "median_success": [float(np.median(one.success)) for one in judged],
    }


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Return the geometric mean of paired ratios with its interval."""
    return metrics.time_ratio(above, below).model_dump()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
