"""What attacks, detectors and repairs have in common, and how they are found by name."""
