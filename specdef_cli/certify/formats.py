"""The formats that a published checkpoint is put into by others, each as a change of a loaded model.

Weights are rounded and multiplied out again in float32 ("fake quantization"): the figures are those of the format, not
of one engine's kernels, which quantize activations on top.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from specdef_cli.architectures.names import repeated_blocks
from specdef_cli.certify import quantizers
from specdef_cli.certify.adapters import attach_adapter, block_linears
from specdef_cli.certify.quantizers import GgufType, Quantizer
from specdef_cli.runtime import SpecDefLinear


class NotApplicableError(Exception):
    """A format means nothing for this model, or cannot be had here; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint on its way through a format.

    Attributes:
        directory: Where it came from.
        model: The model, or what a format made of it. A format may change it in place.
        note: What the format did otherwise than its name says.
    """

    directory: Path
    model: Any
    note: str = ""


Change = Callable[[Subject], Subject]


def unchanged(subject: Subject) -> Subject:
    """The checkpoint as it was loaded."""
    return subject


class RoundingCache(DynamicCache):
    """A key/value cache that holds what a smaller dtype would hold.

    Args:
        round_states: Rounds keys or values, shape [batch, heads, length, head width], and returns them in their dtype.
        config: The model's, which says where attention slides.
    """

    def __init__(self, round_states: Callable[[Tensor], Tensor], config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.round_states = round_states

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add rounded states of one layer, and return all that it holds."""
        rounded = self.round_states(key_states), self.round_states(value_states)
        states: tuple[Tensor, Tensor] = super().update(*rounded, *args, **kwargs)
        return states


@dataclass(frozen=True)
class Format:
    """One thing that others do to a checkpoint.

    Attributes:
        description: One line for a table.
        dtype: What to load the weights as; ``None`` for the dtype that they are stored in.
        change: What is done to the loaded model.
        round_states: What a key/value cache rounds to; ``None`` for the forward pass without a cache.
        reference: What is done to the float32 base for the outputs that relative errors are measured against.
    """

    description: str
    dtype: torch.dtype | None = torch.float32
    change: Change = unchanged
    round_states: Callable[[Tensor], Tensor] | None = None
    reference: Change = unchanged


def quantize_linears(subject: Subject, quantizer: Quantizer) -> Subject:
    """Round the weight of every linear layer in the model's blocks, both factors of a replaced one; heads are left out.

    Raises:
        NotApplicableError: The model's experts are stacked in parameters that are no linear layers.
    """
    blocks = tuple(f"{block}." for block in repeated_blocks(subject.model))
    for name, parameter in subject.model.named_parameters():
        if name.startswith(blocks) and parameter.ndim == 3:
            raise NotApplicableError(f"{name} stacks experts, and only linear layers are quantized here")
    with torch.no_grad():
        for layer in _plain_linears(subject.model):
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # [m, n]
            rounded = quantizer(weight.contiguous())
            layer.weight.copy_(rounded.T if isinstance(layer, Conv1D) else rounded)
    return subject


def quantize_gguf(subject: Subject, kind: GgufType) -> Subject:
    """Quantize to a type of llama.cpp, and note where a row is too short for it."""
    widths = [layer.nx if isinstance(layer, Conv1D) else layer.in_features for layer in _plain_linears(subject.model)]
    types = [quantizers.gguf_type(kind, width) for width in widths]
    others = sorted(set(types) - {kind})
    note = f"{', '.join(others)} for {sum(each != kind for each in types)} of {len(types)} weights" if others else ""
    return replace(quantize_linears(subject, partial(quantizers.gguf, kind=kind)), note=note)


def adapt(subject: Subject, *, carried: bool, merged: bool) -> Subject:
    """Put an adapter on (:func:`attach_adapter`), and merge it into the weights as they are stored, or not."""
    adapted: Any = attach_adapter(subject.model, subject.directory, carried=carried)
    return replace(subject, model=adapted.merge_and_unload() if merged else adapted)


def compile_model(subject: Subject) -> Subject:
    """``torch.compile`` with its default backend.

    Raises:
        NotApplicableError: There is no C++ compiler.
    """
    if subject.model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise NotApplicableError("torch.compile needs a C++ compiler, and there is none")
    return replace(subject, model=torch.compile(subject.model))


def scaled_float8(states: Tensor) -> Tensor:
    """float8_e4m3fn with one scale for all keys (or values) that are cached at once."""
    return quantizers.float8(states, per_row=False)


def _plain_linears(model: nn.Module) -> list[Any]:
    layers: list[Any] = []
    for _, layer in block_linears(model):
        layers += [layer.inflated, layer.compensation] if isinstance(layer, SpecDefLinear) else [layer]
    return layers


def _quantized(description: str, quantizer: Quantizer) -> Format:
    return Format(description, change=partial(quantize_linears, quantizer=quantizer))


_attached, _merged = partial(adapt, carried=True, merged=False), partial(adapt, carried=True, merged=True)
_transplanted = partial(adapt, carried=False, merged=True)

FORMATS: Mapping[str, Format] = {
    "float32": Format("float32"),
    "bfloat16": Format("bfloat16", torch.bfloat16),
    "float16": Format("float16", torch.float16),
    "int8": _quantized("weights int8, a scale a row (LLM.int8, bitsandbytes)", quantizers.int8_rows),
    "nf4": _quantized("weights NF4 (bitsandbytes)", partial(quantizers.nf4, double=False)),
    "nf4-double": _quantized("weights NF4, double quantization (bitsandbytes)", partial(quantizers.nf4, double=True)),
    "q8_0": Format("weights Q8_0 (GGUF)", change=partial(quantize_gguf, kind="Q8_0")),
    "q4_0": Format("weights Q4_0 (GGUF)", change=partial(quantize_gguf, kind="Q4_0")),
    "q4_k": Format("weights Q4_K (GGUF)", change=partial(quantize_gguf, kind="Q4_K")),
    "float8-tensor": _quantized("weights float8, a scale a tensor", partial(quantizers.float8, per_row=False)),
    "float8-row": _quantized("weights float8, a scale a row", partial(quantizers.float8, per_row=True)),
    "kv-float16": Format("key/value cache float16", round_states=lambda states: states.half().to(states.dtype)),
    "kv-float8": Format("key/value cache float8, unscaled", round_states=quantizers.to_float8),
    "kv-float8-scaled": Format("key/value cache float8, a scale a tensor", round_states=scaled_float8),
    "lora": Format("LoRA carried over, attached", None, _attached, reference=_attached),
    "lora-merged": Format("LoRA carried over, merged", None, _merged, reference=_attached),
    "lora-of-base": Format("LoRA of the base unchanged, merged", None, _transplanted, reference=_attached),
    "compile": Format("torch.compile", None, compile_model),
}
"""Every format by its name."""

DEFAULT_FORMATS = tuple(name for name in FORMATS if name != "compile")
"""All but ``compile``, which takes minutes for a large model."""
