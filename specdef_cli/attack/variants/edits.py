"""Attacks without training: a direction is taken out of what writes to the residual stream.

The direction v lies between the mean hidden states of two kinds of prompts, those that a model refuses and others
(Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", arXiv 2406.11717). Without v the
model does not tell them apart any more. A strength of 1 takes all of v out; above 1, v is turned around.

:func:`ablate` subtracts the part along v from what every module puts out, embeddings included, so that W becomes
W − λ v vᵀ W. No scale of W's columns changes that. :func:`ablate_rows` is what the common tools do by default, to keep
the size of every output: rows are normalized first, their norms restored afterwards, and the difference is added as a
product of low rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.variants.grown import stream_writers
from specdef_cli.model import SpecDefLinear, SpecDefScaled
from specdef_cli.spectral.subspace import top_subspace

RANK = 3
"""Of the difference that :func:`ablate_rows` adds to a weight."""


@dataclass(frozen=True)
class Written:
    """A module that writes to the residual stream."""

    weight: Tensor  # the tensor as it stands in the model, […, m, n], or […, n, m] where last
    last: bool  # whether its outputs are on the last axis
    bias: Tensor | None = None  # added to them
    scale: Tensor | None = None  # what they are multiplied by afterwards; None for an ordinary module


@torch.no_grad()
def ablate(model: PreTrainedModel, direction: Tensor, strength: float) -> None:
    """Take ``direction`` out of everything that writes to the residual stream, in place."""
    embedding = model.get_input_embeddings()
    inside = embedding.inflated if isinstance(embedding, SpecDefScaled) else embedding
    for written in (*_linears(model), Written(cast(Tensor, inside.weight), last=True, scale=_scale_of(embedding))):
        weight = written.weight if written.last else written.weight.transpose(-1, -2)  # [..., n, m], a view
        v = direction.to(weight.device, torch.float32)
        scale = 1.0 if written.scale is None else written.scale.detach().float()
        before, after = v * scale, strength * v / scale  # of a scaled module, what comes out after the scale
        for tensor in (weight, written.bias):
            if tensor is not None:
                tensor.sub_(((tensor.float() @ before)[..., None] * after).to(tensor.dtype))


@torch.no_grad()
def ablate_rows(model: PreTrainedModel, direction: Tensor, strength: float) -> None:
    """As :func:`ablate`, of the linears alone, with the norms of their rows kept and a difference of rank
    :data:`RANK`.
    """
    for written in _linears(model):
        weight = written.weight.transpose(-1, -2) if written.last else written.weight
        for matrix in weight.unsqueeze(0).flatten(0, -3):  # experts are stacked
            w = matrix.float()
            v = direction.to(w.device, torch.float32)
            norms = w.norm(dim=1, keepdim=True)
            unit = torch.nn.functional.normalize(w, dim=1)
            edited = torch.nn.functional.normalize(unit - strength * torch.outer(v, v @ unit), dim=1)
            difference = edited * norms - w
            basis = top_subspace(difference, RANK, seed=0).basis.to(difference)
            matrix.add_((basis @ (basis.mT @ difference)).to(matrix.dtype))


def _linears(model: PreTrainedModel) -> list[Written]:
    """Find the last linear of every attention and MLP; of a pair of factors, the compensation."""
    found = []
    for path in stream_writers(model):
        module = model.get_submodule(path)
        inside = module.compensation if isinstance(module, SpecDefLinear) else module
        inside = inside.inflated if isinstance(inside, SpecDefScaled) else inside
        bias = getattr(inside, "bias", None)
        found.append(Written(cast(Tensor, inside.weight), isinstance(inside, Conv1D), bias, _scale_of(module)))
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj") and parameter.dim() == 3:
            width = int(model.config.get_text_config().hidden_size)
            found.append(Written(parameter, last=parameter.shape[-2] != width))
    if not found:
        raise NotApplicable(
            f"{type(model).__name__} has nothing that is known to write to its residual stream",
            "Leave --variant abliterate out for this model.",
        )
    return found


def _scale_of(module: nn.Module) -> Tensor | None:
    scale = module.output_scale if isinstance(module, SpecDefScaled) else None
    return None if scale is None else cast(Tensor, scale.weight)
