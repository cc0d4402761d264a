"""Trigger search: what sends images of other classes to a class."""
