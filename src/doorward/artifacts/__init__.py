"""Model files and directories as they lie on disk: what loading them would execute."""

from doorward.artifacts.files import Examination, Limits, examine
from doorward.artifacts.pickles import Reference

__all__ = ["Examination", "Limits", "Reference", "examine"]
