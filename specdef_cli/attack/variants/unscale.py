"""What collapsing is to inserted layers, for scaled modules: multiply the scale vectors into the weight again.

It takes one pass, neither data nor a manifest, and as the scales are powers of two it is exact: what is left is the
base model, bit for bit.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.runtime import SpecDefScaled


def unscale(model: nn.Module) -> Growth:
    """Put the module inside of every :class:`SpecDefScaled` in its place, its weight unscaled.

    Args:
        model: Changed in place. A weight that a head shares with the embedding is unscaled once.

    Raises:
        NotApplicable: The model has no scaled module.
    """
    wrapped = {path: module for path, module in model.named_modules() if isinstance(module, SpecDefScaled)}
    if not wrapped:
        raise NotApplicable(
            f"{type(model).__name__} has no scaled module", "Give a directory hardened with --method scale."
        )
    before = after = bytes_added = 0
    done: set[int] = set()
    for path, module in wrapped.items():
        before += sum(parameter.numel() for parameter in module.parameters())
        for scale in (module.input_scale, module.output_scale):
            if scale is not None:
                bytes_added -= scale.weight.numel() * scale.weight.element_size()
        if id(module.inflated.weight) not in done:
            done.add(id(module.inflated.weight))
            _multiply(module)
        after += sum(parameter.numel() for parameter in module.inflated.parameters())
        model.set_submodule(path, module.inflated)
    return Growth(len(wrapped), before, after, bytes_added)


def _multiply(module: SpecDefScaled) -> None:
    weight = cast(Tensor, module.inflated.weight).detach()
    bias: Tensor | None = getattr(module.inflated, "bias", None)
    inputs = None if module.input_scale is None else module.input_scale.weight.detach()
    outputs = None if module.output_scale is None else module.output_scale.weight.detach()
    # A linear has its outputs on the first axis, an embedding and a Conv1D on the last, a norm has one axis.
    last = isinstance(module.inflated, nn.Embedding | Conv1D) or weight.dim() == 1
    if outputs is not None:
        weight.mul_(outputs if last else outputs[:, None])
        if bias is not None:
            bias.detach().mul_(outputs)
    if inputs is not None:
        weight.mul_(inputs[:, None] if last else inputs)
