"""Packages that are called like the function that they are named after."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package whose module `pipeline` has a function of the package's own name."""

    def __call__(self, *words: Any, **named: Any) -> Any:
        function = getattr(import_module(f"{self.__name__}.pipeline"), self.__name__.rpartition(".")[2])
        return function(*words, **named)


def make_callable(name: str) -> None:
    """Let a package be called, so that `doorward.scan(model)` works whatever was imported before.

    `doorward.scan` is the function as long as nobody has imported the package of that name, and that package
    from then on.
    """
    sys.modules[name].__class__ = _Callable
