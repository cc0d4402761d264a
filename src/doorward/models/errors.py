"""What models do wrong when they run."""

from __future__ import annotations

from doorward.core.errors import CouldNotTell, InputError


class ModelFailed(CouldNotTell, InputError):  # noqa: N818 - as the errors that it joins
    """Tells that a model's own code fails, or gives numbers that are not finite.

    A scan could not tell of such a model; to everything else it is an input that does not fit.
    """


class NotExamined(InputError):  # noqa: N818 - it names what became of the model
    """Tells that a file holds a model whose behaviour cannot be examined as it is: why, and what would help.

    A scan reports on its files all the same, and could not tell of the rest.
    """


class SizeUnknown(InputError):  # noqa: N818 - as the errors above
    """Tells that nothing says how large a model's images are."""
