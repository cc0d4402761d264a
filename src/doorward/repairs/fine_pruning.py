"""Fine-pruning: prune dormant units, and fine-tune what is left."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from doorward.methods.registry import register
from doorward.repairs._clean import check_accuracy
from doorward.repairs._units import silenced
from doorward.repairs.base import Damage, Mended, network_of
from doorward.repairs.fine_tuning import ADVICE, TunedRepair
from doorward.repairs.pruning import cut, plan_pruning, said


@register("repair")
class FinePruning(TunedRepair):
    """Prune the units that clean samples activate least, then fine-tune what is left on clean samples.

    Use it where nothing was found, or no trigger recovered: pruning takes away a backdoor in dormant units,
    and fine-tuning one in units that clean samples use as well.

    We depart from the paper in fine-tuning: it is sharpness-aware unless another variant is asked for.
    """

    title = "Fine-pruning"
    source = "K. Liu, B. Dolan-Gavitt, S. Garg, RAID 2018, arXiv 1805.12185"
    limits = (
        "It cannot promise that a backdoor is gone; triggers that are spread over the image resist it best."
    )
    order: ClassVar[int] = 30

    remove_units: bool = Field(
        True, description="Whether pruned units are cut out, where the format allows it; else they are zero"
    )

    def mend(self, damage: Damage) -> Mended:
        """Return a model without its dormant units that has gone on training on the clean samples."""
        network = network_of(damage.classifier)
        plan = plan_pruning(network, damage, self.drop)
        with silenced(network.module, plan.units, plan.pruned):
            done = self.tune(network, damage)
        mended = cut(network, plan, damage, allowed=self.remove_units)
        check_accuracy(mended, damage, self.drop, advice=ADVICE)
        return Mended(mended, damage.train, f"{said(plan)}, and {done}", (plan.table,))
