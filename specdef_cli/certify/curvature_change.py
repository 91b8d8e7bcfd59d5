"""How hardening changed the curvature of a checkpoint's loss: σ₁ of the Hessian before and after, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdef_cli.certify.bound import compensation_bounds
from specdef_cli.certify.curvature import (
    Curvature,
    DivergenceRate,
    Loss,
    groups_by_layer,
    hessian_top,
    hessian_top_by_group,
    largest_stable_rate,
    model_loss,
    observed_divergence_rate,
    trainable,
)
from specdef_cli.runtime import SpecDefLinear

MAX_FOR_DOUBLE = 5_000_000
"""Parameters up to which float64 is used, and gradient descent is run to see where it diverges."""

MAX_FOR_WHOLE = 100_000_000
"""Parameters up to which the whole Hessian is taken; beyond, its diagonal blocks, one for each layer."""

MEMORY_PER_PARAMETER = 4 * 30
"""Bytes: Lanczos keeps some 26 vectors, and the graph of the gradient comes on top."""

ROUGH = 0.1
"""Tolerance with which every block is measured; the largest is then measured to the usual one."""

DESCENT_STEPS = 30
DESCENT_RATIO = 1.25
"""Where descent diverges is known to this factor: hardening moves it by orders of magnitude."""


@dataclass(frozen=True)
class CurvatureFigures:
    """The curvature of one checkpoint's loss on a small batch.

    Attributes:
        top: Of the whole Hessian, or the largest of its diagonal blocks.
        block: Which block that is; ``None`` for the whole.
        bound: The largest compensation bound (:mod:`specdef_cli.certify.bound`); ``None`` without inserted layers.
        largest_stable_rate: 2/σ₁.
        observed: Where gradient descent was seen to diverge; ``None`` where that was not tried.
    """

    top: Curvature
    block: str | None
    bound: float | None
    largest_stable_rate: float
    observed: DivergenceRate | None


def measure_curvature(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    device: torch.device | str = "cpu",
    on_block: Callable[[str], None] = lambda _: None,
) -> CurvatureFigures | str:
    """Measure one causal language model.

    Args:
        model: Of a base or a hardened checkpoint. It is left in another dtype, and on ``device``.
        tokens: int64, shape [sequences, length]: the batch.
        device: Where to measure; of a device without float64, everything is measured in float32.
        on_block: Called with a layer's name before its block is measured, where the whole Hessian is too large.

    Returns:
        The figures, or why they were not measured.

    Raises:
        SpecDefError: The model's loss is not finite.
    """
    model.to(device=torch.device(device), dtype=torch.float32)
    count = sum(parameter.numel() for parameter in model.parameters())
    available = _free_memory(model.device)
    if count * MEMORY_PER_PARAMETER > available and count <= MAX_FOR_WHOLE:
        needed = count * MEMORY_PER_PARAMETER
        return f"it takes about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free"
    double = count <= MAX_FOR_DOUBLE and model.device.type != "mps"
    return _figures(model.double() if double else model, tokens.to(model.device), count, on_block)


def _free_memory(device: torch.device) -> int:
    """In bytes."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _figures(model: nn.Module, tokens: Tensor, count: int, on_block: Callable[[str], None]) -> CurvatureFigures:
    loss = model_loss(model, {"input_ids": tokens, "labels": tokens})
    parameters = list(trainable(model).values())
    block = None
    if count <= MAX_FOR_WHOLE:
        top = hessian_top(loss, parameters)
    else:
        block, top = _largest_block(loss, groups_by_layer(model), on_block)
    bound = None
    if any(isinstance(module, SpecDefLinear) for module in model.modules()):
        bound = max(figure.value for figure in compensation_bounds(model, loss).values())
    stable = largest_stable_rate(top)
    observed = None
    if count <= MAX_FOR_DOUBLE:
        observed = observed_divergence_rate(loss, parameters, around=stable, steps=DESCENT_STEPS, ratio=DESCENT_RATIO)
    return CurvatureFigures(top, block, bound, stable, observed)


def _largest_block(
    loss: Loss, groups: Mapping[str, Sequence[Tensor]], on_block: Callable[[str], None]
) -> tuple[str, Curvature]:
    rough = hessian_top_by_group(loss, groups, tolerance=ROUGH, on_group=on_block)
    largest = max(rough, key=lambda name: rough[name].value)
    return largest, hessian_top_by_group(loss, {largest: groups[largest]})[largest]
