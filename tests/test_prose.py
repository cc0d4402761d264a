"""README, docs and docstrings are written in the field's words and in short paragraphs."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted((ROOT / "src").rglob("*.py"))

#: Words of a README, everything included, and of the design.
README_WORDS, DESIGN_WORDS = 700, 1500
#: Words of a paragraph.
LONGEST = 120

#: What is not written, as whole words outside of code, and what is written in its place.
WORDS = {
    r"anew": "again",
    r"beside": "next to, or compared with",
    r"owned up to": "recorded",
    r"of another make": "made by other code",
    r"obedien(?:t|ce)|obey(?:s|ed|ing)?": "margin",
    r"woken?|wak(?:es?|ing)": "triggered, activates",
    r"even (?:picture|mask|patch|colour|one)s?": "uniform blend, constant colour",
    r"twins?": "distilled surrogates, or the clean counterpart",
    r"banks?": "calibration set",
    r"null\.json": "calibration files",
    r"honest(?:ly)?": "clean",
    r"implanted": "backdoored model",
    r"doubtful": "candidates",
    r"spared": "trimmed",
    r"unowned": "unrecorded",
    r"workbench": "trial runner",
    r"unsquash(?:ed|es)?": "strip the final activation",
    r"WithImages|_Joined|_laid_out|settle_\w+|huggingface_rows|to_come": "the names of today",
}
WORD = re.compile(rf"(?<![\w-])(?:{'|'.join(WORDS)})(?![\w-])", re.IGNORECASE)

FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"``[^`]*``|`[^`\n]*`")
#: What a docstring lists, as in `    alpha, beta: how much`; names are as they are in the code.
LISTED = re.compile(r"^ +\w+(?:, \w+)*:(?= )", re.MULTILINE)
LINK = re.compile(r"\]\([^)\s]*(?:\s[^)]*)?\)")


def strange_words(text: str) -> list[str]:
    """Return the words of a text that are not to be written; code and the targets of links are exempt."""
    prose = LINK.sub("]", CODE.sub("`", FENCED.sub("", text)))
    return WORD.findall(prose)


def paragraphs(text: str) -> Iterator[str]:
    """Yield a Markdown text's paragraphs: blocks between blank lines, and every item of a list.

    Tables, code blocks, headings and HTML comments are none.
    """
    prose = re.sub(r"<!--.*?-->", "", FENCED.sub("\n\n", text), flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", prose):
        lines = [line for line in block.splitlines() if not re.match(r"\s*(\||#)", line)]
        yield from re.split(r"^\s*(?:[-*+]|\d+\.)\s", "\n".join(lines), flags=re.MULTILINE)


def long_paragraphs(text: str) -> list[str]:
    """Return how many words the long paragraphs of a text have, and how each begins."""
    counted = [(len(one.split()), one) for one in paragraphs(text)]
    return [f"{words} words: {' '.join(one.split()[:8])} ..." for words, one in counted if words > LONGEST]


@dataclass(frozen=True)
class Remark:
    """A docstring or a comment, and the line it begins on."""

    line: int
    text: str


def remarks(source: str) -> list[Remark]:
    """Return the docstrings and comments of a Python file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        Remark(node.body[0].lineno, LISTED.sub("", docstring))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)) is not None
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return found + [Remark(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_paragraph_is_long(document: Path) -> None:
    assert long_paragraphs(document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_documents_are_in_the_words_of_the_field(document: Path) -> None:
    assert strange_words(document.read_text(encoding="utf-8")) == []


def test_docstrings_and_comments_are_in_the_words_of_the_field() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{remark.line}: {', '.join(words)}"
        for file in SOURCES
        for remark in remarks(file.read_text(encoding="utf-8"))
        if (words := strange_words(remark.text))
    ]
    assert found == []


def test_readme_and_design_are_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS
    assert len((ROOT / "docs" / "design.md").read_text(encoding="utf-8").split()) <= DESIGN_WORDS


def test_the_check_of_words_can_fail() -> None:
    assert strange_words("Measured anew,\nbeside its twins; an even picture") == [
        "anew",
        "beside",
        "twins",
        "even picture",
    ]
    assert (
        strange_words("`form=beside`, [it](bank.md#twin), besides, evenly, not even\n```\nbank\n```\n") == []
    )


def test_the_check_of_paragraphs_can_fail() -> None:
    words = " ".join(["word"] * LONGEST)
    assert (
        long_paragraphs(f"{words}\n\n{words}\n| {words} {words} |\n```\n{words}\n\n{words} word\n```\n") == []
    )
    assert long_paragraphs(f"- {words}\n- {words}\n") == []
    assert long_paragraphs(f"# Head\n{words}\nmore\n") == ["121 words: " + "word " * 8 + "..."]


def test_remarks_are_docstrings_and_comments() -> None:
    source = (
        'def f(twin):\n    """Do.\n\n    Args:\n        twin: anew.\n    """\n    return "bank"  # beside\n'
    )
    assert [(one.line, one.text) for one in remarks(source)] == [(2, "Do.\n\nArgs:\n anew."), (7, "# beside")]
