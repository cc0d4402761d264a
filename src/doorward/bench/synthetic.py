"""Generated images to calibrate on: data sets that no suite judges by.

Each name is a family and, where wanted, a difficulty: `glyphs`, `glyphs-easy`, `glyphs-hard`. A seed makes
one world of classes, in groups of similar ones, of unequal size and difficulty, as real data has them.

Prototypes are drawn once by Pillow and kept as signed distances to their outline, so that position, turn,
warp and stroke of each image are array operations on a block of images.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.polynomial.legendre import legval
from PIL import Image, ImageDraw, ImageFont

from doorward.core.errors import InputError
from doorward.core.seeds import derive_seed
from doorward.data.samples import InMemorySamples, Samples

Split = Literal["train", "test"]
Floats: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int64]
#: Part of the seed of every draw: another number gives other worlds and other images.
EDITION = 1
T = TypeVar("T")

#: How far images vary and how much spoils them.
DIFFICULTIES: dict[str, float] = {"easy": 0.65, "normal": 1.0, "hard": 1.6}

_BLOCK = 256
_SIDE = 64  # of a prototype, in pixels


def names() -> tuple[str, ...]:
    """Return all names that `open_synthetic` knows."""
    endings = ("" if level == "normal" else f"-{level}" for level in DIFFICULTIES)
    return tuple(sorted(family + ending for ending in endings for family in FAMILIES))


def open_synthetic(name: str, *, split: Split, rows: int, seed: int, classes: int, size: int = 28) -> Samples:
    """Generate labelled images; the same arguments give the same pixels.

    Train and test split share the classes of their seed, and nothing else.

    Args:
        name: a family and a difficulty, one of `names()`.
        rows: number of images; classes have unequal shares of them.
        classes: number of classes, 2 at least.
        size: side of the square images in pixels, 16 to 64.

    Raises:
        InputError: if the name is unknown, or a number is out of range.
    """
    family, _, ending = name.partition("-")
    kind, level = FAMILIES.get(family), ending or "normal"
    if name not in names() or kind is None:
        raise InputError(f"there is no generated data set {name!r}; there are: {', '.join(names())}")
    if not 2 <= classes <= kind.limit or rows < classes or not 16 <= size <= 64:
        raise InputError(
            f"{name} has 2 to {kind.limit} classes, at least as many rows, and 16 to 64 pixels a side; "
            f"got {classes} classes, {rows} rows and {size} pixels"
        )
    world = kind(_generator(seed, family, classes), classes)
    own = f"synthetic/{EDITION}:{name}?rows={rows}&seed={seed}&classes={classes}&size={size}:{split}"
    labels = _generator(seed, own).permutation(_shares(world.weights, rows))
    x = np.empty((rows, size, size, kind.channels), dtype=np.uint8)
    for start in range(0, rows, _BLOCK):
        part = slice(start, min(start + _BLOCK, rows))
        rng = _generator(seed, own, start)
        images = world.draw(rng, labels[part], size, DIFFICULTIES[level])  # (n, h, w, c)
        x[part] = np.rint(np.clip(images, 0, 1) * 255)
    digest = hashlib.sha256(x.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    return InMemorySamples(x, labels, classes=world.names, path=own, sha256=digest)


class World(ABC):
    """The classes of one data set and draw images of them.

    Attributes:
        channels: 1 or 3.
        limit: the most classes there are.
        names: class names.
        weights: (k,) shares of the classes, summing to 1.
        trouble: (k,) how much harder than the others a class is, about 1.
    """

    channels: ClassVar[int]
    limit: ClassVar[int]
    unevenness: ClassVar[float]
    names: tuple[str, ...]

    def __init__(self, rng: np.random.Generator, classes: int) -> None:
        weights = np.exp(self.unevenness * rng.standard_normal(classes).clip(-1.5, 1.5))
        self.weights = weights / weights.sum()
        self.trouble = np.exp(0.35 * rng.standard_normal(classes).clip(-2, 2)).astype(np.float32)

    @abstractmethod
    def draw(self, rng: np.random.Generator, labels: Labels, size: int, hardness: float) -> Floats:
        """Return one image for each label: (n, size, size, channels), about [0, 1]."""


# --- drawing on blocks of images


def _generator(seed: int, *labels: object) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "synthetic", *map(str, labels)))


def _shares(weights: npt.NDArray[np.float64], rows: int) -> Labels:
    """Return sorted labels (rows,) in these shares, each class at least once."""
    counts = 1 + np.floor(weights * (rows - len(weights))).astype(np.int64)
    counts[np.argsort(-weights, kind="stable")[: rows - counts.sum()]] += 1
    return np.repeat(np.arange(len(weights)), counts)


def _pick(rng: np.random.Generator, groups: Sequence[Sequence[T]], count: int) -> list[T]:
    """Pick items in runs: some from a group, which are alike, and then some from another."""
    left = [[group[i] for i in rng.permutation(len(group))] for group in groups]
    picked: list[T] = []
    while len(picked) < count:
        group = left[rng.integers(len(left))]
        run = min(len(group), int(rng.integers(1, 6)), count - len(picked))
        picked += group[:run]
        del group[:run]
    return picked


def _between(rng: np.random.Generator, n: int, low: float, high: float) -> Floats:
    """Return one uniform number for each image, (n, 1, 1)."""
    return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)


def _gauss(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


@lru_cache
def _rise(knots: int, size: int) -> Floats:
    """Return the matrix (size, knots) that draws a smooth curve through values at even knots."""
    at = np.linspace(0, knots - 1, size)
    near: Floats = np.clip(1 - np.abs(at[:, None] - np.arange(knots)), 0, 1).astype(np.float32)
    return near * near * (3 - 2 * near)


def _smooth(rng: np.random.Generator, n: int, size: int, knots: int) -> Floats:
    """Return smooth random fields (n, size, size) of about unit variance."""
    rise = _rise(knots, size)
    field: Floats = np.matmul(np.matmul(rise, _gauss(rng, n, knots, knots)), rise.T, dtype=np.float32)
    return field


def _cloud(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Return random fields (n, size, size) with detail at all scales, of about unit variance."""
    roughness = rng.uniform(0.4, 0.9, (n, 1, 1)).astype(np.float32)
    cloud = _smooth(rng, n, size, 3)
    for i, knots in enumerate((5, 9, 17), start=1):
        cloud += _smooth(rng, n, size, knots) * roughness**i
    return 0.7 * cloud


def _places(
    rng: np.random.Generator,
    n: int,
    size: int,
    *,
    scale: tuple[float, float],
    turn: float,
    shift: float,
    warp: Floats | float,
) -> Floats:
    """Return where each pixel looks in its drawing, whose sides are at -1 and 1: (2, n, size, size) x and y.

    Args:
        scale: least and greatest size of the drawing, 1 to fill the image.
        turn: standard deviation in degrees; shear and change of aspect go with it.
        shift: greatest, in half sides.
        warp: standard deviation in half sides; (n, 1, 1) or a number.
    """
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x = line[None, None, :] - _between(rng, n, -shift, shift)
    y = line[None, :, None] - _between(rng, n, -shift, shift)
    angle = _gauss(rng, n, 1, 1) * np.float32(math.radians(turn))
    size_x = _between(rng, n, *scale)
    size_y = size_x * np.exp(_gauss(rng, n, 1, 1) * np.float32(turn / 150))
    shear = _gauss(rng, n, 1, 1) * np.float32(turn / 120)
    u = (np.cos(angle) * x + np.sin(angle) * y) / size_x
    v = (np.cos(angle) * y - np.sin(angle) * x) / size_y
    u, v = u + shear * v, v
    return np.stack([u + warp * _smooth(rng, n, size, 5), v + warp * _smooth(rng, n, size, 5)])


def _look(bank: Floats, which: npt.NDArray[np.int64], at: Floats) -> Floats:
    """Return bilinear values (n, s, s) of drawings `bank[which]` (side, side) at places (2, n, s, s)."""
    side = bank.shape[-1]
    place = np.clip((at + 1) * (side / 2) - 0.5, 0, side - 1.001)
    whole = place.astype(np.int32)
    fx, fy = place - np.floor(place)
    first = which[:, None, None] * (side * side) + whole[1] * side + whole[0]
    flat = bank.reshape(-1)
    above = flat[first] * (1 - fx) + flat[first + 1] * fx
    below = flat[first + side] * (1 - fx) + flat[first + side + 1] * fx
    inside: Floats = above * (1 - fy) + below * fy
    # what lies outside of the drawing is that much farther away
    beyond: Floats = np.maximum(np.abs(at) - 1, 0).sum(0)
    return inside - beyond


def _ink(distance: Floats, size: int) -> Floats:
    """Return how much of each pixel lies inside an outline, from distances in half sides."""
    ink: Floats = np.clip(distance * (size / 2) + 0.5, 0, 1)
    return ink


def _blur(x: Floats, sigma: Floats) -> Floats:
    """Blur images (n, s, s, c), each by its own Gaussian of sigma (n, 1, 1) pixels."""
    line = np.arange(x.shape[1], dtype=np.float32)
    kernel = np.exp(-((line[:, None] - line[None, :]) ** 2) / (2 * sigma * sigma + 1e-3))  # (n, s, s)
    kernel /= kernel.sum(2, keepdims=True)
    planes = x.transpose(0, 3, 1, 2)  # (n, c, s, s)
    kernel = kernel[:, None]
    blurred: Floats = kernel @ planes @ kernel.transpose(0, 1, 3, 2)
    return blurred.transpose(0, 2, 3, 1)


def _colours(rng: np.random.Generator, base: npt.ArrayLike, jitter: float) -> Floats:
    """Return colours (n, 1, 1, 3) near those given (n, 3): other brightness, a little of another hue."""
    colour = np.asarray(base, dtype=np.float32)
    n = len(colour)
    moved: Floats = colour * np.exp(jitter * _gauss(rng, n, 1)) + 0.25 * jitter * _gauss(rng, n, 3)
    return moved.clip(0, 1)[:, None, None, :]


def _mix(below: Floats, above: Floats, share: Floats) -> Floats:
    """Lay `above` over `below` (n, s, s, c) where share (n, s, s) is 1."""
    return below + (above - below) * share[..., None]


# --- prototypes


def _distance(drawing: Image.Image) -> Floats:
    """Return distances (side, side) to the outline of a white drawing in half sides, positive inside."""
    from scipy.ndimage import distance_transform_edt

    inside = np.asarray(drawing) > 127
    signed: npt.NDArray[np.float64] = distance_transform_edt(inside) - distance_transform_edt(~inside)
    return (signed / (_SIDE / 2)).astype(np.float32)


def _canvas() -> Image.Image:
    return Image.new("L", (_SIDE, _SIDE))


def _points(xy: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return points (n, 2) in [-1, 1] as places on the canvas."""
    return [(float(x), float(y)) for x, y in (xy + 1) * (_SIDE / 2)]


_PLAIN_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono")
_FONTS = (
    *_PLAIN_FONTS,
    *("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10", "cmti10"),
)


@lru_cache
def _font_file(name: str) -> Path:
    """Return a font that comes with matplotlib."""
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


@lru_cache
def _characters(font: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    held = frozenset(map(chr, FT2Font(str(_font_file(font))).get_charmap()))
    # TeX's fonts have their own order beyond letters and digits
    return frozenset(c for c in held if c.isascii() and c.isalnum()) if font.startswith("cm") else held


@lru_cache(maxsize=2048)
def _text(text: str, font: str) -> Floats:
    """Return distances of a text that fills the drawing, without its tails of white."""
    file, room = str(_font_file(font)), 0.86 * _SIDE
    basic = ImageFont.Layout.BASIC  # does not depend on what else is installed
    left, top, right, bottom = ImageFont.truetype(file, 100, layout_engine=basic).getbbox(text)
    points = min(100 * room / max(right - left, bottom - top), 1.6 * _SIDE)
    letters = ImageFont.truetype(file, points, layout_engine=basic)
    left, top, right, bottom = letters.getbbox(text)
    canvas = _canvas()
    corner = (_SIDE / 2 - (left + right) / 2, _SIDE / 2 - (top + bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, text, fill=255, font=letters)
    return _distance(canvas)


# --- families


class Glyphs(World):
    """Letters, digits and signs in the fonts of matplotlib, light on dark for the most part; grey."""

    channels, limit, unevenness = 1, 100, 0.15

    #: Each group holds what is easily taken for one another.
    GROUPS = (
        *("0OQCGD", "1Ii", "2Z", "3E", "5S", "8B&$", "6b", "9gq", "4A", "7TY", "PRF", "HNMW", "UVvJ", "KX"),
        *("ade", "hnry", "fjt", "L", "ΓΠ", "ΔΛ", "ΘΦΨ", "ΞΣ", "Ωω", "αδσ", "βθ", "γλ", "ε", "μπ", "φψ"),
        *("@§€£¥", "#%", "?!", "+=<>", "~{}*", "∞√", "∂∇", "≈≠∈", "→←↑↓", "⊕⊗∅"),
    )

    def __init__(self, rng: np.random.Generator, classes: int) -> None:
        super().__init__(rng, classes)
        self.names = tuple(_pick(rng, self.GROUPS, classes))
        drawings = [[_text(c, font) for font in _FONTS if c in _characters(font)] for c in self.names]
        self._first = np.cumsum([0, *map(len, drawings)])
        self._bank = np.stack([drawing for fonts in drawings for drawing in fonts])

    def draw(self, rng: np.random.Generator, labels: Labels, size: int, hardness: float) -> Floats:
        """Return one image for each label."""
        n, h = len(labels), np.float32(hardness)
        trouble = self.trouble[labels][:, None, None]
        fonts = np.diff(self._first)[labels]
        which = self._first[labels] + rng.integers(0, fonts)
        at = _places(
            rng, n, size, scale=(0.75 - 0.1 * hardness, 0.92), turn=9 * hardness,
            shift=0.06 + 0.08 * hardness, warp=0.04 * h * trouble,
        )  # fmt: skip
        stroke = _between(rng, n, -0.02, 0.07)
        shape = _ink(_look(self._bank, which, at) + stroke, size)
        ink = _between(rng, n, 1 - 0.25 * hardness, 1)
        ground = np.maximum(0, _between(rng, n, -0.25, 0.25)) * h
        ground = ground * (1 + 0.5 * _cloud(rng, n, size))
        x = (ground + (ink - ground) * shape)[..., None]
        x = _blur(x, _between(rng, n, 0.2, 0.5 + 0.5 * hardness))
        x += (0.05 * h * trouble * _between(rng, n, 0, 2))[..., None] * _gauss(rng, *x.shape)
        flipped = rng.random((n, 1, 1, 1)) < 0.25 * (hardness - 1)
        return np.where(flipped, 1 - x, x)


class Signs(World):
    """Coloured boards with a rim and a pictogram before a varied ground, in changing light; RGB."""

    channels, limit, unevenness = 3, 100, 0.7

    #: Outline, colours of rim, face and pictogram.
    STYLES = (
        ("circle", "red", "white", "black"),
        ("triangle", "red", "white", "black"),
        ("circle", "blue", "blue", "white"),
        ("square", "blue", "blue", "white"),
        ("diamond", "white", "yellow", "black"),
        ("octagon", "white", "red", "white"),
        ("funnel", "red", "white", "black"),
        ("circle", "grey", "white", "grey"),
        ("square", "white", "green", "white"),
        ("diamond", "black", "orange", "black"),
        ("triangle", "black", "yellow", "black"),
        ("circle", "black", "green", "white"),
    )
    PICTOGRAMS = (
        *("20", "30", "50", "60", "70", "80", "100", "120", "P", "H", "STOP", "!", "?", "A", "M"),
        *"→←↑↓↰↱↺⇄⇅⚑⚓⚙⚡★☀☁♿♫♻✿❄♞☞☃☎☂✈☢☠✂✚♠♣♥♦",
        "",
    )
    COLOURS: ClassVar[dict[str, tuple[float, float, float]]] = {
        "red": (0.75, 0.1, 0.13),
        "white": (0.9, 0.9, 0.88),
        "black": (0.08, 0.08, 0.1),
        "blue": (0.1, 0.28, 0.68),
        "yellow": (0.93, 0.76, 0.12),
        "grey": (0.5, 0.5, 0.52),
        "green": (0.08, 0.48, 0.28),
        "orange": (0.9, 0.45, 0.1),
    }
    OUTLINES = ("circle", "triangle", "square", "diamond", "octagon", "funnel")

    def __init__(self, rng: np.random.Generator, classes: int) -> None:
        super().__init__(rng, classes)
        groups = [
            [(style, self.PICTOGRAMS[i]) for i in rng.permutation(len(self.PICTOGRAMS))[:12]]
            for style in self.STYLES
        ]
        picked = _pick(rng, groups, classes)
        self.names = tuple(f"{outline} {face} {text}".strip() for (outline, _, face, _), text in picked)
        self._outlines = np.stack([_outline(name) for name in self.OUTLINES])
        self._outline = np.array([self.OUTLINES.index(style[0]) for style, _ in picked])
        self._rim, self._face, self._paint = (
            np.array([self.COLOURS[style[part]] for style, _ in picked]) for part in (1, 2, 3)
        )
        empty = np.full((_SIDE, _SIDE), -1, dtype=np.float32)
        self._pictures = np.stack(
            [_text(text, font) if text else empty for _, text in picked for font in _PLAIN_FONTS]
        )

    def draw(self, rng: np.random.Generator, labels: Labels, size: int, hardness: float) -> Floats:
        """Return one image for each label."""
        n, h = len(labels), np.float32(hardness)
        trouble = self.trouble[labels][:, None, None]
        x = _ground(rng, n, size)
        at = _places(
            rng, n, size, scale=(0.85 - 0.15 * hardness, 0.95), turn=5 * hardness,
            shift=0.05 + 0.06 * hardness, warp=0.015 * h * trouble,
        )  # fmt: skip
        board = _look(self._outlines, self._outline[labels], at)
        jitter = 0.08 + 0.08 * hardness
        x = _mix(x, _colours(rng, self._rim[labels], jitter), _ink(board, size))
        x = _mix(x, _colours(rng, self._face[labels], jitter), _ink(board - _between(rng, n, 0.1, 0.2), size))
        which = labels * len(_PLAIN_FONTS) + rng.integers(0, len(_PLAIN_FONTS), n)
        picture = _look(self._pictures, which, at / _between(rng, n, 0.5, 0.62))
        x = _mix(x, _colours(rng, self._paint[labels], jitter), _ink(picture + 0.03, size))
        return _light(rng, x, trouble, hardness)


#: Colours of what stands behind: sky, road, leaves, earth, walls.
_GROUNDS = (
    (0.55, 0.68, 0.85),
    (0.45, 0.45, 0.45),
    (0.25, 0.38, 0.18),
    (0.42, 0.33, 0.25),
    (0.75, 0.76, 0.78),
)


def _ground(rng: np.random.Generator, n: int, size: int) -> Floats:
    """Return clouds of one colour, partly behind a hard-edged thing of another: (n, s, s, 3)."""
    colours = np.array(_GROUNDS)
    far, near = (_colours(rng, colours[rng.integers(0, len(colours), n)], 0.3) for _ in range(2))
    thing = _ink(_smooth(rng, n, size, 3) * 0.8 - _between(rng, n, -0.5, 1), size)
    return _mix(far, near, thing) * (1 + 0.22 * _cloud(rng, n, size))[..., None]


def _outline(name: str) -> Floats:
    """Return the distances of a board's outline."""
    canvas = _canvas()
    pen = ImageDraw.Draw(canvas)
    if name == "circle":
        pen.ellipse((2, 2, _SIDE - 3, _SIDE - 3), fill=255)
        return _distance(canvas)
    corners = {
        "triangle": (3, -90),
        "square": (4, 45),
        "diamond": (4, 0),
        "octagon": (8, 22.5),
        "funnel": (3, 90),
    }
    count, first = corners[name]
    angles = np.radians(first + 360 / count * np.arange(count))
    reach = {"triangle": 1.1, "funnel": 1.1, "square": 1.15}.get(name, 0.97)
    lift = {"triangle": 0.2, "funnel": -0.2}.get(name, 0.0)
    pen.polygon(_points(reach * np.stack([np.cos(angles), np.sin(angles)], axis=1) + (0, lift)), fill=255)
    return _distance(canvas)


def _light(rng: np.random.Generator, x: Floats, trouble: Floats, hardness: float) -> Floats:
    """Put images (n, s, s, c) into changing light, haze, blur and noise."""
    n, size = len(x), x.shape[1]
    h = np.float32(hardness)
    dark = rng.random((n, 1, 1)) < 0.12 + 0.13 * hardness
    gain = np.where(dark, _between(rng, n, 0.15, 0.5), _between(rng, n, 0.7, 1.15))
    shade = np.exp(0.2 * h * _smooth(rng, n, size, 3))
    haze = np.maximum(0, _between(rng, n, -0.4, 0.35 * hardness)) * _between(rng, n, 0.5, 1)
    x = (x * (1 - haze)[..., None] + 0.6 * haze[..., None]) * (gain * shade)[..., None]
    x = _blur(x, _between(rng, n, 0.2, 0.4 + 0.6 * hardness))
    return x + (0.03 * h * trouble * _between(rng, n, 0.2, 1.5))[..., None] * _gauss(rng, *x.shape)


class Textures(World):
    """Gratings, blobs, spots and grain: noise of one spectrum for each class, in its colours; RGB."""

    channels, limit, unevenness = 3, 30, 0.3

    def __init__(self, rng: np.random.Generator, classes: int) -> None:
        super().__init__(rng, classes)
        # six makes of texture in three palettes; what shares one differs in the other
        makes = np.stack(
            [
                rng.uniform(math.log(2), math.log(9), 8),  # cycles per image, on a log scale
                rng.uniform(0.15, 0.6, 8),  # bandwidth, likewise
                rng.uniform(0, math.pi, 8),  # direction
                np.where(rng.random(8) < 0.5, 0, rng.uniform(2, 12, 8)),  # how directed: none is isotropic
                rng.integers(0, 3, 8),  # waves, blots or ridges
            ],
            axis=1,
        )
        palettes = rng.uniform(0, 1, (6, 2, 3))
        groups = [[(make, palette) for palette in range(6)] for make in range(8)]
        picked = _pick(rng, groups, classes)
        kinds = ("waves", "blots", "ridges")
        self.names = tuple(f"{kinds[int(makes[make, 4])]} {make} in colours {p}" for make, p in picked)
        self._make = makes[[make for make, _ in picked]].astype(np.float32)
        self._palette = palettes[[palette for _, palette in picked]]

    def draw(self, rng: np.random.Generator, labels: Labels, size: int, hardness: float) -> Floats:
        """Return one image for each label."""
        n, h = len(labels), np.float32(hardness)
        trouble = self.trouble[labels][:, None, None]
        frequency, width, direction, directed, kind = (
            self._make[labels, part][:, None, None] for part in range(5)
        )
        frequency = frequency + 0.12 * h * trouble * _gauss(rng, n, 1, 1)
        direction = direction + 0.12 * h * trouble * _gauss(rng, n, 1, 1)
        fy, fx = np.fft.fftfreq(size) * size, np.fft.rfftfreq(size) * size
        radius = np.log(np.hypot(fx[None, :], fy[:, None]) + 1e-6).astype(np.float32)
        angle = np.arctan2(fy[:, None], fx[None, :]).astype(np.float32)
        gain = np.exp(
            -((radius - frequency) ** 2) / (2 * width**2) + directed * (np.cos(2 * (angle - direction)) - 1)
        )
        wave = np.fft.irfft2(np.fft.rfft2(_gauss(rng, n, size, size)) * gain, s=(size, size)).astype(
            np.float32
        )
        wave /= wave.std((1, 2), keepdims=True) + 1e-6
        blots, ridges = np.tanh(4 * (wave - 0.5)), 1.5 - 2 * np.abs(wave)
        wave = np.where(kind == 0, wave, np.where(kind == 1, blots, ridges))
        low, high = (_colours(rng, self._palette[labels, end], 0.1 + 0.15 * hardness) for end in (0, 1))
        x = _mix(low, high, 1 / (1 + np.exp(-1.5 * wave)))
        return _light(rng, x, trouble, hardness)


class Shapes(World):
    """Silhouettes like those of clothes and bags, each class around a cut of its own; grey."""

    channels, limit, unevenness = 1, 60, 0.3
    _VARIANTS = 24

    def __init__(self, rng: np.random.Generator, classes: int) -> None:
        super().__init__(rng, classes)
        bases = rng.standard_normal((12, _CUT))
        # the members of a group are cuts near one base
        groups = [
            [(g, i, base + 0.3 * rng.standard_normal(_CUT)) for i in range(5)] for g, base in enumerate(bases)
        ]
        picked = _pick(rng, groups, classes)
        self.names = tuple(f"cut {chr(65 + group)}{number}" for group, number, _ in picked)
        self._bank = np.stack(
            [
                _silhouette(cut + 0.2 * trouble * rng.standard_normal(_CUT))
                for (_, _, cut), trouble in zip(picked, self.trouble, strict=True)
                for _ in range(self._VARIANTS)
            ]
        )
        # what cloth a class is made of: brightness, how often striped, how often an outline alone
        self._cloth = rng.uniform((0.4, -0.3, -0.8), (0.9, 0.6, 0.6), (classes, 3)).astype(np.float32)

    def draw(self, rng: np.random.Generator, labels: Labels, size: int, hardness: float) -> Floats:
        """Return one image for each label."""
        trouble = self.trouble[labels][:, None, None]
        cloth, shape = self._dress(rng, labels, size, hardness)
        x = _blur((cloth * shape)[..., None], _between(rng, len(labels), 0.2, 0.4 + 0.4 * hardness))
        spoil = 0.05 * np.float32(hardness) * trouble * _between(rng, len(labels), 0, 1.5)
        return x + spoil[..., None] * _gauss(rng, *x.shape)

    def _dress(
        self, rng: np.random.Generator, labels: Labels, size: int, hardness: float
    ) -> tuple[Floats, Floats]:
        """Return the cloth's brightness and the silhouette it is cut to, (n, s, s) each."""
        n, h = len(labels), np.float32(hardness)
        at = _places(
            rng, n, size, scale=(0.95 - 0.12 * hardness, 1.0), turn=4 * hardness,
            shift=0.03 + 0.05 * hardness, warp=0.035 * h * self.trouble[labels][:, None, None],
        )  # fmt: skip
        distance = _look(self._bank, labels * self._VARIANTS + rng.integers(0, self._VARIANTS, n), at)
        bright, striped, hollow = (self._cloth[labels, part][:, None, None] for part in range(3))
        stripes = np.sin(_between(rng, n, 6, 20) * at[1] + _between(rng, n, 0, 6))
        stripes *= 0.3 * (rng.random((n, 1, 1)) < striped)
        folds = 0.12 * _cloud(rng, n, size) - 0.25 * np.exp(-np.maximum(distance, 0) * 12)
        cloth = np.clip(bright + 0.18 * h * _gauss(rng, n, 1, 1) + stripes + folds, 0.08, 1)
        seam = _between(rng, n, 0.08, 0.16)
        shell = np.where(rng.random((n, 1, 1)) < hollow, _ink(seam - distance, size), 1)
        return cloth, _ink(distance, size) * shell


class Objects(Shapes):
    """The silhouettes of `shapes` in colours, before a varied ground and in changing light; RGB."""

    channels = 3

    def __init__(self, rng: np.random.Generator, classes: int) -> None:
        super().__init__(rng, classes)
        self._colour = rng.uniform(0.2, 1, (classes, 3))

    def draw(self, rng: np.random.Generator, labels: Labels, size: int, hardness: float) -> Floats:
        """Return one image for each label."""
        cloth, shape = self._dress(rng, labels, size, hardness)
        x = _mix(
            _ground(rng, len(labels), size),
            cloth[..., None] * _colours(rng, self._colour[labels], 0.4),
            shape,
        )
        return _light(rng, x, self.trouble[labels][:, None, None], hardness)


#: Numbers that a cut is made of: width (5), offset to the side (3), sleeves (3), slit (2), handle.
_CUT = 14


def _silhouette(cut: npt.NDArray[np.float64]) -> Floats:
    """Return the distances of one silhouette; its numbers are about standard normal."""
    canvas = _canvas()
    pen = ImageDraw.Draw(canvas)
    down = np.linspace(-1, 1, 24)
    y = 0.08 + 0.8 * down
    half = 0.4 * np.exp(legval(down, cut[:5] * (0.3, 0.4, 0.35, 0.25, 0.2))).clip(0.3, 2.2)
    middle = 0.13 * legval(down, cut[5:8])
    right, left = np.stack([middle + half, y], axis=1), np.stack([middle - half, y], axis=1)
    sleeve, slope, thick = 0.25 + 0.4 * cut[8], 0.9 + 0.4 * cut[9], 0.13 * math.exp(0.3 * cut[10])
    if sleeve > 0:
        for corner, outward in ((right[3], 1), (left[3], -1)):
            hand = corner + sleeve * np.array([outward * math.cos(slope), math.sin(slope)])
            pen.line(_points(np.stack([corner, hand])), fill=255, width=round(thick * _SIDE))
    radius = 0.22 * cut[13]
    if radius > 0:
        box = np.array(
            [(middle[0] - radius, -0.72 - 0.9 * radius), (middle[0] + radius, -0.72 + 0.9 * radius)]
        )
        pen.ellipse(_points(box), outline=255, width=round(0.07 * _SIDE))
    pen.polygon(_points(np.concatenate([right, left[::-1]])), fill=255)
    depth, gap = 0.6 * cut[11], 0.07 * math.exp(0.4 * cut[12])
    if depth > 0:
        foot = middle[-1]
        pen.polygon(_points(np.array([(foot - gap, 1.0), (foot, 0.88 - depth), (foot + gap, 1.0)])), fill=0)
    return _distance(canvas)


FAMILIES: dict[str, type[World]] = {
    "glyphs": Glyphs,
    "objects": Objects,
    "shapes": Shapes,
    "signs": Signs,
    "textures": Textures,
}
