"""The README held against the program: what ``harden`` prints, where its links lead, what it says of versions."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.commands import REPOSITORY, succeed
from tests.documentation.test_prose import WRITTEN

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def words(text: str) -> str:
    """Text without its line breaks, which depend on the width of a terminal."""
    return " ".join(text.split())


def test_harden_prints_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(REPOSITORY / "examples/tiny_llama/model", tmp_path / "tiny-llama")
    monkeypatch.chdir(tmp_path)
    ((typed, shown),) = re.findall(r"^```console\n\$ specdef (harden .*)\n([^$]+?)^```", README, re.MULTILINE)
    result = succeed(*typed.split())
    assert words(f"{result.stderr} {result.stdout}") == words(shown)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, where GitHub and mkdocs make the same of them: letters without accents, no superscripts."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-zA-Z0-9_\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Pages that are generated are mkdocs' to check."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r'(?:\]\(|src=\"|srcset=\")(?!https?:)([^)"\s]+)', text):
        path, _, anchor = target.partition("#")
        if path.startswith("reference/"):
            continue
        leads = page.parent / path if path else page
        assert leads.is_file(), target
        assert not anchor or anchor in anchors(leads), target


def test_the_python_version_is_one() -> None:
    (said,) = re.findall(r"^Python (\d+\.\d+) or newer", README, re.MULTILINE)
    assert PROJECT["project"]["requires-python"] == f">={said}"
    assert f"Programming Language :: Python :: {said}" in PROJECT["project"]["classifiers"]
    assert PROJECT["tool"]["mypy"]["python_version"] == said
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + said.replace(".", "")


def test_the_licence_is_one() -> None:
    (said,) = re.findall(r"Licence: ([\w.-]+\d)", README)
    assert PROJECT["project"]["license"] == said
    assert f"\nlicense: {said}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert words((REPOSITORY / "LICENSE").read_text(encoding="utf-8")).startswith("Apache License Version 2.0")
