"""Attacks that change the model itself."""
