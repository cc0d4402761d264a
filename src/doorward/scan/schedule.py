"""Run detectors so that the time yields a verdict: a plan first, and a new one after each detector."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from doorward.core.budget import Deadline, about
from doorward.core.errors import CouldNotTell
from doorward.core.formatting import joined, percent
from doorward.core.records import Measurement, NotRun
from doorward.detectors.base import Detector
from doorward.detectors.model.base import shared_problem
from doorward.detectors.subject import Subject
from doorward.inversion.distilled import DistilledSurrogates
from doorward.scan.context import ScanContext
from doorward.scan.plan import Option, Pace, best_plan, duration, measure_pace, options_of, reduced_note

#: How many times longer than the time left a detector's estimate has to be for it not to be tried.
HOPELESS = 2.0
#: How many times its estimate a detector is given.
SLACK = 1.3
#: Shares of the time, at least and at most, that are kept for what comes after the detectors.
LEAST_KEPT, MOST_KEPT = 0.03, 0.2
#: Seconds below which what a detector took says nothing of how good the estimates are.
TELLING = 1.0
#: Share of the worth of all detectors that may be lost for lack of time, and still something is concluded.
MOST_LOST = 0.5
#: Seconds from one message on the progress to the next.
MESSAGES = 1.0


@dataclass
class Ran:
    """What the detectors measured, which of them did not run, and what a report says of that first.

    Attributes:
        quickest: the detector that would have taken the least time of those that were not tried.
        lost: share of the worth of all detectors that the verdict does without, for lack of time.
    """

    measurements: list[Measurement] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quickest: str | None = None
    lost: float = 0.0

    @property
    def reason(self) -> str | None:
        """Return why too little was measured for lack of time; None if enough was, or time was not why."""
        if any(seen.reason is None for seen in self.measurements):
            return (
                "there was no time for detectors, or for their full settings, that have "
                f"{percent(self.lost)} of the weight in the verdict; give more with --time-budget"
                if self.lost > MOST_LOST
                else None
            )
        if not self.not_run:
            return None
        if len(self.not_run) == 1 or self.quickest is None:
            return "; ".join(f"{one.detector}: {one.reason}" for one in self.not_run)
        why = next(one.reason for one in self.not_run if one.detector == self.quickest)
        names = joined([one.detector for one in self.not_run])
        return f"no time for {names}; the quickest that was left is {self.quickest}: {why}"


def run_in_time(
    detectors: Sequence[Detector],
    subject: Subject,
    context: ScanContext,
    images: Tensor,
    *,
    afterwards: int = 0,
) -> Ran:
    """Run detectors, as many and as thoroughly as the time allows.

    Args:
        detectors: those whose needs the subject serves.
        images: (n, c, h, w) in [0, 1] on which the pace of the model is measured.
        afterwards: how many images go through the model, about, when the detectors have run.
    """
    assert subject.classifier is not None
    if context.deadline.seconds is None:
        return _run_all(detectors, subject, context)
    context.report_progress("measuring how long the model takes")
    try:
        pace = measure_pace(subject.classifier, images)
    except (CouldNotTell, RuntimeError):  # the detectors say what is wrong with the model
        return _run_all(detectors, subject, context)
    left = context.deadline.left()
    kept = min(max(LEAST_KEPT * left, afterwards * pace.forward), MOST_KEPT * left)
    return _Schedule(detectors, subject, context, pace, kept).run()


def _run_all(detectors: Sequence[Detector], subject: Subject, context: ScanContext) -> Ran:
    """Run detectors one after the other, without a limit."""
    ran = Ran()
    for detector in detectors:
        context.report_progress(f"{detector.method()}: {detector.title}")
        ran.measurements.append(
            detector(subject, seed=context.seed, device=context.device, deadline=context.deadline)
        )
    return ran


class _Schedule:
    """Choose and run one detector after the other, by what an image takes through the model.

    Args:
        kept: seconds that have to be left when all have run.
    """

    def __init__(
        self,
        detectors: Sequence[Detector],
        subject: Subject,
        context: ScanContext,
        pace: Pace,
        kept: float,
    ) -> None:
        assert subject.classifier is not None
        self.subject, self.context, self.kept, self.ran = subject, context, kept, Ran()
        self._order = {detector.method(): i for i, detector in enumerate(detectors)}
        sizes = {
            "classes": len(subject.classifier.classes),
            "images": 0 if subject.clean is None else len(subject.clean),
        }
        self._choices = {one.method(): options_of(one, pace, **sizes) for one in detectors}
        self._whole = {name: options[0].worth for name, options in self._choices.items()}
        self._estimated, self._took = 0.0, 0.0

    def run(self) -> Ran:
        """Run what fits."""
        while self._choices:
            left = self.context.deadline.left() - self.kept
            plan = self._plan(left)
            if left <= 0 or (len(plan) == 1 and duration(plan) > HOPELESS * left):
                self._give_up(left)
                break
            self._run_first(plan, left)
        self.ran.measurements.sort(key=lambda seen: self._order[seen.detector])
        self.ran.not_run.sort(key=lambda one: self._order[one.detector])
        if self.ran.not_run:
            names = joined([one.detector for one in self.ran.not_run])
            self._lose(sum(self._whole[one.detector] for one in self.ran.not_run))
            self.ran.notes.insert(0, f"not run for lack of time: {names}; give more with --time-budget")
        return self.ran

    def _plan(self, left: float) -> list[Option]:
        """Return what to run next and then.

        As long as nothing was measured, what comes first has to fit even if it takes longer than estimated:
        else the time may end with nothing at all.
        """
        choices = [self._rated(options) for options in self._choices.values()]
        plan = best_plan(choices, left)
        if any(seen.reason is None for seen in self.ran.measurements) or SLACK * duration(plan[:1]) <= left:
            return plan
        return best_plan(choices, left / SLACK)

    @property
    def _factor(self) -> float:
        """Return how many times as long as estimated detectors take."""
        return self._took / self._estimated if self._estimated else 1.0

    def _rated(self, options: Sequence[Option]) -> list[Option]:
        """Return options as long as they take by now; surrogates that are there need not be made."""
        problem, rated = shared_problem(self.subject), []
        for one in options:
            taught = problem is not None and DistilledSurrogates.there(problem, one.lesson)
            rated.append(
                replace(
                    one,
                    seconds=one.seconds * self._factor,
                    lesson=0 if taught else one.lesson,
                    lesson_seconds=0.0 if taught else one.lesson_seconds * self._factor,
                )
            )
        return rated

    def _run_first(self, plan: Sequence[Option], left: float) -> None:
        option, estimate = plan[0], duration(plan[:1])
        rest = duration(plan) - estimate
        # estimates are right within a third, and a detector that is given up has cost time for nothing
        deadline = Deadline(max(min(SLACK * estimate, left), left - rest))
        deadline.on_progress = self._teller(plan, deadline)
        deadline.on_progress()
        seen = option.detector(
            self.subject, seed=self.context.seed, device=self.context.device, deadline=deadline
        )
        if seen.reason is not None and deadline.missed:
            self._too_slow(option, estimate, deadline, seen.reason)
            return
        del self._choices[option.name]
        self.ran.measurements.append(seen)
        if seen.reason is None and seen.seconds >= TELLING:
            self._estimated += estimate / self._factor
            self._took += seen.seconds
        if option.reduced:
            self._lose(self._whole[option.name] - option.worth)
            self.ran.notes.append(reduced_note(option))

    def _lose(self, worth: float) -> None:
        self.ran.lost += worth / max(sum(self._whole.values()), 1e-9)

    def _too_slow(self, option: Option, expected: float, deadline: Deadline, reason: str) -> None:
        """Leave a detector the options that are cheaper than one which did not fit."""
        estimate = expected / self._factor
        cheaper = tuple(one for one in self._choices[option.name] if duration([one]) < estimate * (1 - 1e-9))
        if cheaper:
            self._choices[option.name] = cheaper
        else:
            del self._choices[option.name]
            self.ran.not_run.append(NotRun(detector=option.name, reason=reason))
        # it would have taken longer than it was given, whatever the estimate says
        given = deadline.seconds or 0.0
        if estimate > 0 and given > expected:
            self._estimated, self._took = estimate, given

    def _give_up(self, left: float) -> None:
        needs = {
            name: min(duration([one]) for one in self._rated(options))
            for name, options in self._choices.items()
        }
        self.ran.quickest = min(needs, key=lambda name: needs[name])
        for name, needed in needs.items():
            why = f"it would take {about(needed)}, and {about(max(left, 0.0))} of the time budget are left"
            self.ran.not_run.append(NotRun(detector=name, reason=why))
        self._choices = {}

    def _teller(self, plan: Sequence[Option], deadline: Deadline) -> Callable[[], None]:
        """Return what tells, once a second at most, what runs, what comes then and how long it takes."""
        option, done = plan[0], len(self.ran.measurements)
        how = ", at a reduced setting" if option.reduced else ""
        then = f"; then {joined([one.name for one in plan[1:]])}" if len(plan) > 1 else ""
        whole, told = duration(plan), [-MESSAGES]

        def report() -> None:
            now = time.monotonic()
            if now - told[0] < MESSAGES:
                return
            told[0] = now
            left = about(max(whole - deadline.spent(), 1.0))
            self.context.report_progress(
                f"{option.name}: {option.detector.title}{how} ({done + 1} of {done + len(plan)}, "
                f"about {left} left{then})"
            )

        return report
