"""Serve a guarded model over HTTP, by the Open Inference Protocol."""
