"""Attacks: ways to plant a backdoor."""
