"""Pruning: take away the units that clean samples activate least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from doorward.core.errors import InputError
from doorward.core.records import Table
from doorward.methods.registry import register
from doorward.models import TorchClassifier
from doorward.repairs._clean import CleanRepair, judged_by
from doorward.repairs._units import Sweep, Units, find_units, mean_activations, remove, sweep, zero
from doorward.repairs.base import Damage, Mended, network_of
from doorward.triggers.base import Trigger


@dataclass(frozen=True)
class Plan:
    """Which units are pruned, and why.

    Attributes:
        order: numbers of the units (c,), the most dormant first.
        clean, triggered: mean activation of each unit (c,) on clean samples, and on the same with the
            recovered triggers, where there are any.
        swept: accuracy at every level.
        count: how many of the units are pruned.
    """

    units: Units
    order: Tensor
    clean: Tensor
    triggered: Tensor | None
    swept: Sweep
    count: int

    @property
    def pruned(self) -> Tensor:
        """Return the numbers of the units that are pruned."""
        return self.order[: self.count]

    @property
    def table(self) -> Table:
        """Return the curve: each unit in the order of pruning, its activation, and the accuracy after it."""
        after = [*self.swept.correct[1:], None]
        return Table(
            title=f"Pruning of {len(self.units):,} {self.units.what}: the first {self.count:,} are pruned",
            columns=("pruned", "unit", "mean on clean", "mean on triggered", "accuracy"),
            rows=tuple(
                (
                    level,
                    unit,
                    round(float(self.clean[unit]), 6),
                    None if self.triggered is None else round(float(self.triggered[unit]), 6),
                    None if right is None else right / self.swept.n,
                )
                for level, (unit, right) in enumerate(zip(self.order.tolist(), after, strict=True), start=1)
            ),
        )


def plan_pruning(network: TorchClassifier, damage: Damage, drop: float) -> Plan:
    """Return which units can be pruned before the accuracy on samples kept back has dropped too far.

    Raises:
        InputError: if the network has no units that can be pruned.
    """
    assert damage.clean is not None
    units = find_units(network)
    clean = mean_activations(network, units, damage.clean)
    triggered = None
    if damage.triggers:
        each = [mean_activations(network, units, damage.clean, _putting(t)) for t in damage.triggers]
        triggered = torch.stack(each).mean(0)
    order = clean.argsort(stable=True)
    swept = sweep(network, units, order, judged_by(damage))
    return Plan(units, order, clean, triggered, swept, prunable(swept, drop))


def _putting(trigger: Trigger) -> Callable[[Tensor], Tensor]:
    return lambda x: trigger.apply(x)


def prunable(swept: Sweep, drop: float) -> int:
    """Return how many units can be pruned before accuracy is first more than `drop` below what it was.

    >>> prunable(Sweep((10, 10, 9, 5, 10), n=10), 0.1)
    2
    """
    least = swept.correct[0] - drop * swept.n - 1e-9
    return next((level for level, right in enumerate(swept.correct) if right < least), len(swept.correct)) - 1


@register("repair")
class Pruning(CleanRepair):
    """Take away the units that clean samples activate least, as many as accuracy on samples kept back allows.

    Use it to see whether a backdoor sits in neurons that clean inputs leave dormant, and where a model
    may not be trained.

    The units are the channels of the last convolution, as the layer behind it is given them (so after
    pooling, and in residual networks after the sum), or the hidden units of a transformer's last MLP
    block.

    Accuracy is known for every level of pruning from one run of the network: the layer that reads the
    units is linear, so a unit's part in it is subtracted. Where the format of the file allows it, pruned
    units are cut out of the layers that make and read them, and the model gets smaller; else their
    weights become zero.

    We depart from the paper where branches are joined in front of the layer that reads them, so that
    channels cannot be told apart: there each of its inputs is a unit.
    """

    title = "Pruning of dormant units"
    source = "K. Liu, B. Dolan-Gavitt, S. Garg, RAID 2018, arXiv 1805.12185"
    limits = (
        "A backdoor in units that clean inputs activate as well, as the pruning-aware attack makes it, stays."
    )
    order: ClassVar[int] = 50

    remove_units: bool = Field(
        True, description="Whether pruned units are cut out, where the format allows it; else they are zero"
    )

    def mend(self, damage: Damage) -> Mended:
        """Return a model without its dormant units."""
        network = network_of(damage.classifier)
        plan = plan_pruning(network, damage, self.drop)
        if not plan.count:
            first, n = plan.swept.correct[1] if len(plan.swept.correct) > 1 else 0, plan.swept.n
            raise InputError(
                f"nothing can be pruned: without the most dormant of {len(plan.units):,} {plan.units.what} "
                f"{first / n:.1%} of {n:,} samples kept back are right, {plan.swept.correct[0] / n:.1%} with "
                f"it, and at most {self.drop:.1%} may be lost: allow more (drop), or use fine-tuning"
            )
        return Mended(
            cut(network, plan, damage, allowed=self.remove_units), damage.train, said(plan), (plan.table,)
        )


def cut(network: TorchClassifier, plan: Plan, damage: Damage, *, allowed: bool) -> TorchClassifier:
    """Return a network without the units that are pruned, smaller where that may be."""
    zero(network.module, plan.units, plan.pruned)
    if damage.keep_shapes or not allowed or not plan.count:
        return network
    return remove(network, plan.units, plan.pruned)


def said(plan: Plan) -> str:
    """Return what was pruned, as a sentence."""
    return f"{plan.count:,} of {len(plan.units):,} {plan.units.what} were pruned"
