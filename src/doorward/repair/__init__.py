"""Repair a model: scan it and its data, choose a method by what is found, mend, and look again."""

import doorward.core.packages
from doorward.repair.choice import choose_repair
from doorward.repair.pipeline import repair
from doorward.repair.report import RepairOutcome, RepairReport, TriggerRecord
from doorward.repair.request import RepairRequest

__all__ = ["RepairOutcome", "RepairReport", "RepairRequest", "TriggerRecord", "choose_repair", "repair"]

doorward.core.packages.make_callable(__name__)
