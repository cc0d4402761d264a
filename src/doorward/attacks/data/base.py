"""The shell that attacks on the training data share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from doorward.attacks.ground_truth import PlantedBackdoor, TriggeredSamples
from doorward.core.errors import InputError
from doorward.core.seeds import derive_seed, make_generator
from doorward.data.imbalance import step_imbalance
from doorward.data.samples import Raw, Samples
from doorward.methods.base import Method

if TYPE_CHECKING:
    import torch

    from doorward.triggers.base import Trigger


class Poisoned:
    """A poisoned training set and its truth.

    Attributes:
        samples: the whole set; triggers are applied when a sample is decoded.
        plant: made on first use, since the ids of the poisoned samples come from the content of all.
    """

    def __init__(
        self,
        samples: Samples,
        plant: PlantedBackdoor,
        *,
        poisoned: npt.NDArray[np.int64],
        cover: npt.NDArray[np.int64],
    ) -> None:
        self.samples = samples
        self._plant, self._poisoned, self._cover = plant, poisoned, cover

    @cached_property
    def plant(self) -> PlantedBackdoor:
        """Return the truth."""
        ids = self.samples.ids
        return self._plant.model_copy(
            update={
                "poisoned_ids": tuple(ids[i] for i in self._poisoned),
                "cover_ids": tuple(ids[i] for i in self._cover),
            }
        )


@dataclass(frozen=True)
class Triggers:
    """The trigger that training samples get, and the one that is put on others when it is tested.

    Attributes:
        others: triggers that training samples get by turns with the first.
        cover: what cover samples get, if not what poisoned ones do.
    """

    training: Trigger
    test: Trigger
    others: tuple[Trigger, ...] = ()
    cover: Trigger | None = None


class DataAttack(Method):
    """Put a trigger on some training samples and change their labels.

    Most subclasses write `make_trigger` alone. Where training and test need different triggers, or there is
    none, they write `make_triggers` in its place; `change` and `new_labels` serve attacks that do more, or
    less, than to put a trigger on and relabel.

    Attributes:
        poison_rate: poisoned samples per sample of the whole set, in [0, 1].
        cover_rate: samples that get the trigger and keep their label, per sample of the whole set, in [0, 1];
            from other classes than the source classes where those are given.
        mapping: `all-to-one` turns every source class into the target; `all-to-all` turns class y into y + 1,
            and the last into the first.
        target: class of all-to-one; class 0 if None.
        source_classes: classes that the trigger turns into the target; all (but the target) if None.
        imbalance: mu and rho: the share of classes, drawn by the seed, that are thinned before anything else,
            in (0, 1), and how many times their size the largest class has, 1 at least.
    """

    #: Whether samples of the target class are poisoned, and keep their label.
    clean_label: ClassVar[bool] = False

    poison_rate: float = Field(0.1, ge=0, le=1)
    cover_rate: float = Field(0.0, ge=0, le=1)
    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    target: int | None = Field(None, ge=0)
    source_classes: tuple[int, ...] | None = None
    imbalance: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(ge=1)]] | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types; imbalance only where it is asked for."""
        return self.model_dump(mode="json", exclude={"imbalance"} if self.imbalance is None else None)

    def keeps_labels(self) -> bool:
        """Return whether samples of the target class are poisoned, and keep their label."""
        return self.clean_label

    def make_trigger(self, example: Raw, *, generator: torch.Generator) -> Trigger:
        """Return the trigger for inputs like this one.

        Raises:
            InputError: if the settings do not fit such inputs.
        """
        raise NotImplementedError(f"{self.method()} writes neither make_trigger nor make_triggers")

    def make_triggers(self, samples: Samples, *, generator: torch.Generator) -> Triggers | None:
        """Return the triggers for training and test, None if the attack has none.

        Raises:
            InputError: if the settings do not fit the samples.
        """
        trigger = self.make_trigger(samples.raw([0])[0], generator=generator)
        return Triggers(training=trigger, test=trigger)

    def change(
        self, samples: Samples, poisoned: npt.NDArray[np.int64], *, generator: torch.Generator
    ) -> Samples:
        """Return the samples as the trigger finds them: those at the positions `poisoned` may be changed.

        Raises:
            InputError: if the settings do not fit the samples.
        """
        return samples

    def new_labels(
        self,
        samples: Samples,
        poisoned: npt.NDArray[np.int64],
        target_map: dict[int, int],
        *,
        generator: torch.Generator,
    ) -> npt.NDArray[np.int64]:
        """Return the labels (m,) that the samples at the positions `poisoned` get."""
        assert samples.labels is not None, "the caller checks"
        labels = samples.labels[poisoned]
        if self.keeps_labels():
            return labels
        return np.array([target_map[int(y)] for y in labels], dtype=np.int64)

    @final
    def __call__(self, samples: Samples, *, seed: int = 0) -> Poisoned:
        """Poison a training set; most attacks decode nothing but one sample before the result is read.

        Raises:
            InputError: if the settings and the samples do not fit.
        """
        import torch

        name = self.method()
        if samples.modality not in self.modalities:
            raise InputError(
                f"{name} works on {' or '.join(sorted(self.modalities))} data, not {samples.modality}"
            )
        if self.imbalance is not None:
            # by no draw of the attack's own: under one seed all attacks poison the same thinned set
            rng = np.random.default_rng(derive_seed(seed, "imbalance"))
            samples = step_imbalance(samples, *self.imbalance, rng=rng)
        if samples.labels is None or not len(samples):
            raise InputError(f"{name} needs labelled samples, and {samples.provenance.path} has none")
        target_map = self.target_map(samples.classes)
        targets, total = sorted(set(target_map.values())), len(samples)
        can_poison = np.isin(samples.labels, targets if self.keeps_labels() else sorted(target_map))  # (n,)
        can_cover = np.ones(total, dtype=np.bool_)
        if self.source_classes is not None:
            can_cover = ~np.isin(samples.labels, [*target_map, *targets])
        elif self.keeps_labels():
            can_cover = ~can_poison
        count = self._count("poison_rate", self.poison_rate, int(can_poison.sum()), total)
        overlap = count if (can_cover & can_poison).any() else 0
        covers = self._count("cover_rate", self.cover_rate, int(can_cover.sum()) - overlap, total)

        generator = make_generator(seed, name)
        triggers = self.make_triggers(samples, generator=generator)
        order = torch.randperm(total, generator=generator).numpy()
        poisoned = np.sort(order[can_poison[order]][:count])
        can_cover[poisoned] = False
        cover = np.sort(order[can_cover[order]][:covers])
        where, others = np.zeros(total, dtype=np.int64), triggers.others if triggers else ()
        if triggers is not None:
            turn = np.argsort(order) % (1 + len(others))  # (n,)
            where[poisoned], where[cover] = 1 + turn[poisoned], 1 + turn[cover]
            if triggers.cover is not None:
                others = (*others, triggers.cover)
                where[cover] = 1 + len(others)
        labels = samples.labels.copy()
        labels[poisoned] = self.new_labels(samples, poisoned, target_map, generator=generator)
        changed = self.change(samples, poisoned, generator=generator)
        activates = target_map if triggers else {}
        return Poisoned(
            TriggeredSamples(
                changed,
                triggers.training if triggers else None,
                where=where,
                labels=labels,
                made_by=name,
                others=others,
            ),
            PlantedBackdoor(
                attack=name,
                settings=self.settings(),
                seed=seed,
                modality=samples.modality,
                trigger=triggers.test.to_json() if triggers else None,
                target_map=activates,
                targets=tuple(sorted(set(activates.values()))),
                source_classes=tuple(sorted(activates)),
                poison_rate=count / total,
            ),
            poisoned=poisoned,
            cover=cover,
        )

    def target_map(self, classes: Sequence[str]) -> dict[int, int]:
        """Return what the attack turns each source class into.

        Raises:
            InputError: if target or source classes are not among the classes, no source is left, or the
                mapping needs labels that change.
        """
        name, k = self.method(), len(classes)
        if self.mapping == "all-to-all" and self.target is not None:
            raise InputError(f"{name}: all-to-all has no target of its own; leave out target = {self.target}")
        if self.mapping == "all-to-all" and self.keeps_labels():
            raise InputError(f"{name}: all-to-all is taught by labels that change, and here they are kept")
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

    def _count(self, setting: str, rate: float, available: int, total: int) -> int:
        """Return how many samples the rate asks for."""
        count = round(rate * total)
        if rate and not count:
            raise InputError(
                f"{self.method()}: {setting} {rate} of {total} samples is none; give a higher one"
            )
        if count > available:
            raise InputError(
                f"{self.method()}: {setting} {rate} asks for {count} of {total} samples, "
                f"and {available} are of classes that can be taken; give a lower one"
            )
        return count
