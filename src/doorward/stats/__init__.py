"""Metrics and outlier statistics: pure functions."""
