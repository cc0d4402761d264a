"""Classifiers and the file formats they come in."""

from doorward.models.classifier import Classifier, TorchClassifier
from doorward.models.formats.loading import LoadOptions, open_classifier, wrap
from doorward.models.spec import InputSpec, Resize

__all__ = ["Classifier", "InputSpec", "LoadOptions", "Resize", "TorchClassifier", "open_classifier", "wrap"]
