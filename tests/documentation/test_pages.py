"""What the README and the pages tell a reader to type: every command is one that exists, every example is code."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import typer.main

from specdef_cli.cli import app
from tests.commands import REPOSITORY
from tests.consumer_tables import generator

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
MAKEFILES = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("Makefile", "examples/measure.mk")]
MAKE_TARGETS = set(re.findall(r"^([a-z][a-z-]*):", "".join(MAKEFILES), re.MULTILINE))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:50]}"


def blocks(*languages: str) -> Iterator[Block]:
    for path in PAGES:
        for found in BLOCK.finditer(path.read_text(encoding="utf-8")):
            if found["language"] in languages:
                text = re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
                yield Block(str(path.relative_to(REPOSITORY)), found["language"], text)


def typed(text: str) -> Iterator[list[str]]:
    """The commands of a console block as words; a backslash at a line's end continues it."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            for command in line[2:].split("&&"):
                yield shlex.split(command, comments=True)


@pytest.mark.parametrize("block", blocks("console"), ids=str)
def test_what_is_typed_can_be_typed(block: Block) -> None:
    group = typer.main.get_command(app.app)
    commands = list(typed(block.text))
    assert commands, "no line begins with $"
    for program, *arguments in commands:
        if program == "specdef":
            name, *rest = arguments
            assert name in group.commands  # type: ignore[attr-defined]
            # Refuses unknown options, bad choices and missing arguments.
            group.commands[name].make_context(name, rest).close()  # type: ignore[attr-defined]
        elif program == "make":
            named = {word for word in arguments if not word.startswith("-") and "=" not in word}
            assert named <= MAKE_TARGETS


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_parses_and_its_names_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specdef_cli"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("block", blocks("toml", "json"), ids=str)
def test_data_parses(block: Block) -> None:
    if block.language == "toml":
        tomllib.loads(block.text)
    else:
        json.loads(block.text)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(path.relative_to(REPOSITORY / "docs")) for path in (REPOSITORY / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith("tables/") and page not in navigation} == set()


def test_the_generated_pages_cover_every_command() -> None:
    pytest.importorskip("mkdocs", reason="`make docs` installs mkdocs: the reference of commands was not built")
    page = generator("commands").commands_page()
    for name in typer.main.get_command(app.app).commands:  # type: ignore[attr-defined]
        assert f"## `specdef {name}`" in page
    assert "&#x27;" not in page
