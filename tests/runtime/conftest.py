"""Hardened directories of every family, made once, and fresh processes to load them in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import specdef_cli

REPOSITORY = Path(specdef_cli.__file__).parents[1]
SCENARIOS = Path(__file__).with_name("scenarios.py")


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<family>-base`` and ``<family>`` for every family of ``hand_hardened.FAMILIES``."""
    from hand_hardened import FAMILIES, harden, make_base

    root = tmp_path_factory.mktemp("hardened")
    for family in FAMILIES:
        harden(family, make_base(family, root / f"{family}-base"), root / family)
    return root


@pytest.fixture(scope="session")
def poisoned(directories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same directories, with code that gives itself away when it is run."""
    root = tmp_path_factory.mktemp("poisoned") / "directories"
    shutil.copytree(directories, root)
    for code in root.glob("*/configuration_specdef.py"):
        code.write_text("raise SystemExit('the directory\\'s code was run')\n")
    return root


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a scenario of ``scenarios.py`` in a process of its own, far from the repository."""

    def run(name: str, root: Path, *, package: bool = False, **arguments: Any) -> dict[str, Any]:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "TQDM_DISABLE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONPATH": str(REPOSITORY) if package else "",
            "CUDA_VISIBLE_DEVICES": "",
        }
        process = subprocess.run(
            [sys.executable, str(SCENARIOS), name, json.dumps({"root": str(root), "work": str(tmp_path), **arguments})],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        return json.loads(process.stdout.splitlines()[-1])

    return run
