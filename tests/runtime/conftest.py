"""Hardened directories of every family, made once, and fresh processes to load them in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import REPOSITORY, run_program

SCENARIOS = Path(__file__).with_name("scenarios.py")


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<family>-base`` and ``<family>`` for every family of ``hand_hardened.FAMILIES``."""
    from tests.runtime.hand_hardened import FAMILIES, harden, make_base

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


@pytest.fixture(scope="session")
def run_scenarios(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run scenarios of ``scenarios.py``, each on its directories, in a process of its own far from the repository."""

    def run(*, package: bool, work: Path | None = None, **roots: Path) -> dict[str, Any]:
        work = work or tmp_path_factory.mktemp("scenarios")
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(work / "hf"),
            "TQDM_DISABLE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONPATH": str(REPOSITORY) if package else "",
            "CUDA_VISIBLE_DEVICES": "",
        }
        described = {name: {"root": str(root), "work": str(work)} for name, root in roots.items()}
        return run_program(SCENARIOS, json.dumps(described), env=environment, cwd=work)

    return run
