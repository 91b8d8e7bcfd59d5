"""Every family hardened in every way, once for all tests, and a process that judges them by transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from specdef_cli.hardening.options import Fold, HardenOptions, Scale
from specdef_cli.hardening.run import harden
from tests.commands import environment, run_program

WAYS: dict[str, dict[str, Any]] = {
    "fold": {},  # what is made by default
    "bfloat16": {"dtype": "bfloat16"},
    "sharded": {"max_shard_size": 12_000},
    "bfloat16 profile": {"construction": Fold("bfloat16")},
    "quantizable": {"construction": Fold("quantizable", "none")},
    "scale": {"construction": Scale()},
    "scale in bfloat16": {"construction": Scale(), "dtype": "bfloat16"},
}
Made = Callable[[str, str], Path]
Judged = dict[tuple[str, str], dict[str, list[str]]]


@pytest.fixture(scope="session")
def made(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``(case, way) → directory``, not to be written to; a default fold is verified as it is made."""
    root = tmp_path_factory.mktemp("made")

    def make(case: str, way: str) -> Path:
        out = root / f"{case}-{way}"
        if not out.is_dir():
            harden(HardenOptions(str(checkpoints[case]), out, verify=way == "fold", **WAYS[way]))
        return out

    return make


@pytest.fixture(scope="session")
def judge(checkpoints: dict[str, Path], made: Made) -> Callable[[Iterable[tuple[str, str]]], Judged]:
    """What a process that has nothing but transformers finds of cases and ways, against their bases."""

    def judge(asked: Iterable[tuple[str, str]]) -> Judged:
        jobs = [
            {
                "name": f"{case}|{way}",
                "base": str(checkpoints[case]),
                "folded": str(made(case, way)),
                "dtype": "bfloat16" if WAYS[way].get("dtype") else "float32",
                "code": way.startswith("scale"),
            }
            for case, way in asked
        ]
        program = Path(__file__).with_name("plain_transformers.py")
        said = run_program(program, given=json.dumps(jobs), env=environment())
        found = {(case, way): result for name, result in said.items() for case, way in [name.split("|")]}
        assert len(found) == len(jobs)
        return found

    return judge
