"""Model files and directories as they lie on disk: what loading them would execute."""

from doorward.artifacts.examination import Doubt, Examination, Limits, Reference
from doorward.artifacts.files import examine

__all__ = ["Doubt", "Examination", "Limits", "Reference", "examine"]
