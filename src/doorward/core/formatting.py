"""Numbers, names and sentences as a reader sees them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

from doorward.core.records import (
    Rate,
)

# --- strings and numbers -------------------------------------------------------------------------


def plain(text: str, *, lines: bool = False) -> str:
    r"""Make an untrusted string harmless to show: control and invisible characters become escapes.

    Terminal escape sequences and characters that reorder text would let a class name or a path forge
    what a reader sees. Joiners stay, since some scripts need them; newlines and tabs stay with `lines`.

    >>> plain("Dress\x1b[2J")
    'Dress\\x1b[2J'
    """
    kept = "\u200c\u200d" + ("\n\t" if lines else "")
    return "".join(
        char
        if char in kept or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def sentence(text: str) -> str:
    """Make a phrase a sentence.

    >>> sentence("nothing ran"), sentence("Is it right?"), sentence("model.pt: damaged")
    ('Nothing ran.', 'Is it right?', 'model.pt: damaged.')
    """
    text = text.strip()
    word = text.split(maxsplit=1)[0] if text else ""
    if word.rstrip(",;'").isalpha():  # else it is a path or a name, which keeps its case
        text = text[:1].upper() + text[1:]
    return text + ("" if text.endswith((".", "!", "?")) else ".")


def number(value: float) -> str:
    """Write a score: four significant digits.

    >>> number(7.12345), number(-0.000123456), number(4900000.0)
    ('7.123', '-0.0001235', '4.9e+06')
    """
    return f"{value:.4g}"


def percent(value: float) -> str:
    """Write a proportion in percent; 0 % and 100 % only when it is exactly that.

    >>> percent(1), percent(0.9999), percent(0.0004), percent(0.5)
    ('100 %', '> 99.9 %', '< 0.1 %', '50.0 %')
    """
    if value in (0, 1):
        return f"{value * 100:.0f} %"
    if value > 0.999:
        return "> 99.9 %"
    if value < 0.001:
        return "< 0.1 %"
    return f"{value * 100:.1f} %"


def rate(value: Rate) -> str:
    """Write a rate with its count and interval."""
    return (
        f"{percent(value.value)} ({value.successes:,} of {value.n:,}; "
        f"95 % interval {percent(value.low)} to {percent(value.high)})"
    )


def p_value(value: float) -> str:
    """Write a p-value with two significant digits.

    >>> p_value(0.00331), p_value(0.00001), p_value(1.0)
    ('p = 0.0033', 'p < 0.0001', 'p = 1')
    """
    return f"p = {value:.2g}" if value >= 0.0001 else "p < 0.0001"


def duration(seconds: float) -> str:
    """Write a time.

    >>> duration(0.04), duration(12.34), duration(754)
    ('< 0.1 s', '12.3 s', '12 min 34 s')
    """
    if seconds < 0.1:
        return "< 0.1 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def size(count: int) -> str:
    """Write a number of bytes.

    >>> size(512), size(1_500_000)
    ('512 bytes', '1.5 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    exponent = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**exponent:.1f} {('kB', 'MB', 'GB', 'TB')[exponent - 1]}"


def class_label(index: int, classes: tuple[str, ...]) -> str:
    """Name a class by number and, where it has one, name.

    >>> class_label(3, ("T-shirt", "Trouser", "Pullover", "Dress")), class_label(7, ())
    ('3 (Dress)', '7')
    """
    if 0 <= index < len(classes) and classes[index] != str(index):
        return f"{index} ({plain(classes[index])})"
    return str(index)


def classes_label(targets: Iterable[int], classes: tuple[str, ...], *, limit: int = 5) -> str:
    """Name some classes; of many, the first ones and how many more."""
    targets = tuple(targets)
    if not targets:
        return "none"
    if len(targets) > limit and len(targets) == len(classes):
        return f"all {len(classes)} classes"
    names = [class_label(target, classes) for target in targets[:limit]]
    if len(targets) > limit:
        names.append(f"{len(targets) - limit} more")
    return joined(names)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question for the names that are most like a word, empty where none is.

    >>> did_you_mean("badnet", ["badnets", "blended"]), did_you_mean("x", ["badnets"])
    ("; did you mean 'badnets'?", '')
    """
    from difflib import get_close_matches

    by_case = {name.casefold(): name for name in known}
    near = [by_case[name] for name in get_close_matches(word.casefold(), by_case, n=2, cutoff=0.7)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def joined(names: Sequence[str]) -> str:
    """List names in words.

    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"


def with_noun(targets: tuple[int, ...], classes: tuple[str, ...]) -> str:
    """Name some classes with the word before them.

    >>> with_noun((3,), ()), with_noun((3, 5), ()), with_noun(tuple(range(6)), tuple("abcdef"))
    ('class 3', 'classes 3 and 5', 'all 6 classes')
    """
    label = classes_label(targets, classes)
    if label.startswith("all "):
        return label
    return f"class {label}" if len(targets) == 1 else f"classes {label}"
