"""Which repair is used, and what repairs are given."""

from __future__ import annotations

from collections.abc import Callable

from doorward.core.errors import InputError
from doorward.core.records import NotRun
from doorward.data import Samples, open_samples
from doorward.methods import registry
from doorward.repair.request import RepairRequest
from doorward.repairs.base import Damage, Repair
from doorward.scan.context import ScanContext
from doorward.training import TrainingProgress


def choose_repair(request: RepairRequest, damage: Damage) -> tuple[Repair, tuple[NotRun, ...]]:
    """Return the repair that is asked for, or the first that fits, and why others do not.

    Raises:
        InputError: if there is no such repair, or none fits.
    """
    settings = request.settings or {}
    if request.method != "auto":
        named = registry.build("repair", request.method, settings)
        assert isinstance(named, Repair)
        return named, ()
    if settings:
        raise InputError("settings go with a repair that is named, as in --method relabelling")
    fitting, unfit = fitting_repairs(damage)
    if not fitting:
        raise InputError("no repair fits: " + "; ".join(f"{one.detector}: {one.reason}" for one in unfit))
    return fitting[0], unfit


def fitting_repairs(damage: Damage) -> tuple[tuple[Repair, ...], tuple[NotRun, ...]]:
    """Return the repairs that fit, the best first, and why others do not."""
    known = [registry.build("repair", name, {}) for name in registry.modules("repair")]
    fitting, unfit = [], []
    for one in sorted(known, key=lambda one: (one.order, one.method())):
        why = one.unfit(damage) if one.automatic else "it is used where it is named"
        if why is None:
            fitting.append(one)
        else:
            unfit.append(NotRun(detector=one.method(), reason=why))
    return tuple(fitting), tuple(unfit)


def open_data(request: RepairRequest, source: str | Samples, *, train: bool) -> Samples:
    """Open data as the request says where inputs and labels are."""
    if isinstance(source, Samples):
        return source
    prefer = ("train",) if train else ("test", "validation", "val", "train")
    return open_samples(source, column=request.data_column, label_column=request.label_column, prefer=prefer)


def told(context: ScanContext) -> Callable[[TrainingProgress], None]:
    """Return what reports how far a training is."""

    def show(now: TrainingProgress) -> None:
        if now.step % 20 == 0:
            context.report_progress(f"training: epoch {now.epoch + 1} of {now.epochs}")

    return show
