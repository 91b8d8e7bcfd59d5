"""A checkpoint as a run trains it: with the head of its task, in the dtype of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from specdef_cli.attack.data import AttackData
from specdef_cli.attack.optimizers.table import OPTIMIZERS
from specdef_cli.attack.spec import RunSpec
from specdef_cli.attack.tasks import auto_class
from specdef_cli.runtime import SpecDefLinear, SpecDefScaled, load_model


def load_for_training(spec: RunSpec, directory: Path, data: AttackData, trust_remote_code: bool) -> nn.Module:
    """Load a checkpoint afresh, with the task's head, in the dtype of training."""
    arguments: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    loader = auto_class(spec.task, directory)
    if data.problem is not None:
        loader = _AutoClassifier(loader, data)
        arguments["ignore_mismatched_sizes"] = data.resize_head
    if OPTIMIZERS.choose(spec.optimizer).second_order:
        arguments["attn_implementation"] = "eager"  # the fused kernels have no second derivative
    dtype: Any = {"auto": "auto", "mixed": torch.float32}.get(spec.dtype) or getattr(torch, spec.dtype)
    return load_model(directory, auto_class=loader, dtype=dtype, **arguments)


def leave_to_fsdp(model: nn.Module) -> None:
    """Make a model on the CPU fit for sharding: it goes to the devices in parts, and nothing in it stays whole.

    Accelerate hands out rank 0's state, and takes for granted that each tensor of it was sharded; tombstones are
    buffers, and buffers are not.
    """
    for module in model.modules():
        if isinstance(module, SpecDefLinear | SpecDefScaled):
            module.register_buffer("weight", module.weight, persistent=False)


class _AutoClassifier:
    """An ``AutoModelFor…Classification`` with the data's kind and number of labels, and its padding.

    They belong to the config, which ``load_model`` makes and hands to whatever class it was given.
    """

    __name__ = "AutoClassifier"

    def __init__(self, auto_class: Any, data: AttackData) -> None:
        self.auto_class = auto_class
        self.data = data

    def from_pretrained(self, path: Path, *, config: Any, **arguments: Any) -> Any:
        if config.num_labels != self.data.labels:
            config.num_labels = self.data.labels
        config.problem_type = self.data.problem
        # Decoders find the token to classify by looking for the padding.
        if self.data.padding is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.data.padding
        return self.auto_class.from_pretrained(path, config=config, **arguments)
