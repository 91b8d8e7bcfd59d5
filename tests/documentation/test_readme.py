"""The README held against the program: what its commands print, what its tables show, where its links lead."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from specdef_cli import Factors
from specdef_cli.attack import AttackOptions
from specdef_cli.attack.suite import load_suite
from tests.commands import REPOSITORY, Result, call_cli, run_cli

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
TINY = REPOSITORY / "examples/tiny_llama/model"
LEFT_OUT = "…\n"

# --- three commands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """A command of the README, and the pieces of its output that are shown."""

    arguments: tuple[str, ...]
    pieces: tuple[str, ...]


def sessions(text: str) -> Iterator[Session]:
    """The console blocks that hold one command of specdef and what it prints."""
    for block in re.findall(r"^```console\n\$ specdef (.*?)^```", text, re.MULTILINE | re.DOTALL):
        typed, _, printed = block.replace("\\\n", " ").partition("\n")
        if "$ " not in printed:
            yield Session(tuple(shlex.split(typed, comments=True)), tuple(printed.split(LEFT_OUT)))


SESSIONS = {session.arguments[0]: session for session in sessions(README)}


def words(text: str) -> str:
    """Text without its line breaks, which depend on the width of a terminal."""
    return " ".join(text.split())


def not_printed(pieces: tuple[str, ...], result: Result) -> list[str]:
    printed = words(f"{result.stderr} {result.stdout}")
    return [piece for piece in pieces if words(piece) not in printed]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the model that the README calls tiny-llama."""
    shutil.copytree(TINY, tmp_path / "tiny-llama")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_three_of_them() -> None:
    assert list(SESSIONS) == ["inspect", "harden", "attack"]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", ["inspect", "harden"])
def test_it_prints_what_the_readme_shows(name: str) -> None:
    result = call_cli(*SESSIONS[name].arguments)
    assert result.code == 0, result.stderr
    assert not_printed(SESSIONS[name].pieces, result) == []


def test_a_figure_that_changed_would_be_found() -> None:
    pieces = SESSIONS["inspect"].pieces
    shown = Result(0, "\n".join(pieces), "")
    assert not_printed(pieces, shown) == []
    changed = Result(0, shown.stdout.replace("4.11 %", "4.12 %"), "")
    assert not_printed(pieces, changed) == [piece for piece in pieces if "4.11 %" in piece] != []


def rows(text: str) -> dict[str, list[str]]:
    """The rows of a table that rich draws, by their first cell."""
    cells = ([cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│")
    return {first: rest for first, *rest in cells}


def leading_number(cell: str) -> float | None:
    found = re.match(r"[\d.]+(e-?\d+)?(?= %|$)", cell)
    return float(found[0]) if found else None


@pytest.mark.slow
def test_the_attack_ends_as_the_readme_shows(place: Path) -> None:
    """Verdicts word by word; losses, shares and rates up to the rounding of another processor."""
    hardened = call_cli(*SESSIONS["harden"].arguments)
    assert hardened.code == 0, hardened.stderr
    result = run_cli(*SESSIONS["attack"].arguments, cwd=place)
    assert result.code == 0, result.stderr
    shown = "\n".join(SESSIONS["attack"].pieces)
    assert result.stdout.splitlines()[0].strip() == shown.splitlines()[0]
    assert words(shown.splitlines()[-1]) in words(result.stderr)
    assert (place / "attack/report.html").is_file()
    found, expected = rows(result.stdout), rows(shown)
    assert list(found) == list(expected)
    for attack, cells in expected.items():
        for here, there in zip(found[attack], cells, strict=True):
            number, other = leading_number(here), leading_number(there)
            if number is None or other is None:
                assert here == there, attack
            elif "e" in there:  # a rate: the neighbours of the best one are half a decade away
                assert other / 4 < number < 4 * other, attack
            else:
                assert number == pytest.approx(other, abs=2 if "%" in there else 0.02), attack


@pytest.mark.usefixtures("place")
def test_an_attack_without_a_name_finds_what_was_hardened_here_and_its_base() -> None:
    assert call_cli(*SESSIONS["harden"].arguments, "--no-verify").code == 0
    (typed,) = re.findall(r"`specdef (attack --expand 2x)` attacks `./hardened`", README)
    result = call_cli(*typed.split(), "--dry-run")
    assert result.code == 0, result.stderr
    planned = [line.split() for line in result.stdout.splitlines()]
    assert ["model", "hardened"] in planned
    assert ["control", "tiny-llama"] in planned
    assert "hardened, width 2× · full · adamw" in words(result.stdout)


# --- measured tables --------------------------------------------------------------------------------------------------


def table(target: str) -> dict[str, list[str]]:
    """The cells of the table that a make target measures, by the first of each row."""
    found = re.search(rf"<!-- table: make {target} -->\n(.*?)<!-- end of table -->", README, re.DOTALL)
    assert found is not None
    lines = [line for line in found[1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_what_is_said_of_the_attacks_stands_in_the_table() -> None:
    """The list under "A hardened model is not locked", and what a fold holds against."""
    measured = table("readme")
    fold, factors = measured["attack"].index("fold"), measured["attack"].index("factors")
    share = {
        (attack.partition(",")[0], column): int(found[1])
        for attack, cells in measured.items()
        for column in (fold, factors)
        if (found := re.match(r"(\d+) %", cells[column]))
    }
    knowing = [share["rebalance: full", fold], share["collapse: full", factors]]
    passing = [share[training, column] for training in ("HiRA", "adapters") for column in (fold, factors)]
    assert min(knowing + passing) >= 95
    searched = [share[training, factors] for training in ("full", "LoRA all-linear")]
    assert min(searched) >= 50
    assert max(share[training, fold] for training in ("full", "LoRA all-linear")) < 10


def test_the_table_is_of_what_the_text_says() -> None:
    budget, quick = AttackOptions(model="m", out=Path("out")), load_suite("quick").budget
    steps, batch, length = re.search(  # type: ignore[union-attr]
        r"the quick suite \((\d+) steps of (\d+) sequences of (\d+) bytes\)", words(README)
    ).groups()
    assert (quick["steps"], budget.batch_size, budget.sequence_length) == (int(steps), int(batch), int(length))
    assert not {"batch_size", "sequence_length"} & quick.keys()
    assert "α = 10⁴, the top 25 singular values" in words(README)
    assert (Factors().alpha, Factors().top_k) == (1e4, 25)
    recipe = MAKEFILE.partition("\nreadme: ")[2].partition("\n\n")[0]
    assert "for model in fold factors;" in recipe
    assert "--suite quick" in recipe


def test_every_row_of_the_tools_is_on_the_page_that_is_named() -> None:
    assert "[formats and engines](docs/formats.md) has every row" in words(README)
    page = (REPOSITORY / "docs/formats.md").read_text(encoding="utf-8")
    measured = sorted((REPOSITORY / "docs/tables").glob("consumers-*.md"))
    assert measured
    assert [path.name for path in measured if f'--8<-- "tables/{path.name}"' not in page] == []


def test_the_table_of_real_models_is_of_what_the_text_says() -> None:
    steps = tomllib.loads((REPOSITORY / "examples/real/attack.toml").read_text(encoding="utf-8"))["budget"]["steps"]
    bytes_steps = re.search(r"\$\(STACKS:.*ATTACK_BUDGET = --steps (\d+) ", MAKEFILE)
    assert bytes_steps is not None
    assert f"a run has {steps} steps on the real models, {bytes_steps[1]} on the others" in " ".join(README.split())


def test_every_table_is_put_there_by_its_target() -> None:
    targets = re.findall(r"<!-- table: make ([a-z-]+) -->", README)
    assert sorted(targets) == ["readme", "real-attack", "real-consumers"]
    for target in targets:
        recipe = MAKEFILE.partition(f"\n{target}: ")[2].partition("\n\n")[0]
        assert f"docs/generators/readme.py {target}" in recipe


# --- what else it says ------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of a page's headings, where GitHub and mkdocs make the same of them: letters without accents, no superscripts."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-zA-Z0-9_\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_every_link_leads_somewhere(name: str) -> None:
    """Those between pages of docs/ are mkdocs' to check."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert (REPOSITORY / path).is_file(), target
        assert not anchor or anchor in anchors(REPOSITORY / path), target


def test_the_python_version_is_one() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (said,) = re.findall(r"^Python (\d+\.\d+) or newer", README, re.MULTILINE)
    assert project["project"]["requires-python"] == f">={said}"
    assert f"Programming Language :: Python :: {said}" in project["project"]["classifiers"]
    assert project["tool"]["mypy"]["python_version"] == said
    assert project["tool"]["ruff"]["target-version"] == "py" + said.replace(".", "")
    assert f"sys.version_info < ({said.replace('.', ', ')})" in MAKEFILE


def test_the_licence_is_one() -> None:
    (said,) = re.findall(r"Licence: ([\w.-]+\d)", README)
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"] == said
    assert f"\nlicense: {said}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert words((REPOSITORY / "LICENSE").read_text(encoding="utf-8")).startswith("Apache License Version 2.0")


def test_the_demo_is_what_is_said_of_it(tmp_path: Path) -> None:
    """An environment, a hardened model, an attack on it; the attack says where its report is."""
    dry = subprocess.run(
        ["make", "-n", "demo", f"VENV={tmp_path / 'venv'}", f"DEMO={tmp_path / 'demo'}"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    steps = ["-m venv ", "pip install ", "specdef harden ", "specdef attack "]
    assert [step for step in steps if step in dry.stdout] == steps
    assert sorted(steps, key=dry.stdout.index) == steps
    harden, attack = (line.split() for line in dry.stdout.splitlines() if "/specdef " in line)
    assert harden[harden.index("--out") + 1] == attack[2]
    assert "report: attack/report.html" in SESSIONS["attack"].pieces[-1]
