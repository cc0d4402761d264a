"""Detectors that examine the suspect training set."""
