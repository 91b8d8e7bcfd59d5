"""What stands in for an engine that is not installed: its rounding of weights, activations and caches, in float32.

An engine multiplies rounded activations with rounded weights. A channel of a hardened model may be 2^20 times as large
as its neighbours in the *activations*, where it drowns them in a block that shares one scale or overflows float16; so a
stand-in that rounds weights only flatters. What remains different is the arithmetic: sums are in float32 here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from specdef_cli.architectures.names import repeated_blocks
from specdef_cli.certify.deployment import quantizers
from specdef_cli.certify.deployment.adapters import block_linears
from specdef_cli.certify.deployment.quantizers import GgufType, Quantizer
from specdef_cli.certify.deployment.subject import Change, Subject
from specdef_cli.certify.deployment.trial import NotApplicableError
from specdef_cli.runtime import SpecDefLinear, SpecDefScaled


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


def to_float16(states: Tensor) -> Tensor:
    """Round to float16; what is too large becomes infinite."""
    return states.half().to(states.dtype)


def to_bfloat16(states: Tensor) -> Tensor:
    """Round to bfloat16."""
    return states.bfloat16().to(states.dtype)


def quantize_linears(subject: Subject, weights: Quantizer, inputs: Quantizer | None = None) -> Subject:
    """Round the weight of every linear layer in the model's blocks, both factors of a replaced one; heads are left out.

    Args:
        subject: Changed in place.
        weights: Rounds W, shape [m, n], along its last dimension.
        inputs: Rounds what the layers are given, shape [..., n], along its last dimension; ``None`` leaves it.

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
            rounded = weights(weight.contiguous())
            layer.weight.copy_(rounded.T if isinstance(layer, Conv1D) else rounded)
            if inputs is not None:
                layer.register_forward_pre_hook(partial(_rounded_inputs, inputs))
    return subject


def quantized(weights: Quantizer, inputs: Quantizer | None = None) -> Change:
    """:func:`quantize_linears` as a change of a loaded model."""
    return partial(quantize_linears, weights=weights, inputs=inputs)


def quantize_gguf(subject: Subject, kind: GgufType) -> Subject:
    """Quantize to a type of llama.cpp, activations included, and note where a row is too short for it."""
    widths = [layer.nx if isinstance(layer, Conv1D) else layer.in_features for layer in _plain_linears(subject.model)]
    types = [quantizers.gguf_type(kind, width) for width in widths]
    others = sorted(set(types) - {kind})
    note = f"{', '.join(others)} for {sum(found != kind for found in types)} of {len(types)} weights" if others else ""
    inputs = partial(quantizers.gguf_activations, kind=kind)
    return replace(quantize_linears(subject, partial(quantizers.gguf, kind=kind), inputs), note=note)


def scaled_float8(states: Tensor) -> Tensor:
    """float8_e4m3fn with one scale for all keys (or values) that are cached at once."""
    return quantizers.float8(states, per_row=False)


def _rounded_inputs(round_inputs: Quantizer, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_inputs(arguments[0]), *arguments[1:])


def _plain_linears(model: nn.Module) -> list[Any]:
    layers: list[Any] = []
    for _, layer in block_linears(model):
        if isinstance(layer, SpecDefLinear):
            layers += [layer.inflated, layer.compensation]
        else:
            layers.append(layer.inflated if isinstance(layer, SpecDefScaled) else layer)
    return layers
