"""A random byte-level Llama on disk, and the same in factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.one_run import RunResult, RunSpec
from specdef_cli.attack.train import TrainRun
from specdef_cli.hardening.options import Factors, HardenOptions
from specdef_cli.hardening.run import harden
from specdef_cli.model.opened import OpenedModel
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny_models import random_llama


def train_run(spec: RunSpec, model: OpenedModel, data: AttackData, **how: Any) -> RunResult:
    """A run of a model that stands for its control too."""
    return TrainRun(model, model, data, **how)(spec)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with d=32 and two layers, one file of float32 weights."""
    directory = tmp_path_factory.mktemp("models") / "base"
    changes = {"max_position_embeddings": 256, "eos_token_id": 256, "pad_token_id": 257, "initializer_range": 0.1}
    random_llama(vocab_size=258, **changes).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def hardened(base: Path) -> Path:
    """``base`` with every o_proj and down_proj in factors, α=10³, k=4."""
    out = base.parent / "hardened"
    harden(HardenOptions(str(base), out, Factors(alpha=1e3, top_k=4), verify=False))
    return out
