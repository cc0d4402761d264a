"""Detectors that examine weights and behaviour."""
