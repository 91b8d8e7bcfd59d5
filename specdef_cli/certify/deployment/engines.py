"""Quantization by the libraries that transformers' users reach for: bitsandbytes and torchao."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from specdef_cli.certify.deployment.subject import Change, Subject


def bitsandbytes_8bit() -> dict[str, Any]:
    """What ``from_pretrained`` is given for LLM.int8: weights and activations in 8 bit, outliers in float16."""
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}


def bitsandbytes_4bit(kind: str, double: bool = False) -> dict[str, Any]:
    """What ``from_pretrained`` is given for 4-bit weights in blocks of 64.

    Args:
        kind: ``nf4`` or ``fp4``.
        double: Whether the blocks' scales are quantized too.
    """
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    return {"quantization_config": config}


def torchao(name: str, **options: Any) -> Change:
    """Quantize the model's linear layers with torchao, heads included, as ``quantize_`` does by default.

    Args:
        name: A configuration of ``torchao.quantization``.
        options: Its arguments. ``granularity`` is a class's name and its arguments, ``weight_dtype`` a dtype's name.
    """
    return partial(_torchao, name=name, options=options)


def _torchao(subject: Subject, *, name: str, options: dict[str, Any]) -> Subject:
    library: Any = importlib.import_module("torchao.quantization")
    if "granularity" in options:
        kind, *arguments = options["granularity"]
        options = options | {"granularity": getattr(library, kind)(*arguments)}
    if "weight_dtype" in options:
        options = options | {"weight_dtype": getattr(torch, options["weight_dtype"])}
    with torch.no_grad():
        library.quantize_(subject.model, getattr(library, name)(**options))
    return subject
