"""Detectors that examine what arrives at run time."""
