"""Channels of one side of a symmetric pair: what they hold, and how they are multiplied by factors of any kind."""

from __future__ import annotations

import torch
from torch import Tensor

from specdef_cli.architectures.pairs import Side


def channel_values(side: Side, tensor: Tensor) -> Tensor:
    """The entries of each channel, shape [channels, entries], float64."""
    target, axis = _target(side, tensor)
    index = torch.tensor(side.indices, device=tensor.device)
    return target.movedim(axis, 0)[index.flatten()].double().reshape(len(side.indices), -1)


def multiply_channels(side: Side, tensor: Tensor, factors: Tensor) -> None:
    """Multiply each channel's slice in place."""
    target, axis = _target(side, tensor)
    index = torch.tensor(side.indices, device=tensor.device)  # [channels, positions]
    spread = factors.to(tensor.device)[:, None].expand(index.shape).flatten()
    rows = target.movedim(axis, 0)  # a view
    rows[index.flatten()] = (rows[index.flatten()].double() * spread.reshape(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)


def _target(side: Side, tensor: Tensor) -> tuple[Tensor, int]:
    return (tensor, side.axis) if side.block is None else (tensor[side.block], side.axis - 1)
