"""Which channel of a symmetric pair can be lost, and how far it can be raised: a fold that quantizers survive.

A quantizer gives every row of a weight, or every block of a row, a scale of its own: a row may carry any power of two.
A column that goes up drowns its neighbours; one that goes down is rounded to zero, and with it its channel. So a pair
is folded in one direction, rows up and columns down, on a channel whose loss costs nothing. In float32 and bfloat16
nothing is rounded, and the channel is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from specdef_cli.checkpoint.changes import FoldedPair
from specdef_cli.hardening.calibration import Activations, calibrate, default_text, read_text
from specdef_cli.hardening.fold import channel_norms, folded_pair
from specdef_cli.hardening.options import BY_WEIGHTS, Fold
from specdef_cli.model.body import Side, SymmetricPair
from specdef_cli.model.opened import OpenedModel

EXPONENT = 12
"""What every pair gets, as far as float16 allows."""

LARGEST = torch.finfo(torch.float16).max / 8
"""Of what passes through a raised channel: a factor of 8 stays for texts that calibration has not seen."""

LOWEST_EXPONENT = 1

BLOCK_LOSS = 1 / 4_000
"""What blocks of activations may lose in a pair, as a share of what its readers put out: about 1 % of the perplexity of
SmolLM2 and Gemma-3-270m in Q8_0 and Q4_0 (docs/decisions.md)."""

HIGHEST_IN_BLOCKS = 14

QUERIES = 4
"""Channels that are raised where queries meet keys: those that carry most, as rows on both sides lose nothing."""

NormsOf = Callable[[Side], Tensor]
"""The squared norm of each channel's slices on one side of a pair, shape [channels]."""


def raise_pairs(
    base: OpenedModel, pairs: Sequence[SymmetricPair], wanted: Fold, device: str | None
) -> tuple[FoldedPair, ...]:
    """Fold every pair in one direction, on the channel that can best be lost, by a text or by weights alone."""
    activations = Activations()
    if pairs and wanted.calibration != BY_WEIGHTS:
        text = default_text() if wanted.calibration is None else read_text(Path(wanted.calibration))
        exponents = range(1, HIGHEST_IN_BLOCKS + 1) if wanted.profile == "gguf" else ()
        activations = calibrate(base, pairs, text, exponents=exponents, device=device)
    used = [pair for pair in pairs if pair.channels > 1]
    norms = partial(channel_norms, base.checkpoint)
    if wanted.profile == "gguf":
        found = (raise_within_blocks(pair, activations, norms, BLOCK_LOSS) for pair in used)
    else:
        found = (raise_pair(pair, activations, EXPONENT, norms) for pair in used)
    return tuple(pair for pair in found if pair is not None)


def raise_pair(pair: SymmetricPair, activations: Activations, exponent: int, norms: NormsOf) -> FoldedPair | None:
    """Choose the channel whose loss costs least, of those that take 2^exponent; else of those that take most.

    Returns:
        ``None`` where every channel is zero, which no factor changes, or too large to be raised, and where the text
        never reached the pair (an expert, what lies behind the body).
    """
    if activations.outputs and not any(side.weight in activations.outputs for side in pair.sides if side.power > 0):
        return None
    costs = energies(pair, activations, norms)
    allowed = torch.full_like(costs, exponent)
    allowed = allowed.minimum(_room(pair, activations))
    allowed = torch.where(costs > 0, allowed, -math.inf)
    best = allowed.max()
    if best < LOWEST_EXPONENT:
        return None
    rows_alone = pair.kind == "query_key"
    if rows_alone:
        order = torch.where(allowed < LOWEST_EXPONENT, -math.inf, costs).argsort(descending=True, stable=True)
        count = min(QUERIES, pair.channels - 1, int((allowed >= LOWEST_EXPONENT).sum()))
        chosen = order[:count].tolist()
    else:
        chosen = [int(torch.where(allowed == best, costs, math.inf).argmin())]
    lost = 0.0 if rows_alone else float(costs[chosen].sum() / costs.sum())
    exponents = tuple(int(allowed[channel]) for channel in chosen)
    return folded_pair(pair, chosen, exponents, lost if activations.outputs else None)


def raise_within_blocks(
    pair: SymmetricPair, activations: Activations, norms: NormsOf, loss: float
) -> FoldedPair | None:
    """Choose what becomes largest beside its neighbours while the blocks of its readers lose no more than ``loss``.

    Returns:
        ``None`` where no channel can be raised so, or the readers' inputs are not known.
    """
    if pair.kind == "query_key":
        return raise_pair(pair, activations, EXPONENT, norms)
    readers = [side for side in pair.sides if side.power < 0 and side.weight in activations.drowned]
    if not readers:
        return None
    raised = tuple(side for side in pair.sides if side.power > 0)
    costs = energies(replace(pair, sides=(*raised, *readers)), activations, norms)
    drowned = torch.stack(
        [activations.drowned[side.weight].double()[:, torch.tensor(side.indices)].sum(-1) for side in readers]
    ).sum(0)  # [exponents, channels]
    exponents = torch.arange(1, len(drowned) + 1)[:, None]
    lost = (drowned + costs) / costs.sum()
    mean_square = activations.inputs[readers[0].weight].mean_square[torch.tensor(readers[0].indices)].sum(-1)
    allowed = (lost <= loss) & (exponents <= _room(pair, activations)) & (costs > 0)
    if not allowed.any():
        return None
    best = int(torch.where(allowed, mean_square * 4.0**exponents, -1).argmax())
    row, channel = divmod(best, pair.channels)
    return folded_pair(pair, (channel,), (row + 1,), float(lost[row, channel]))


def _room(pair: SymmetricPair, activations: Activations) -> Tensor:
    """The largest exponent that float16 allows each channel; infinite for one of zeros."""
    return (LARGEST / largest(pair, activations)).log2().floor()


def energies(pair: SymmetricPair, activations: Activations, norms: NormsOf) -> Tensor:
    """What each channel contributes to what the pair's readers put out, as energy; shape [channels], float64.

    E[x²·‖column‖² / Σ_j x_j²·‖column_j‖²], summed over the readers; of queries against keys E[q²]·E[k²]. Where x was
    not seen, the norm of the rows that make it stands for it.
    """
    readers = [side for side in pair.sides if side.power < 0]
    made = _put_out([side for side in pair.sides if side.power > 0], activations, norms)
    if pair.kind == "query_key":
        return made * _put_out(readers, activations, norms)
    total = torch.zeros(pair.channels, dtype=torch.float64)
    for side in readers:
        seen = activations.inputs.get(side.weight)
        if seen is None:
            total += made * norms(side).double()
        else:
            energy = seen.mean_square.double() * activations.column_norms[side.weight]
            total += energy[torch.tensor(side.indices)].sum(-1)
    return total


def largest(pair: SymmetricPair, activations: Activations) -> Tensor:
    """The largest magnitude that passes through each channel, and of the rows that are raised; shape [channels]."""
    raised = [side for side in pair.sides if side.power > 0]
    seen = [(side, activations.row_largest.get(side.weight)) for side in raised]
    seen += [(side, activations.outputs[side.weight].largest) for side in raised if side.weight in activations.outputs]
    if pair.kind != "query_key":  # there the other side is rows too, and goes down
        readers = [side for side in pair.sides if side.power < 0 and side.weight in activations.inputs]
        seen += [(side, activations.inputs[side.weight].largest) for side in readers]
    found = torch.zeros(pair.channels)
    for side, values in seen:
        if values is not None:
            found = found.maximum(values[torch.tensor(side.indices)].amax(-1))
    return found


def _put_out(sides: Sequence[Side], activations: Activations, norms: NormsOf) -> Tensor:
    """Mean square of what passes through each channel, shape [channels]; the norm of its rows where that is not known.

    A bias is part of what its linear puts out, and only counts where that is not known.
    """
    seen = activations.outputs
    known = [seen[side.weight].mean_square[torch.tensor(side.indices)].sum(-1) for side in sides if side.weight in seen]
    return torch.stack(known or [norms(side) for side in sides]).double().sum(0)
