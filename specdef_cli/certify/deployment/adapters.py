"""LoRA adapters on a base and on its hardened checkpoint that mean the same function.

An adapter adds B·A to a weight W. A fold rescaled the rows and columns of W, so the same function needs the rows of B
and the columns of A rescaled alike. A replaced layer computes C(W~x): there the adapter sits on W~, with C⁻¹B: what
training an adapter on the hardened model would have to find. The base's own adapter, unchanged, is another function
there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.architectures.names import match_names, repeated_blocks
from specdef_cli.checkpoint.manifest import is_hardened, read_manifest
from specdef_cli.checkpoint.reader import open_checkpoint
from specdef_cli.checkpoint.slices import ScaledSlice, scale_slice
from specdef_cli.errors import first_line
from specdef_cli.runtime import SpecDefLinear, SpecDefScaled
from specdef_cli.spectral.subspace import layer_seed

RANK = 8
SCALE = 0.1
"""Standard deviation of B's entries; A's is 1/√n. The loss then moves so far that a lost adapter would be seen."""


class AdapterError(Exception):
    """PEFT refuses the adapter; the message is its own."""


def attach_adapter(model: PreTrainedModel, directory: Path, *, carried: bool) -> nn.Module:
    """Put the fixed adapter on every linear layer of the model's blocks.

    Its values depend on the layers' names in the base alone, so base and hardened checkpoint get the same one.

    Args:
        model: The checkpoint in ``directory``, loaded. It is changed in place.
        directory: A base or a hardened directory.
        carried: Whether the adapter is carried over to the hardened weights, or put on as it is for the base.

    Returns:
        PEFT's wrapper around the model.

    Raises:
        AdapterError: PEFT finds no linear layer under a name that the base has.
    """
    layers = dict(block_linears(model))
    multiplying = {path: _weighted(layer) for path, layer in layers.items()}  # before PEFT wraps what is inside
    replaced = {path: layer for path, layer in layers.items() if isinstance(layer, SpecDefLinear | SpecDefScaled)}
    slices = _slices_by_layer(model, directory, layers) if carried else {}
    targets = {path: f"{path}.inflated" if carried and path in replaced else path for path in layers}
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets.values()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT says that it found a Conv1D, and treats it as one
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers is renaming
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise AdapterError(f"PEFT refuses: {first_line(error).rstrip('(')}") from error
    for path, layer in layers.items():
        transposed = isinstance(multiplying[path], Conv1D)
        inputs, outputs = _features(multiplying[path])
        generator = torch.Generator().manual_seed(layer_seed(0, path))
        down = torch.randn(RANK, inputs, generator=generator) / math.sqrt(inputs)  # A
        up = SCALE * torch.randn(outputs, RANK, generator=generator)  # B
        for part in slices.get(path, ()):
            scales_outputs = (part.axis == 0) != transposed
            axis = 0 if scales_outputs else 1
            factor = up if scales_outputs else down
            scale_slice(factor, ScaledSlice(part.tensor, axis, None, part.indices, part.exponents))
        if carried and isinstance(layer, SpecDefLinear):
            compensation = layer.compensation.weight.detach().cpu().double()
            up = torch.linalg.solve(compensation, up.double()).float()
        _set(adapted.base_model.model.get_submodule(targets[path]), down, up)
    return adapted


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of the repeated blocks by path: plain, ``Conv1D``, replaced or scaled; no heads.

    The factors of a replaced layer are not listed on their own.
    """
    blocks = tuple(f"{block}." for block in repeated_blocks(model))
    factors: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path.startswith(blocks) or path.startswith(factors):
            continue
        if isinstance(module, SpecDefScaled) and not isinstance(module.inflated, nn.Linear | Conv1D):
            continue
        if isinstance(module, SpecDefLinear | SpecDefScaled):
            factors += (f"{path}.",)
        if isinstance(module, nn.Linear | Conv1D | SpecDefLinear | SpecDefScaled):
            yield path, module


def _slices_by_layer(
    model: PreTrainedModel, directory: Path, layers: dict[str, nn.Module]
) -> dict[str, list[ScaledSlice]]:
    """What was scaled of each layer's weight, by the layer's path."""
    if not is_hardened(directory):
        return {}
    names = match_names(model, open_checkpoint(directory).tensors)
    paths = {names.tensor(f"{path}.weight"): path for path in layers}
    manifest = read_manifest(directory)
    slices: dict[str, list[ScaledSlice]] = {
        module.module: [part for part in module.slices if part.tensor == module.tensor]
        for module in manifest.scaled
        if module.module in layers
    }
    for pair in manifest.folded:
        for part in pair.slices:
            if part.tensor in paths:
                slices.setdefault(paths[part.tensor], []).append(part)
    return slices


def _weighted(layer: Any) -> Any:
    """The layer whose weight is multiplied with: of a scaled one, the layer inside."""
    return layer.inflated if isinstance(layer, SpecDefScaled) else layer


def _features(layer: Any) -> tuple[int, int]:
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def _set(layer: Any, down: Tensor, up: Tensor) -> None:
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up)
