"""Detectors that read the files of a model."""
