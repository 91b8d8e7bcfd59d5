"""The package of docs/add-an-attack.md, as it stands there, installed beside this one and used by the command."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.commands import environment, run_cli

PAGE = Path(__file__).parents[2] / "docs/add-an-attack.md"
SMALL = ("--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--eval-sequences", "2", "--retained", "none")


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """A PYTHONPATH with the page's module and its entry points, as an installer writes them."""
    blocks = dict(re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', PAGE.read_text(), re.DOTALL))
    (tmp_path / "my_attacks.py").write_text(blocks["my_attacks.py"])
    project = tomllib.loads(blocks["pyproject.toml"])["project"]
    metadata = tmp_path / "my_attacks-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return f"{tmp_path}:{environment()['PYTHONPATH']}"


def test_the_pages_package_adds_an_attack(base: Path, tmp_path: Path, installed: str) -> None:
    shutil.copytree(base, tmp_path / "model")
    command = next(line for line in PAGE.read_text().splitlines() if line.startswith("$ specdef attack"))
    words = command.replace("./base", str(base)).split()[2:]
    done = run_cli(*words, "--lr", "1e-2", *SMALL, "--json", "--quiet", cwd=tmp_path, PYTHONPATH=installed)
    assert done.code == 0, done.stderr
    attacks = {attack["variant"]: attack for attack in json.loads(done.stdout)["attacks"]}
    assert set(attacks) == {"plain", "halve-mlp:4", "rebalance"}  # which needs no manifest
    added = attacks["halve-mlp:4"]
    assert (added["training"], added["optimizer"]) == ("last-linear", "signum")
    assert added["label"] == "MLP scaled by 1/4, the last linear with signum"
    assert added["start"] == pytest.approx(attacks["plain"]["start"], rel=1e-6)
    listed = run_cli("attack", "--list", cwd=tmp_path, PYTHONPATH=installed).stdout
    assert {"halve-mlp:2", "last-linear", "signum"} <= {line.split()[0] for line in listed.splitlines() if line.strip()}
