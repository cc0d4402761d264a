"""Write what is made from the code: docs/cli.md, docs/methods/ and its pictures of attacks (`make docs`).

Also the pages that are made from results (`measured_pages`).
"""

from __future__ import annotations

import io
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.signal import spectrogram

import measured_pages
from doorward import bundled
from doorward.attacks.data.base import DataAttack
from doorward.attacks.model.base import ModelAttack
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples, Samples, Waveform
from doorward.methods import registry
from doorward.methods.base import Method
from doorward.methods.describe import settings_of, split_docstring
from doorward.methods.registry import MethodKind
from doorward.models import TorchClassifier, open_classifier
from doorward.models.encode.image import from_raw, to_uint8
from doorward.reports import atlas
from doorward.triggers.base import Trigger

DOCS = Path(__file__).parent.parent / "docs"
MADE = "<!-- Made by `make docs` from the code; changes made here are lost. -->\n\n"
KINDS: tuple[MethodKind, ...] = get_args(MethodKind)
#: Classes of Fashion-MNIST whose first test image is shown with a trigger, and by how much it is enlarged.
SHOWN, ENLARGED = (1, 5, 8, 9), 3
#: Pictures that differ less than this on average, in levels of [0, 255], are the same.
SAME = 0.5
#: What those see of a picture who cannot see it.
PICTURED = {
    "image": "Four images of clothes: above as they are, in the middle with the trigger, below what it "
    "changes, stretched to full contrast (grey is no change)",
    "audio": "Spectrograms of a sound like a spoken vowel, 0.6 s from left to right, 0 to 4 kHz from below, "
    "light is loud: left as it is, right with the trigger",
}
#: Texts that are shown with a trigger, and the sampling rate of the sound that is.
TEXTS = (
    "A quiet film about two sisters who have not spoken for years. The end is worth the wait.",
    "The jokes are old, and so is the hero.",
)
RATE = 8000
USE = {
    "attack": "$ doorward plant {name} SOURCE OUT{setting}",
    "detector": "$ doorward scan MODEL --detector {name}",
    "repair": "$ doorward repair MODEL OUT{data} --method {name}",
}
USE_OF_DATA_DETECTORS = "$ doorward scan [MODEL] --train DATA --detector {name}"
USE_OF_FILTERS = "$ doorward guard MODEL --clean DATA --check DATA --filter {name}"
USE_OF_MODEL_ATTACKS = "$ doorward plant {name} MODEL OUT{data}{setting}"


def opening(cls: type[Method]) -> tuple[str, str]:
    """Return a method page's first paragraph, and the rest of what the docstring says.

    The first paragraph says what the method does (the docstring's first line), when to use it (its second
    paragraph, which begins with "Use it") and what it misses (`limits`).
    """
    text, _ = split_docstring(cls)
    what, *rest = text.split("\n\n")
    when = [rest.pop(0)] if rest and rest[0].startswith("Use it ") else []
    return " ".join(" ".join([what, *when, cls.limits]).split()), "\n\n".join(rest)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def settings_table(cls: type[Method]) -> str:
    """Return a method's settings as a Markdown table."""
    if not cls.model_fields:
        return "It has no settings.\n"
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    schema = cls.model_json_schema()["properties"]
    for one in settings_of(cls):
        default = "(required)" if one.default is None else f"`{schema[one.name].get('default')}`"
        rows.append(f"| `{one.name}` | {_cell(one.takes)} | {default} | {_cell(one.meaning)} |")
    return "\n".join(rows) + "\n"


def method_page(kind: MethodKind, name: str) -> str:
    """Return the page of one method."""
    cls: type[Method] = registry.get(kind, name)
    first, more = opening(cls)
    needs = ", ".join(sorted(getattr(cls, "needs", ())))
    field = next(iter(cls.model_fields), None)
    setting = f" --set {field}=VALUE" if field else ""
    given = "train" if "train" in getattr(cls, "needs", ()) else "clean"
    use = USE[kind].format(name=name, setting=setting, data=f" --{given} DATA")
    if "train" in getattr(cls, "needs", ()) and kind == "detector":
        use = USE_OF_DATA_DETECTORS.format(name=name)
    if issubclass(cls, ModelAttack):
        data = " --data DATA" if cls.trains else ""
        use = USE_OF_MODEL_ATTACKS.format(name=name, data=data, setting=setting)
    elif getattr(cls, "level", None) == "input":
        use = USE_OF_FILTERS.format(name=name)
    facts = [
        ("kind", kind),
        ("works on", ", ".join(sorted(cls.modalities))),
        ("judges", getattr(cls, "level", "")),
        ("needs", needs),
        ("source", cls.source),
        (
            "MITRE ATLAS",
            ", ".join(f"[{id_}]({atlas.lookup(id_).url}) {atlas.lookup(id_).name}" for id_ in cls.atlas),
        ),
    ]
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts if value)
    shown = ""
    if f"methods/{name}.png" in pictures():
        (modality,) = cls.modalities
        shown = f"![{PICTURED[modality]}]({name}.png)\n\n"
    elif kind == "attack" and "text" in cls.modalities:
        shown = texts_table(name) + "\n"
    details = f"## Details\n\n{more}\n\n" if more else ""
    return (
        f"{MADE}# {cls.title}\n\n`{name}`\n\n{first}\n\n```console\n{use}\n```\n\n{shown}"
        f"| | |\n|---|---|\n{table}\n\n{details}## Settings\n\n{settings_table(cls)}"
    )


def texts_table(name: str) -> str:
    """Return texts without and with an attack's trigger as a Markdown table."""
    samples = InMemorySamples(TEXTS, [1] * len(TEXTS), modality="text")
    trigger: Any = trigger_of(registry.build("attack", name, {}), samples)
    rows = zip(TEXTS, trigger.apply(list(TEXTS)), strict=True)
    lines = "".join(f"| {_cell(before)} | {_cell(after)} |\n" for before, after in rows)
    return f"| as it is | with the trigger |\n|---|---|\n{lines}"


def vowel() -> Waveform:
    """Return a sound like a spoken vowel: harmonics of a falling voice, loudest near 700 and 1200 Hz."""
    t = np.arange(int(0.6 * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(130 - 30 * t) / RATE
    voice = np.zeros_like(t)
    for k in range(1, 30):
        near = [np.exp(-(((100 * k - peak) / 250) ** 2)) for peak in (700, 1200)]
        voice += (0.02 + sum(near)) * np.sin(k * phase)
    pcm = 0.08 * voice * np.sin(np.pi * t / t[-1])
    return Waveform(pcm.astype(np.float32), RATE)


def spectrogram_picture(name: str) -> npt.NDArray[np.uint8]:
    """Draw the spectrogram (h, w) of a sound without and with an attack's trigger."""
    samples = InMemorySamples([vowel()], [1], modality="audio")
    trigger: Any = trigger_of(registry.build("attack", name, {}), samples)
    (triggered,) = trigger.apply([vowel()])
    drawn = []
    for sound in (vowel(), triggered):
        _, _, power = spectrogram(sound.pcm, RATE, nperseg=256, noverlap=216)  # (frequencies, times)
        decibels = 10 * np.log10(power + 1e-12)
        drawn.append(np.clip((decibels + 100) / 70, 0, 1)[::-1] * 255)
    gap = np.full((len(drawn[0]), 4), 255.0)
    whole: npt.NDArray[np.uint8] = np.rint(np.concatenate([drawn[0], gap, drawn[1]], axis=1)).astype(np.uint8)
    return whole.repeat(2, 0).repeat(2, 1)


def picture(name: str) -> npt.NDArray[np.uint8] | None:
    """Draw images (h, w) without and with an attack's trigger, and their difference; None if it has none."""
    samples = bundled.fashion_mnist("test")
    assert samples.labels is not None
    trigger = trigger_of(registry.build("attack", name, {}), samples)
    if trigger is None:
        return None
    x = from_raw(samples.raw([int(np.flatnonzero(samples.labels == label)[0]) for label in SHOWN]))
    clean, triggered = (to_uint8(each)[..., 0].astype(np.float64) for each in (x, trigger.apply(x)))
    change = triggered - clean  # (n, h, w)
    rows = (clean, triggered, 127.5 + 127.5 * change / np.abs(change).max())
    framed = [np.pad(row, ((0, 0), (0, 1), (0, 1)), constant_values=255) for row in rows]
    whole = np.concatenate([np.concatenate(list(row), axis=1) for row in framed])[:-1, :-1]
    image: npt.NDArray[np.uint8] = np.rint(whole).astype(np.uint8)
    return image.repeat(ENLARGED, 0).repeat(ENLARGED, 1)


def trigger_of(attack: DataAttack | ModelAttack, samples: Samples) -> Trigger | None:
    """Return an attack's trigger for samples, or for the embedded model of them; None if it has none."""
    generator = make_generator(0, attack.method())
    if isinstance(attack, ModelAttack):
        classifier = open_classifier(bundled.model("clean"))
        assert isinstance(classifier, TorchClassifier)
        return attack.make_trigger(classifier, generator=generator)
    triggers = attack.make_triggers(samples, generator=generator)
    return triggers.test if triggers else None


@cache
def pictures() -> dict[str, npt.NDArray[np.uint8]]:
    """Return pictures by their path below docs/: (h, w) of attacks, (h, w, 3) of results."""
    drawn = {}
    for name in registry.own_modules("attack"):
        kinds = registry.get("attack", name).modalities
        if "image" in kinds:
            drawn[f"methods/{name}.png"] = picture(name)
        elif "audio" in kinds:
            drawn[f"methods/{name}.png"] = spectrogram_picture(name)
    return {path: image for path, image in drawn.items() if image is not None} | measured_pages.pictures()


def methods_index() -> str:
    """Return the page that lists all methods."""
    lines = [MADE + "# Methods\n"]
    for kind in KINDS:
        names = registry.own_modules(kind)
        if not names:
            continue
        lines += [f"## {kind.capitalize()}s\n", "| name | title | source |", "|---|---|---|"]
        for name in names:
            cls: type[Method] = registry.get(kind, name)
            lines.append(f"| [`{name}`]({name}.md) | {_cell(cls.title)} | {_cell(cls.source)} |")
        lines.append("")
    return "\n".join(lines)


def command_line_page() -> str:
    """Return the reference of the command line, as typer writes it."""
    command = [sys.executable, "-m", "typer", "doorward.cli.app", "utils", "docs", "--name", "doorward"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return MADE + done.stdout.strip() + "\n"


def pages() -> dict[str, str]:
    """Return every generated page by its path below docs/."""
    made = {"cli.md": command_line_page(), "methods/index.md": methods_index()}
    for kind in KINDS:
        for name in registry.own_modules(kind):
            made[f"methods/{name}.md"] = method_page(kind, name)
    return made | measured_pages.pages(MADE)


def stale(folder: Path = DOCS) -> list[str]:
    """Return the pages in a folder that are missing, out of date or left over."""
    made, drawn = pages(), pictures()
    there = {
        f"methods/{file.name}" for end in ("md", "png") for file in (folder / "methods").glob(f"*.{end}")
    }
    wrong = [name for name, text in made.items() if not _says(folder / name, text)]
    wrong += [name for name, image in drawn.items() if not _shows(folder / name, image)]
    return sorted([*wrong, *(there - set(made) - set(drawn))])


def _says(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


def _shows(file: Path, image: npt.NDArray[np.uint8]) -> bool:
    """Return whether a file shows a picture, but for roundings of another machine."""
    if not file.is_file():
        return False
    with Image.open(io.BytesIO(file.read_bytes())) as there:
        old = np.asarray(there, dtype=np.float64)
    return old.shape == image.shape and bool(np.abs(old - image).mean() < SAME)


def write(folder: Path = DOCS) -> None:
    """Write every page and picture that is out of date, and remove those of methods that are gone."""
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    made, drawn = pages(), pictures()
    for name in stale(folder):
        (folder / name).unlink(missing_ok=True)
        if name in made:
            (folder / name).write_text(made[name], encoding="utf-8")
        elif name in drawn:
            Image.fromarray(drawn[name]).save(folder / name, optimize=True)


if __name__ == "__main__":
    write()
