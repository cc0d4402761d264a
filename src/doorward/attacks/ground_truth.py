"""The truth of a plant: which trigger turns what into what, and how well it worked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from doorward.core.errors import InputError
from doorward.core.records import SCHEMA_VERSION, Rate, Record
from doorward.data.samples import Modality, Provenance, Samples
from doorward.models.encode.dispatch import NOUNS

if TYPE_CHECKING:
    from doorward.models.classifier import Classifier
    from doorward.triggers.base import Trigger

#: More ids than this are written to a file of their own, one a line, which ends in what the field has here.
MANY_IDS = 20_000
BESIDE = {"poisoned_ids": ".ids.txt", "cover_ids": ".cover-ids.txt"}


class PlantedBackdoor(Record):
    """The truth of one plant. Detectors and repairs never see it."""

    schema_version: str = SCHEMA_VERSION
    attack: str
    settings: dict[str, Any]
    seed: int
    modality: str
    trigger: dict[str, Any] | None = Field(
        description="The trigger's JSON form; None if there is no single one"
    )
    target_map: dict[int, int] = Field(description="What the trigger turns each source class into")
    targets: tuple[int, ...]
    source_classes: tuple[int, ...]
    poisoned_ids: tuple[str, ...] | str = Field(
        (),
        description="Samples that were poisoned, with the trigger and a wrong label unless the attack spares "
        "one of them: their ids in the poisoned set, or the file",
    )
    cover_ids: tuple[str, ...] | str = Field(
        (),
        description="Samples with the trigger, or what the attack has in its place, and their own label: "
        "their ids in the poisoned set, or the file",
    )
    poison_rate: float | None = Field(
        None, ge=0, le=1, description="Poisoned samples per sample, as it came out"
    )
    clean_accuracy: Rate | None = None
    attack_success: Rate | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.targets != tuple(sorted(set(self.target_map.values()))):
            raise ValueError("targets are the values of target_map, sorted")
        if self.source_classes != tuple(sorted(self.target_map)):
            raise ValueError("source_classes are the keys of target_map, sorted")
        return self


def write_plant(plant: PlantedBackdoor, path: str | Path) -> None:
    """Write a plant as JSON; very many ids go to `<stem>.ids.txt` and `<stem>.cover-ids.txt` next to it."""
    path = Path(path)
    for field, ending in BESIDE.items():
        ids = getattr(plant, field)
        if isinstance(ids, tuple) and len(ids) > MANY_IDS:
            beside = path.with_suffix(ending)
            beside.write_text("".join(f"{value}\n" for value in ids), encoding="ascii")
            plant = plant.model_copy(update={field: beside.name})
    path.write_text(plant.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_plant(path: str | Path) -> PlantedBackdoor:
    """Read a plant and its ids.

    Raises:
        InputError: if the file is missing or holds no plant.
    """
    path = Path(path)
    try:
        plant = PlantedBackdoor.model_validate_json(path.read_bytes())
        for field in BESIDE:
            name = getattr(plant, field)
            if isinstance(name, str):
                # a bare name: a plant from elsewhere must not point at other files
                ids = (path.parent / Path(name).name).read_text(encoding="ascii").split()
                plant = plant.model_copy(update={field: tuple(ids)})
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); a plant was expected"
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{path} holds no plant as `doorward plant` writes it") from error
    return plant


class TriggeredSamples(Samples):
    """Show samples of another set, some with the trigger, applied when they are decoded.

    Ids are those of the triggered content.

    Args:
        base: the samples as they were.
        trigger: for the samples' kind of input; on images its result is rounded to uint8, in training and in
            tests alike. None if no sample gets any.
        where: (n,) bool or int: 0 for samples as they are, 1 for those with the trigger, from 2 on for those
            with one of the others.
        labels: (n,) the labels to show.
        made_by: who triggered them, for the provenance.
        others: triggers that some samples get instead.
    """

    def __init__(
        self,
        base: Samples,
        trigger: Trigger | None,
        *,
        where: npt.NDArray[np.bool_] | npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        made_by: str,
        others: Sequence[Trigger] = (),
    ) -> None:
        self._base, self._triggers, self._where = base, (trigger, *others), where
        self.modality, self.classes, self.labels = base.modality, base.classes, labels
        self.provenance = Provenance(f"{base.provenance.path} ({made_by})", None, len(base))

    def __len__(self) -> int:
        return len(self._base)

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        """Decode some samples and put the trigger on those that get it.

        Raises:
            InputError: if one cannot be decoded, or has another size than the trigger.
        """
        positions = np.asarray(indices, dtype=np.int64)
        raws = self._base.raw(positions)
        where = self._where[positions]
        for number, trigger in enumerate(self._triggers, start=1):
            chosen = np.flatnonzero(where == number)
            if trigger is not None and len(chosen):
                triggered_inputs = _APPLY[self.modality](trigger, [raws[i] for i in chosen])
                for i, raw in zip(chosen, triggered_inputs, strict=True):
                    raws[i] = raw
        return raws


def _on_images(trigger: Trigger, images: list[Any]) -> Any:
    """Return images (h, w, c) uint8 with a trigger that lives in image space."""
    from doorward.models.encode.image import from_raw, to_uint8

    return to_uint8(trigger.apply(from_raw(images)))


def _on_raw(trigger: Trigger, raws: Any) -> Any:
    """Return texts or recordings with a trigger that takes them as they are."""
    return trigger.apply(raws)


#: How a trigger is put on raw inputs of each kind.
_APPLY: dict[Modality, Callable[[Trigger, list[Any]], Any]] = {
    "image": _on_images,
    "text": _on_raw,
    "audio": _on_raw,
}


def triggered(samples: Samples, plant: PlantedBackdoor) -> Samples:
    """Return the samples of the source classes with the trigger on, labelled with what the attack wants.

    Samples that belong to the target class anyway are not among them.

    Raises:
        InputError: if there are no labels, the plant has no trigger of its own, or one for another kind of
            input.
    """
    from doorward.triggers.base import Trigger

    if samples.labels is None:
        raise InputError(f"attack success needs labels, and {samples.provenance.path} has none")
    if plant.trigger is None:
        raise InputError(f"the plant of {plant.attack} has no trigger that can be put on other samples")
    if samples.modality != plant.modality:
        raise InputError(
            f"the trigger of {plant.attack} is for {NOUNS[plant.modality]}, and {samples.provenance.path} "
            f"holds {NOUNS[samples.modality]}"
        )
    wanted = np.array([plant.target_map.get(int(y), int(y)) for y in samples.labels], dtype=np.int64)
    chosen = np.flatnonzero(wanted != samples.labels)
    return TriggeredSamples(
        samples.select(chosen),
        Trigger.from_json(plant.trigger),
        where=np.ones(len(chosen), dtype=np.bool_),
        labels=wanted[chosen],
        made_by=plant.attack,
    )


def attack_success(classifier: Classifier, samples: Samples, plant: PlantedBackdoor) -> Rate:
    """Return how often the trigger turns samples of the source classes into their target."""
    from doorward.training import evaluate

    return evaluate(classifier, triggered(samples, plant))
