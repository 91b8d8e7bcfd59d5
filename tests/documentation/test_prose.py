"""The rules of CONTRIBUTING's style guide that a machine can see, over the README and the pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
WRITTEN = [*PAGES, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
LONGEST_SENTENCE, LARGEST_DOCS = 25, 12_000
MOST_LINES = {"README.md": 130, "CHANGELOG.md": 80}
FOREIGN = re.compile(
    r"\b(stands? apart|walks? (through|around)|but for|nothing but)\b|(^|[.:] )(Of|Beside) [^.,:]{1,40}, [a-z]",
    re.MULTILINE,
)
"""Phrases of other languages; the last kind puts what a sentence is about before its subject."""

NOT_PROSE = re.compile(
    r"^ *```.*?^ *```"  # code
    r"|<!--.*?-->|<[^>]+>"  # HTML
    r"|^\s*\|[^\n]*$|^#+ [^\n]*$|^--8<--[^\n]*$|^!!![^\n]*$",  # tables, headings, what is included, boxes' heads
    re.MULTILINE | re.DOTALL,
)


def words(text: str) -> list[str]:
    """What has a letter or a digit in it: the bars and dashes of tables are no words."""
    return [word for word in text.split() if re.search(r"\w", word)]


def prose(text: str) -> str:
    """A page without code, tables, headings and addresses; a span of code is one word."""
    text = NOT_PROSE.sub("\n\n", text)
    text = re.sub(r"``?[^`]+``?", "code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return text.replace("*", "")


def sentences(text: str) -> list[str]:
    """Paragraphs and items of lists, cut where a sentence ends."""
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", prose(text))
    cut = (re.split(r"(?<=[.?!])[)\"”]?\s+(?=[A-Zα-ω(\[*\"“]|code)", " ".join(found.split())) for found in paragraphs)
    return [sentence for found in cut for sentence in found]


def too_long(text: str) -> list[str]:
    """Sentences with more words than a reader keeps in mind; figures and signs are no words here."""
    return [found for found in sentences(text) if len(re.findall(r"[^\W\d_][\w'’-]*", found)) > LONGEST_SENTENCE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    assert too_long(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_words_are_plain(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "CONTRIBUTING.md":
        text = text.partition("## Style")[0]  # which names the words
    assert [found[0] for found in FOREIGN.finditer(prose(text))] == []
    assert re.findall(r"\bsecure\w*", prose(text), re.IGNORECASE) == []


def test_the_readme_fits_two_screens_and_the_pages_a_sitting() -> None:
    for name, most in MOST_LINES.items():
        assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) <= most, name
    assert sum(len(words(page.read_text(encoding="utf-8"))) for page in PAGES if page != README) <= LARGEST_DOCS


def test_what_breaks_the_rules_is_found() -> None:
    long = "Word" + " word" * 25
    assert too_long(f"Short one. {long}.\n\n| {long} |\n\n```text\n{long}\n```\n") == [f"{long}."]
    assert too_long(" ".join(["word"] * 25) + ". And `code with many words in it` counts as one.") == []
    for phrase in (
        "It walks through.",
        "All but for one.",
        "Of a fold, the rows train.",
        "That is. Beside them, others stand.",
    ):
        assert FOREIGN.search(phrase), phrase
    assert not FOREIGN.search("A list of a fold, of rows.")
