"""Evasion attacks, to compare backdoors with; they change an input and no model, and are no plants."""

from doorward.bench.evasion._toolbox import ATTACKS, Evaded, evade

__all__ = ["ATTACKS", "Evaded", "evade"]
