"""What comes with the package: a sub-sample of Fashion-MNIST, a backdoored model of it and its counterpart.

`tools/rebuild_reference.py` makes them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from doorward.data import Samples

#: Where it all lies.
FOLDER = Path(__file__).parent


def fashion_mnist(split: Literal["train", "test"]) -> Samples:
    """Return 6,000 training or 1,000 test images of Fashion-MNIST (28x28, grey, ten classes alike).

    Source: Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747; MIT licence, see the file next to them.
    """
    from doorward.data import open_samples

    return open_samples(FOLDER / "fashion_mnist", split=split)


def model(name: Literal["backdoored", "clean"]) -> Path:
    """Return the directory of an embedded model; the truth of the backdoored one is its `plant.json`."""
    return FOLDER / "models" / name
