"""No model is judged by clean models of its own data: for each, those are left out of the bank."""

from __future__ import annotations

from functools import reduce

from doorward.scan.calibration import Bank


def family(data: str) -> str:
    """Return the name that data sets of one make share.

    >>> family("glyphs-hard"), family("glyphs")
    ('glyphs', 'glyphs')
    """
    return data.removesuffix("-hard")


def left_out(bank: Bank, data: str) -> Bank:
    """Return the bank without the models of a data set, and of others of its make; itself if it has none."""
    own = sorted({model.data for model in bank.models if family(model.data) == family(data)})
    return reduce(Bank.without, own, bank)
