"""Attacks that poison the training set."""
