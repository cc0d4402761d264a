"""Triggers: what activates a backdoor, planted or recovered; one file per kind."""
