"""Words of a text, and numbers for them."""

from __future__ import annotations

import re
import unicodedata
import zlib

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")


def words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in lower case, accents as parts of their letters.

    >>> words("It's a Self-made film!")
    ["it's", 'a', 'self', '-', 'made', 'film', '!']
    """
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


def hash_words(text: str, vocabulary: int) -> list[int]:
    """Return a number in [1, vocabulary) for each word of a text: its hash, so that no list has to be kept.

    >>> hash_words("good, GOOD", 1000)
    [627, 72, 627]
    """
    return [1 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % (vocabulary - 1) for word in words(text)]
