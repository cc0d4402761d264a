"""The shell that attacks on the training data share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from doorward.data.samples import Raw, Samples
from doorward.errors import InputError
from doorward.methods import Method, make_generator
from doorward.plants import Plant, TriggeredSamples

if TYPE_CHECKING:
    import torch

    from doorward.triggers import Trigger


class Poisoned:
    """Hold a poisoned training set and its truth.

    Attributes:
        samples: the whole set; triggers are applied when a sample is decoded.
        plant: made on first use, since the ids of the poisoned samples come from the content of all.
    """

    def __init__(
        self,
        samples: Samples,
        plant: Plant,
        *,
        poisoned: npt.NDArray[np.int64],
        cover: npt.NDArray[np.int64],
    ) -> None:
        self.samples = samples
        self._plant, self._poisoned, self._cover = plant, poisoned, cover

    @cached_property
    def plant(self) -> Plant:
        """Return the truth."""
        ids = self.samples.ids
        return self._plant.model_copy(
            update={
                "poisoned_ids": tuple(ids[i] for i in self._poisoned),
                "cover_ids": tuple(ids[i] for i in self._cover),
            }
        )


class DataAttack(Method):
    """Put a trigger on some training samples and change their labels. Subclasses write `make_trigger` alone.

    Attributes:
        poison_rate: poisoned samples per sample of the whole set, in [0, 1].
        cover_rate: samples that get the trigger and keep their label, per sample of the whole set, in [0, 1];
            from other classes than the source classes where those are given.
        mapping: `all-to-one` turns every source class into the target; `all-to-all` turns class y into y + 1,
            and the last into the first.
        target: class of all-to-one; class 0 if None.
        source_classes: classes that are poisoned; all (but the target) if None.
    """

    poison_rate: float = Field(0.1, ge=0, le=1)
    cover_rate: float = Field(0.0, ge=0, le=1)
    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    target: int | None = Field(None, ge=0)
    source_classes: tuple[int, ...] | None = None

    @abstractmethod
    def make_trigger(self, example: Raw, *, generator: torch.Generator) -> Trigger:
        """Return the trigger for inputs like this one.

        Raises:
            InputError: if the settings do not fit such inputs.
        """

    @final
    def __call__(self, samples: Samples, *, seed: int = 0) -> Poisoned:
        """Poison a training set; nothing but the first sample is decoded before the result is read.

        Raises:
            InputError: if the settings and the samples do not fit.
        """
        import torch

        name = self.method()
        if samples.modality not in self.modalities:
            raise InputError(
                f"{name} works on {' or '.join(sorted(self.modalities))} data, not {samples.modality}"
            )
        if samples.labels is None or not len(samples):
            raise InputError(f"{name} needs labelled samples, and {samples.provenance.path} has none")
        target_map = self.target_map(samples.classes)
        generator = make_generator(seed, name)
        trigger = self.make_trigger(samples.raw([0])[0], generator=generator)
        order = torch.randperm(len(samples), generator=generator).numpy()
        is_source = np.isin(samples.labels, sorted(target_map))
        poisoned = self._first("poison_rate", self.poison_rate, order[is_source[order]], len(samples))
        spared = np.ones(len(samples), dtype=np.bool_)
        spared[poisoned] = False
        if self.source_classes is not None:
            spared &= ~is_source & ~np.isin(samples.labels, sorted(set(target_map.values())))
        cover = self._first("cover_rate", self.cover_rate, order[spared[order]], len(samples))
        where = np.zeros(len(samples), dtype=np.bool_)
        where[poisoned] = where[cover] = True
        labels = samples.labels.copy()
        labels[poisoned] = [target_map[int(y)] for y in samples.labels[poisoned]]
        return Poisoned(
            TriggeredSamples(samples, trigger, where=where, labels=labels, made_by=name),
            Plant(
                attack=name,
                settings=self.settings(),
                seed=seed,
                modality=samples.modality,
                trigger=trigger.to_json(),
                target_map=target_map,
                targets=tuple(sorted(set(target_map.values()))),
                source_classes=tuple(sorted(target_map)),
                poison_rate=len(poisoned) / len(samples),
            ),
            poisoned=poisoned,
            cover=cover,
        )

    def target_map(self, classes: Sequence[str]) -> dict[int, int]:
        """Return what the attack turns each source class into.

        Raises:
            InputError: if target or source classes are not among the classes, or no source is left.
        """
        name, k = self.method(), len(classes)
        if self.mapping == "all-to-all" and self.target is not None:
            raise InputError(f"{name}: all-to-all has no target of its own; leave out target = {self.target}")
        target = self.target or 0
        for setting, values in (("target", [target]), ("source_classes", self.source_classes or ())):
            wrong = [value for value in values if not 0 <= value < k]
            if wrong:
                raise InputError(
                    f"{name}: {setting} {wrong[0]} is no class; there are {k}, from 0 to {k - 1}"
                )
        sources = range(k) if self.source_classes is None else sorted(set(self.source_classes))
        if self.mapping == "all-to-all":
            target_map = {y: (y + 1) % k for y in sources if k > 1}
        else:
            target_map = {y: target for y in sources if y != target}
        if not target_map:
            raise InputError(f"{name}: no source class is left besides target {target}; name others")
        return target_map

    def _first(
        self, setting: str, rate: float, candidates: npt.NDArray[np.int64], total: int
    ) -> npt.NDArray[np.int64]:
        """Return the positions, ascending, of as many candidates as the rate asks for."""
        count = round(rate * total)
        if rate and not count:
            raise InputError(
                f"{self.method()}: {setting} {rate} of {total} samples is none; give a higher one"
            )
        if count > len(candidates):
            raise InputError(
                f"{self.method()}: {setting} {rate} asks for {count} of {total} samples, "
                f"and {len(candidates)} are of classes that can be taken; give a lower one"
            )
        return np.sort(candidates[:count])
