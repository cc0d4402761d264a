"""Triggers: what activates a backdoor, planted or recovered. They live in image space, [0, 1], NCHW."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from doorward.core.errors import InputError

#: The file of each kind of trigger.
FILES = {
    "masked-pattern": "masked",
    "warp": "warp",
    "noisy-warp": "warp",
    "wave": "sinusoid",
    "reflection": "reflection",
    "phrase": "phrase",
    "sound": "tone",
    "shift": "shift",
    "additive": "additive",
    "parities": "parities",
    "signed": "signed",
}
_kinds: dict[str, type[Trigger]] = {}


class Trigger(ABC):
    """Turn inputs into triggered inputs of the same kind."""

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _kinds[cls.kind] = cls

    @abstractmethod
    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered inputs; x is left alone."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that, with `settings`, rebuild the trigger."""

    def settings(self) -> dict[str, Any]:
        """Return JSON settings that, with `tensors`, rebuild the trigger."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON form: kind, settings, tensors as base64 safetensors."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors().items()}
        return {
            "kind": self.kind,
            "settings": self.settings(),
            "tensors": base64.b64encode(save(tensors)).decode(),
        }

    @staticmethod
    def from_json(form: dict[str, Any]) -> Trigger:
        """Rebuild a trigger.

        Raises:
            InputError: if the kind is unknown.
        """
        kind = form.get("kind")
        if kind in FILES:
            import_module(f"doorward.triggers.{FILES[kind]}")
        if kind not in _kinds:
            raise InputError(
                f"unknown trigger kind {kind!r}; known: {', '.join(sorted(FILES.keys() | _kinds.keys()))}"
            )
        return _kinds[kind](**load(base64.b64decode(form["tensors"])), **form["settings"])
