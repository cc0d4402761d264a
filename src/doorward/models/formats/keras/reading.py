"""What a Keras file holds: the configuration of its layers, and their weights. Nothing in it is run.

Two forms exist. A `.keras` archive holds `config.json` and `model.weights.h5`, whose groups are named after
the kinds of layers and whose weights are numbered. An HDF5 file of Keras 2 and 3 holds the configuration as
an attribute, and weights by name. HDF5 is read by pyfive, which is written in Python: a hostile file does not
meet the HDF5 library in C, follows no link out of the file, and loads no filter from elsewhere.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from doorward.models.formats.rebuilt import MOST_BYTES, Array, Unreadable, read_bytes, require

CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
#: Bytes of a configuration beyond which a model is refused.
MOST_CONFIG = 1 << 26
#: Packages that Keras' own layers are of.
KERAS = ("keras", "tensorflow", "tf_keras")
#: Groups and datasets of one layer, at most.
MOST_HELD = 10_000
#: How much larger weights may be than the file that holds them packed, and what any file may hold.
MOST_UNPACKED, LEAST = 100, 1 << 16
#: Where HDF5 says that the numbers of a dataset lie if they are not in the file.
ELSEWHERE = (1 << 64) - 1


@dataclass(frozen=True)
class Layer:
    """A layer as its configuration has it.

    Attributes:
        kind: name of its class, such as 'Conv2D'.
        name: its own name, unique in its model.
        config: its settings.
        nodes: how it is called in a model that is a graph; none in a sequence.
    """

    kind: str
    name: str
    config: Mapping[str, Any]
    nodes: Sequence[Any]

    @classmethod
    def of(cls, value: Any) -> Layer:
        """Return the layer that an object of the configuration describes.

        Raises:
            Unreadable: if it describes none.
        """
        if not isinstance(value, dict):
            raise Unreadable("a layer of its configuration is no object")
        kind, config = value.get("class_name"), value.get("config")
        module, registered = str(value.get("module") or "keras"), str(value.get("registered_name") or "")
        if ">" in f"{kind}{registered}" or module.split(".")[0] not in KERAS:
            raise Unreadable(f"it has a layer of somebody's own, {registered or kind}")
        if ".ops" in module:
            kind = f"ops.{kind}"
        if isinstance(config, list):  # a sequence of Keras before 2.2.3
            config = {"layers": config}
        if not isinstance(kind, str) or not isinstance(config, dict):
            raise Unreadable("a layer of its configuration has no class or no settings")
        name = value.get("name") or config.get("name") or kind.lower()
        return cls(kind, str(name), config, value.get("inbound_nodes") or ())

    def layers(self) -> list[Layer]:
        """Return the layers of a model.

        Raises:
            Unreadable: if it has none.
        """
        inner = self.config.get("layers")
        if not isinstance(inner, list) or not inner:
            raise Unreadable(f"its model {self.name!r} has no layers")
        return [Layer.of(one) for one in inner]


class Weights(Protocol):
    """The weights of a model's layers."""

    numbered: bool
    """Whether weights are found by the order of layers."""

    def of(self, layer: Layer, names: Sequence[str]) -> list[Array]:
        """Return weights of a layer in the order of their names.

        Raises:
            Unreadable: if they are not there.
        """
        ...

    def within(self, model: Layer) -> Weights:
        """Return the weights of a model that is a layer of this one."""
        ...


@dataclass(frozen=True)
class KerasFile:
    """A Keras model that was read.

    Attributes:
        model: its outermost layer, a model.
        version: the version of Keras that wrote it, such as (2, 9); (0,) where it does not say.
        weights: of its layers.
    """

    model: Layer
    version: tuple[int, ...]
    weights: Weights


def read_keras(path: Path) -> KerasFile:
    """Read a Keras file.

    Raises:
        Unreadable: if it is none, or one that is not read; pyfive and json raise what they like besides.
    """
    require("pyfive", "keras")
    content = read_bytes(path)
    return _of_archive(content) if content.startswith(b"PK\x03\x04") else _of_hdf5(content)


def _of_archive(content: bytes) -> KerasFile:
    import pyfive

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        unpacked = min(MOST_BYTES, MOST_UNPACKED * max(len(content), LEAST))
        for name, most in ((CONFIG, MOST_CONFIG), (METADATA, MOST_CONFIG), (WEIGHTS, unpacked)):
            if name not in sizes:
                raise Unreadable(f"this archive of Keras has no {name}")
            if sizes[name] > most:
                raise Unreadable(f"its {name} is too large")
        config, metadata = (json.loads(archive.read(name)) for name in (CONFIG, METADATA))
        root = pyfive.File(io.BytesIO(archive.read(WEIGHTS)))
    model, bound = Layer.of(config), _Bound(len(content))
    return KerasFile(model, _version(metadata.get("keras_version")), _Numbered(root, bound, model.layers()))


def _of_hdf5(content: bytes) -> KerasFile:
    import pyfive

    root = pyfive.File(io.BytesIO(content))
    config = _text(root.attrs.get("model_config"))
    if config is None or "model_weights" not in root:
        raise Unreadable("it holds weights alone; save the whole model: model.save('model.keras')")
    if len(config) > MOST_CONFIG:
        raise Unreadable("its configuration is too large")
    version = _version(_text(root.attrs.get("keras_version")))
    return KerasFile(
        Layer.of(json.loads(config)), version, _Named(root["model_weights"], _Bound(len(content)))
    )


def _text(value: Any) -> str | None:
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _version(value: Any) -> tuple[int, ...]:
    """Return a version's numbers, (0,) where there are none.

    >>> _version("2.9.0"), _version("2.15.0-tf"), _version(None)
    ((2, 9, 0), (2, 15, 0), (0,))
    """
    return tuple(int(part) for part in re.findall(r"\d+", str(value))[:3]) or (0,)


class _Bound:
    """Keep what weights unpack to within a multiple of their file."""

    def __init__(self, file_bytes: int) -> None:
        self.left = MOST_UNPACKED * max(file_bytes, LEAST)

    def read(self, dataset: Any) -> Array:
        """Return a dataset's numbers.

        Raises:
            Unreadable: if they are too many, not in the file, or no numbers.
        """
        if getattr(dataset.id, "data_offset", 0) == ELSEWHERE:
            raise Unreadable("it has weights that lie in another file")
        self.left -= max(4, dataset.dtype.itemsize) * math.prod(dataset.shape)
        if self.left < 0:
            raise Unreadable("its weights unpack to far more than the file holds")
        values = np.asarray(dataset[...])
        if values.dtype.kind not in "fiu":
            raise Unreadable(f"it has weights of the type {values.dtype}")
        return values.astype(np.float32)


class _Named:
    """Weights by name, as an HDF5 file of a whole model has them."""

    numbered = False

    def __init__(self, group: Any, bound: _Bound, found: Mapping[tuple[str, ...], Any] | None = None) -> None:
        self._group, self._bound, self._found = group, bound, found

    def of(self, layer: Layer, names: Sequence[str]) -> list[Array]:
        """Return weights by the last part of their names: 'conv2d_1/kernel:0' is a kernel."""
        if self._found is None:
            held = dict(_datasets(self._group[layer.name])) if layer.name in self._group else {}
        else:  # of a model in a model: all its layers' weights lie in one group
            held = {key: value for key, value in self._found.items() if layer.name in key[:-1]}
        leaves = {key[-1]: value for key, value in held.items()}
        missing = [name for name in names if name not in leaves]
        more = sorted(set(leaves) - set(names) - {"count"})
        if missing or more or len(leaves) != len(held):
            what = f"no {missing[0]}" if missing else more[0] if more else "weights of one name"
            raise Unreadable(f"it has {what} for its layer {layer.name!r}")
        return [self._bound.read(leaves[name]) for name in names]

    def within(self, model: Layer) -> Weights:
        if self._found is not None:
            return self
        held = dict(_datasets(self._group[model.name])) if model.name in self._group else {}
        return _Named(self._group, self._bound, held)


def _datasets(
    group: Any, path: tuple[str, ...] = (), seen: list[int] | None = None
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the datasets below a group, each with its path of plain names."""
    seen = [0] if seen is None else seen
    if len(path) > 32:
        raise Unreadable("its groups of weights are nested too deeply")
    for name in group:
        inner = group[name]
        seen[0] += 1
        if seen[0] > MOST_HELD:
            raise Unreadable("its groups of weights have no end")
        place = (*path, re.sub(r"(:\d+)$", "", name))
        if hasattr(inner, "keys"):
            yield from _datasets(inner, place, seen)
        else:
            yield place, inner


class _Numbered:
    """Weights by number, in groups named after the kinds of layers, as a .keras archive has them."""

    numbered = True

    def __init__(self, group: Any, bound: _Bound, layers: Sequence[Layer]) -> None:
        self._group, self._bound = group.get("layers", group), bound
        self._places: dict[str, str] = {}
        seen: Counter[str] = Counter()
        for layer in layers:
            snake = _snake(layer.kind)
            self._places[layer.name] = f"{snake}_{seen[snake]}" if seen[snake] else snake
            seen[snake] += 1

    def _place(self, layer: Layer) -> Any:
        place = self._places[layer.name]
        if place not in self._group:
            raise Unreadable(f"it has no weights for its layer {layer.name!r}")
        return self._group[place]

    def of(self, layer: Layer, names: Sequence[str]) -> list[Array]:
        group = self._place(layer)
        own = group.get("vars", {})
        held = sorted((name for name in own if name.isdigit()), key=int)
        spare = 1 if "variance" in names else 0  # how many images a Normalization saw
        if not len(names) <= len(held) <= len(names) + spare:
            raise Unreadable(
                f"it has {len(held)} weights for its layer {layer.name!r}, which takes {len(names)}"
            )
        return [self._bound.read(own[name]) for name in held[: len(names)]]

    def within(self, model: Layer) -> Weights:
        return _Numbered(self._place(model), self._bound, model.layers())


def _snake(name: str) -> str:
    """Return the name of a class as Keras writes it in its archives.

    >>> _snake("Conv2D"), _snake("BatchNormalization"), _snake("PReLU")
    ('conv2d', 'batch_normalization', 'p_re_lu')
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
