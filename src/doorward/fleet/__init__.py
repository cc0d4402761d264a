"""Scan many models, each once, and go on where a run was stopped."""
