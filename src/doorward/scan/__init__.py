"""The scan: from a request to evidence, findings and one verdict."""
