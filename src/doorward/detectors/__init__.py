"""Detectors: methods that examine a subject and say what was found."""
