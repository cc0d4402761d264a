"""Filter the inputs of a running model."""
