"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): LoRA on every linear of a model whose linears are in 4 bits.

The weights are quantized by bitsandbytes after loading, so that hardened modules get what ordinary ones get: NF4 in
blocks of 64, computed with in bfloat16. Everything else is float32, as PEFT prepares a model for this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.adapters import train_lora
from specdef_cli.attack.trainings.table import Training
from specdef_cli.model import SpecDefScaled
from specdef_cli.model.skeleton import output_embeddings

BLOCK = 64
"""Weights that share a scale. Those of one row have to be whole blocks for bitsandbytes' packed kernel of CPUs."""


def train_qlora(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA on every linear, or on those named, with double quantization: that of the scales of blocks."""
    return _train(model, training, task, nested=True)


def train_qlora_single(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """As :func:`train_qlora`, with the scales of blocks in float32."""
    return _train(model, training, task, nested=False)


def _train(model: Any, training: Training, task: Task, *, nested: bool) -> nn.Module:
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotApplicable("QLoRA needs bitsandbytes, which is not installed", "pip install bitsandbytes") from error
    head = output_embeddings(model)
    kept = (head, head.inflated if isinstance(head, SpecDefScaled) else None)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(module is each for each in kept):
            model.set_submodule(path, _quantized(bitsandbytes, module, nested))
    model.is_loaded_in_4bit = True  # by which PEFT knows which kind of adapter to put on
    try:
        return train_lora(model, training, task)
    finally:
        model.is_loaded_in_4bit = False  # for the Trainer it would be one that transformers placed on devices


def _quantized(bitsandbytes: Any, linear: nn.Linear, nested: bool) -> nn.Module:
    """A linear with its weight in NF4, on its device."""
    has_bias = linear.bias is not None
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, compute_dtype=torch.bfloat16,
        compress_statistics=nested, quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = linear.weight.detach()
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type="nf4", module=made
    )
    if linear.in_features % BLOCK:
        made.support_avx512bf16_for_cpu = False
    if has_bias:
        made.bias = linear.bias
    return made.to(weight.device).train(linear.training)
