"""Triggers: what wakes a backdoor, planted or recovered. They live in image space, [0, 1], NCHW."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from doorward.errors import InputError

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
        if kind not in _kinds:
            raise InputError(f"unknown trigger kind {kind!r}; known: {', '.join(sorted(_kinds))}")
        return _kinds[kind](**load(base64.b64decode(form["tensors"])), **form["settings"])


@dataclass(frozen=True, eq=False)
class MaskedPattern(Trigger):
    """Blend a pattern over a place: `x * (1 - mask) + mask * pattern`.

    Attributes:
        mask: (1, h, w) in [0, 1]; 1 replaces the pixel.
        pattern: (c, h, w) in [0, 1].
    """

    mask: Tensor
    pattern: Tensor
    kind: ClassVar[str] = "masked-pattern"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered images (n, c, h, w) in [0, 1].

        Raises:
            InputError: if the images have another size than the pattern.
        """
        if x.shape[1:] != self.pattern.shape:
            (c, h, w), (ci, hi, wi) = self.pattern.shape, x.shape[1:]
            raise InputError(
                f"the trigger is for {w}x{h} images with {c} channel(s); these are {wi}x{hi} with {ci}"
            )
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        return torch.lerp(x, pattern.expand_as(x), mask.expand_as(x))

    def tensors(self) -> dict[str, Tensor]:
        """Return mask and pattern."""
        return {"mask": self.mask, "pattern": self.pattern}
