"""No model is judged by clean models of its own data: for each, those are left out of the calibration set."""

from __future__ import annotations

from functools import reduce

from doorward.scan.calibration import CalibrationSet


def family(data: str) -> str:
    """Return the name that data sets of one make share.

    >>> family("glyphs-hard"), family("glyphs"), family("merged:2:glyphs")
    ('glyphs', 'glyphs', 'glyphs')
    """
    return data.rpartition(":")[2].removesuffix("-hard")


def left_out(calibration: CalibrationSet, data: str) -> CalibrationSet:
    """Return the calibration set without the models of a data set and of its family, if it has any."""
    own = sorted({model.data for model in calibration.models if family(model.data) == family(data)})
    return reduce(CalibrationSet.without, own, calibration)
