"""Repairs: methods that mend a model."""
