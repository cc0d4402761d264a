"""A detector of somebody else's."""
