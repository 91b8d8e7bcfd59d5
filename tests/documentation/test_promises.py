"""docs/promises.md: it quotes every paragraph of the README, word for word, and what it names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.commands import REPOSITORY
from tests.documentation.test_pages import MAKE_TARGETS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGE = (REPOSITORY / "docs/promises.md").read_text(encoding="utf-8")


def plain(text: str) -> str:
    """Words as a reader sees them: no links, no bold, no line breaks."""
    return " ".join(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("**", "").split())


QUOTED = [plain(quotation) for quotation in re.findall(r"^> (.*)$", PAGE, re.MULTILINE)]
UNCHECKED = [plain(words) for words in re.findall(r'^- \*\*"(.*?)"\*\*', PAGE, re.MULTILINE)]
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def paragraphs(text: str) -> list[str]:
    """Prose and items of lists; code, tables, headings and pictures make no promise by themselves."""
    text = re.sub(r"^```.*?^```|^<!--.*?-->$", "", text, flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"\n\s*\n|^(?=- )|^(?=\|)", text, flags=re.MULTILINE)
    return [plain(part) for part in parts if part.strip() and part.lstrip()[0] not in "#|!<"]


@functools.cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("words", QUOTED + UNCHECKED)
def test_what_is_quoted_stands_in_the_readme(words: str) -> None:
    assert words in plain(README)


@pytest.mark.parametrize("paragraph", paragraphs(README))
def test_every_paragraph_of_the_readme_is_quoted(paragraph: str) -> None:
    if paragraph.startswith(("fold: Holds", "- fold: Holds", "- insert-1e4-k25: Holds", "Counted over", "Each cell:")):
        pytest.skip("of a measured table")
    assert any(words in paragraph for words in QUOTED + UNCHECKED)


@pytest.mark.parametrize(("path", "name"), TESTS)
def test_a_test_that_is_named_exists(path: str, name: str) -> None:
    assert name in functions(REPOSITORY / path)


def test_nothing_is_promised_without_a_check() -> None:
    """After every quotation comes a test, a table or a target of the Makefile."""
    answers = re.findall(r"^> [^\n]*\n\n(.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    assert len(answers) == len(QUOTED) > 30
    assert [answer for answer in answers if not re.search(r"`tests/|`docs/tables/|`make ", answer)] == []


def test_what_else_is_named_exists() -> None:
    assert set(re.findall(r"`make ([a-z-]+)", PAGE)) <= MAKE_TARGETS
    for table in re.findall(r"`(docs/tables/[\w.-]+)`", PAGE):
        assert (REPOSITORY / table).is_file(), table
