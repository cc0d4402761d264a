"""What a server has seen: metrics, a drift alarm, the inputs that it rejected last."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import Tensor

from doorward.core.errors import InputError
from doorward.core.formatting import class_label, plain
from doorward.guard.guard import Answers, Guard
from doorward.guard.pipeline import drift_alarm
from doorward.models.encode.image import picture, to_float

#: Inputs after which the share of rejected ones is compared with the preset one, and the p-value from which
#: on that is an alarm. Of servers with clean inputs alone, one in a thousand raises one in each such block.
BLOCK, LEVEL = 200, 0.001
#: Scores of the newest inputs, and rejected inputs, that the status page shows.
RECENT, SHOWN = 2_000, 12
#: Bars of a histogram.
BINS = 30
#: Files that a quarantine holds, at most; what comes later is counted alone.
MOST_FILES = 1_000
#: Bounds of the histogram of how long requests take, in seconds.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Rejected:
    """An input that was rejected.

    Attributes:
        png: its picture in base64; None if it is no image.
        label: the class that the model answers with.
    """

    at: float
    png: str | None
    label: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Bars:
    """Two histograms over the same bins, of clean and of served inputs.

    Attributes:
        clean, served: share of inputs in each bin.
        threshold: its place between the lowest and the highest edge, in [0, 1]; None if it lies outside.
    """

    name: str
    low: float
    high: float
    clean: tuple[float, ...]
    served: tuple[float, ...]
    threshold: float | None


class Quarantine:
    """A folder of rejected inputs: a PNG file for each, and a line in `rejected.jsonl`.

    Args:
        folder: is made if it is not there.

    Raises:
        InputError: if it cannot be written.
    """

    def __init__(self, folder: Path, *, most: int = MOST_FILES) -> None:
        self.folder, self.most, self.dropped = folder, most, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._log = (folder / "rejected.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot keep rejected inputs there: {error.strerror}") from error
        self._names = {file.stem for file in folder.glob("*.png")}

    def keep(self, image: Tensor, png: bytes, row: dict[str, Any]) -> None:
        """Keep an input (c, h, w) uint8, each of the same content once, as long as there is room."""
        name = hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16]
        if name not in self._names:
            if len(self._names) >= self.most:
                self.dropped += 1
                return
            self._names.add(name)
            (self.folder / f"{name}.png").write_bytes(png)
        self._log.write(json.dumps({"file": f"{name}.png"} | row) + "\n")
        self._log.flush()


class Watch:
    """Count what a guard says, and remember the newest of it.

    Args:
        quarantine: where rejected inputs are kept, if anywhere.
    """

    def __init__(self, guard: Guard, *, quarantine: Quarantine | None = None) -> None:
        self.guard, self._quarantine = guard, quarantine
        self.started = time.time()
        self.inputs = self.rejected_inputs = 0
        self.alarm: str | None = None
        self._block = [0, 0]
        self._scores: deque[np.ndarray[Any, Any]] = deque(maxlen=RECENT)
        self._rejected: deque[Rejected] = deque(maxlen=SHOWN)
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"doorward_guard_{name}", text, labels, registry=self._registry)

        self._inputs = counter("inputs", "Inputs that were judged.", ["verdict"])
        self._spoke = counter("rejections", "Inputs that a filter rejected.", ["filter"])
        self._requests = counter("requests", "Requests for inference by status code.", ["status"])
        self._seconds = Histogram(
            "doorward_guard_request_seconds",
            "How long requests for inference took.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.waiting = Gauge("doorward_guard_waiting_inputs", "Inputs that wait.", registry=self._registry)
        self._drift = Gauge("doorward_guard_drift_alarm", "1 after a drift alarm.", registry=self._registry)

    def judged(self, inputs: Tensor, answers: Answers) -> None:
        """Note what was said of inputs (n, c, h, w), as the guard took them."""
        bad = np.flatnonzero(~answers.accepted)
        with self._lock:
            self.inputs += len(inputs)
            self.rejected_inputs += len(bad)
            self._scores.extend(answers.scores.T)
            for row in bad.tolist():
                self._note(inputs[row], answers, row)
            self._check_drift(answers)
        self._inputs.labels("accepted").inc(len(inputs) - len(bad))
        self._inputs.labels("rejected").inc(len(bad))
        spoke = (answers.scores >= self.guard.fitted.thresholds[:, None]).sum(1)
        for one, count in zip(self.guard.fitted.filters, spoke.tolist(), strict=True):
            self._spoke.labels(one.method()).inc(count)

    def answered(self, status: int, seconds: float) -> None:
        """Note a request for inference that was answered."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def metrics(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def newest(self) -> tuple[Rejected, ...]:
        """Return the inputs that were rejected last, the newest first."""
        with self._lock:
            return tuple(reversed(self._rejected))

    def histograms(self) -> tuple[Bars, ...]:
        """Return, for each filter, the scores of clean inputs and of the newest inputs."""
        with self._lock:
            served = np.array(self._scores)  # (n, f)
        fitted = self.guard.fitted
        return tuple(
            _bars(one.method(), fitted.clean[i], served[:, i] if len(served) else served, float(threshold))
            for i, (one, threshold) in enumerate(zip(fitted.filters, fitted.thresholds, strict=True))
        )

    def _note(self, one: Tensor, answers: Answers, row: int) -> None:
        label = plain(class_label(int(answers.predictions[row]), self.guard.classifier.classes))
        is_image = self.guard.classifier.spec.modality == "image"
        png = picture(to_float(one[None])[0]) if is_image else None
        now = time.time()
        self._rejected.append(Rejected(now, png, label, answers.reasons[row]))
        if self._quarantine is not None and png is not None:
            said = {"at": round(now, 3), "class": label, "reasons": list(answers.reasons[row])}
            self._quarantine.keep(one, base64.b64decode(png), said)

    def _check_drift(self, answers: Answers) -> None:
        for bad in (~answers.accepted).tolist():
            self._block = [self._block[0] + bad, self._block[1] + 1]
            if self._block[1] == BLOCK:
                rejected, n = self._block
                told = drift_alarm(rejected, n, self.guard.rate, level=LEVEL)
                self.alarm = told or self.alarm
                self._drift.set(self.alarm is not None)
                self._block = [0, 0]


def _bars(name: str, clean: Any, served: Any, threshold: float) -> Bars:
    both = np.concatenate([clean, served, [threshold]])
    both = both[np.isfinite(both)]
    low, high = float(both.min()), float(both.max())
    high = high if high > low else low + 1
    edges = np.linspace(low, high, BINS + 1)
    shares = [tuple((np.histogram(one, edges)[0] / max(1, len(one))).tolist()) for one in (clean, served)]
    place = (threshold - low) / (high - low) if np.isfinite(threshold) else None
    return Bars(name, low, high, shares[0], shares[1], place)
