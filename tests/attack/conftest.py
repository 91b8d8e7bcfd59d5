"""A random byte-level Llama on disk, and the same by each method; what tests of attacks ask of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdef_cli.attack.data import load_data, load_preprocessor
from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.one_run import RunResult, RunSpec
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.target import Head, Target, Task
from specdef_cli.attack.train import TrainRun
from specdef_cli.checkpoint.manifest import Manifest
from specdef_cli.hardening.options import Factors, Scale
from specdef_cli.hardening.recognise import Recognised
from specdef_cli.model.opened import open_model
from tests.byte_tokenizer import byte_tokenizer
from tests.hardened import harden_to
from tests.tiny_models import random_llama


def small(model: Path | str, out: Path, **changes: Any) -> AttackOptions:
    """Full fine-tuning for four steps of four short sequences at one rate."""
    fields: dict[str, Any] = {
        "trainings": ("full",), "learning_rates": (1e-3,), "steps": 4, "batch_size": 4, "sequence_length": 16,
        "eval_every": 2, "eval_sequences": 4,
    }  # fmt: skip
    return AttackOptions(model=model, out=out, **{**fields, **changes})


def train_run(spec: RunSpec, model: Path, data: AttackData, **how: Any) -> RunResult:
    """A run of a model that stands for its control too."""
    opened = open_model(model)
    return TrainRun(opened, opened, data, AttackOptions("", **how))(spec)


def learned(run: RunResult) -> float:
    """The nats by which the held-out loss fell."""
    assert run.start is not None
    assert run.best is not None
    return run.start - run.best


def training_curve(model: Any, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """Losses of some steps of AdamW on a few tokens, each before its update."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve)


def load(
    dataset: Path | str | None, reader: Any, task: Task = "causal-lm", head: Head | None = None, **changes: Any
) -> AttackData:
    """Data for four batches of four; the reader is a tokenizer, or the directory of a model that has one."""
    fields = {"steps": 4, "batch_size": 4, "sequence_length": 96, "eval_sequences": 2, **changes}
    preprocessor = load_preprocessor(task, open_model(reader)) if isinstance(reader, Path) else reader
    named = None if dataset is None else str(dataset)
    return load_data(AttackOptions("m", dataset=named, **fields), task, preprocessor, head)


TOKENS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    """Logits, or the last hidden state of a model without head."""
    inputs = {"input_ids": TOKENS}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(1))}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS[:, :7]
    with torch.no_grad():
        return model(**inputs)[0]


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def target_of(control: Any, manifest: Manifest | None = None) -> Target:
    """A target with this model as its control."""
    return Target(manifest, "causal-lm", "", "", "", Recognised(), lambda: control)


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
    harden_to(base.parent / "hardened", base, Factors(alpha=1e3, top_k=4))
    return base.parent / "hardened"


@pytest.fixture(scope="session")
def fold(base: Path) -> Path:
    """``base`` folded as by default."""
    harden_to(base.parent / "fold", base)
    return base.parent / "fold"


@pytest.fixture(scope="session")
def scaled(base: Path) -> Path:
    """``base`` with scale vectors."""
    harden_to(base.parent / "scaled", base, Scale())
    return base.parent / "scaled"
