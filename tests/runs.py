"""Runs for tests, each a change of the same short one."""

from __future__ import annotations

from typing import Any

from specdef_cli.attack.one_run import RunSpec
from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.variants import Variant


def spec(optimizer: str = "adamw", **changes: Any) -> RunSpec:
    """Three steps of the control in float32, evaluated after each, at the second usual rate of the optimizer."""
    fields: dict[str, Any] = {
        "subject": "control", "checkpoint": "c", "data": "d", "task": "causal-lm", "variant": Variant(),
        "training": Training(), "learning_rate": OPTIMIZERS.choose(optimizer).learning_rates[1],
        "schedule": "constant", "warmup_steps": 0, "max_grad_norm": 1.0, "weight_decay": 0.0, "steps": 3,
        "batch_size": 4, "sequence_length": 16, "eval_every": 1, "seed": 0, "dtype": "float32",
    }  # fmt: skip
    return RunSpec(optimizer=optimizer, **{**fields, **changes})
