"""Hardened directories of every family, made once, and fresh processes to load them in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from specdef_cli.hardening.options import Factors
from tests.commands import REPOSITORY, run_program
from tests.hardened import harden_to

SCENARIOS = Path(__file__).with_name("scenarios.py")


# Which linears are stored as factors, as the model calls them; the files of a ViT have other names.
FAMILIES = {
    "llama": ("*.o_proj", "*.down_proj"),
    "qwen2": ("*.q_proj", "*.o_proj"),  # q_proj has a bias, o_proj has none
    "gpt2": ("*.attn.c_proj", "*.mlp.c_fc"),
    "bert": ("*output.dense",),
    "bert_base": ("*.attention.output.dense",),
    "vit": ("*.q_proj", "*.o_proj", "*.fc1", "*.fc2"),
    "t5": ("encoder.*.DenseReluDense.wo", "decoder.*.SelfAttention.o"),
    "mixtral": ("*.o_proj",),
}


@pytest.fixture(scope="session")
def directories(
    tiny_model: Callable[..., Path], checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``<family>-base`` and ``<family>`` for every family of ``FAMILIES``."""
    root = tmp_path_factory.mktemp("hardened")
    for family, layers in FAMILIES.items():
        base = root / f"{family}-base"
        if family == "bert_base":
            torch.manual_seed(0)  # the pooler is new
            BertModel.from_pretrained(root / "bert-base").save_pretrained(base)
        else:
            shutil.copytree(checkpoints[family] if family in ("t5", "mixtral") else tiny_model(family), base)
        harden_to(root / family, base, Factors(alpha=64.0, top_k=2), layers=layers)
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
