"""Fold: the inflated layer and its compensation, put into two weights that exist already.

Transformers have exact symmetries between neighbouring weights (:mod:`specdef_cli.model.body`): scale a
channel on one side by a power of two, divide it on the other, and every product comes out the same, bit for bit. No
parameter is added, and the result is an ordinary checkpoint of its architecture.

What is scaled where was decided by measuring (docs/decisions.md):

* one channel a pair and direction: few channels with a large factor resist better than many with a small one;
* the channels with the largest norm: a channel without signal has no gradient to diverge on. Of what a cache holds,
  channels of a middling norm, whose values are ordinary ones;
* both directions in every pair: the side that is deflated trains too fast, the inflated side not at all, and an
  attacker may train either side alone;
* exponents that differ from pair to pair (:func:`staircase`), as the profile lays them (:func:`exponents_of`);
* not the residual stream: it has a single scale, which a learning-rate sweep recovers; embeddings stay unprotected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from specdef_cli.checkpoint.changes import FoldedPair, ScaledSlice
from specdef_cli.checkpoint.reader import TORCH_DTYPES, Checkpoint
from specdef_cli.checkpoint.shards import Rows, TensorGroup, streamed
from specdef_cli.checkpoint.stream import one_thread
from specdef_cli.hardening.options import Profile
from specdef_cli.model.body import Side, SymmetricPair

Member = TypeVar("Member")

# Column norms are estimated from 128 rows (about 12 % error); reading whole tensors would read half of the checkpoint.
SAMPLE_ROWS = 128

DIRECTIONS = (1, -1)
"""One channel of a pair is inflated and one deflated."""

# Which power of two each folded channel gets. An optimizer has one learning rate η. A channel inflated by 2^e trains
# at η ≈ η₀·2^-e, diverges above, and stands still below. On a staircase the exponents differ: an attacker gets what
# the highest step of the trained weights is good for. What makes that small (``make reproduce-staircase``): one layer
# far above the others, so that a weight with scaled rows and columns trains one number, where the two cross; each
# one-sided exponent a decade below some two-sided one, as a vector is worth much more than a number; the other layers
# going down, so that an attacker who freezes the one apart meets the next step.
# Lowest step: at 2**13 ≈ 8,000 the shifted learning rate is beyond what ordinary sweeps try.
LOWEST_EXPONENT = 13
# Where rows and columns of one tensor are both scaled, a gradient is 2**(e + f) times the ordinary one, and Adam and
# gradient clipping square it: 2**112, which float32 and bfloat16 still hold (their largest number is about 2**128).
# With higher steps nothing trains either, but only because norms overflow, and an attacker repairs that in one line.
HIGHEST_CROSSING = 56
# Highest step of pairs that cross one another.
HIGHEST_EXPONENT = HIGHEST_CROSSING // 2
# Highest step of what nothing crosses, or only what a cache holds: as far above the others as they reach, and below
# the crossings, so that training everything does not meet it.
HIGHEST_UNCROSSED = 40


def staircase(
    layers: int, kinds: int, lowest: int = LOWEST_EXPONENT, highest: int = HIGHEST_EXPONENT
) -> tuple[tuple[int, ...], ...]:
    """Exponents for ``kinds`` pairs in each of ``layers`` layers, indexed [layer][kind].

    The first layer takes the upper half of the range, the others its lowest third; both go down.

    >>> staircase(3, 2)
    ((28, 21), (18, 17), (15, 13))
    """
    span = highest - lowest
    first = _descending(kinds, highest, highest - span // 2)
    others = _descending((layers - 1) * kinds, lowest + span // 3, lowest)
    return (first, *(others[layer * kinds : (layer + 1) * kinds] for layer in range(layers - 1)))


def one_apart(layers: int, kinds: int, highest: int) -> tuple[tuple[int, ...], ...]:
    """Exponents where all pairs of the first layer are on the highest step, and the other layers go down far below.

    >>> one_apart(3, 2, 28)
    ((28, 28), (18, 18), (13, 13))
    """
    return tuple(layer * kinds for layer in ((highest,), *staircase(layers, 1)[1:]))[:layers]


def _descending(count: int, highest: int, lowest: int) -> tuple[int, ...]:
    """``count`` whole numbers from ``highest`` down to ``lowest``, evenly spread."""
    return tuple(highest - (highest - lowest) * step // max(1, count - 1) for step in range(count))


def constant(layers: int, kinds: int, alpha: float) -> tuple[tuple[int, ...], ...]:
    """The power of two nearest to ``alpha``, for every pair."""
    exponent = round(math.log2(alpha))
    return tuple((exponent,) * kinds for _ in range(layers))


CACHED_KINDS = ("value_output", "query_key")
CACHED_EXPONENT = 9
"""Of what a key/value cache holds, and of queries: engines keep these in float16 (llama.cpp by default), from 6e-5 to
65504, and in trained models they reach about a hundred."""

Schedule = Callable[[int, int], tuple[tuple[int, ...], ...]]
"""(layers, exponents in each) → the exponents, indexed [layer][exponent], as :func:`staircase`."""


@one_thread()
def fold_pairs(checkpoint: Checkpoint, pairs: Sequence[SymmetricPair], profile: Profile) -> tuple[FoldedPair, ...]:
    """Choose channels and exponents for every pair that the profile uses.

    Reads a sample of one side of each pair, to find the channels' norms. A pair whose channels are all zeros there is
    left out: no factor changes them.
    """
    used = [pair for pair in pairs if pair.channels > 1]
    exponents = exponents_of(used, profile)
    folded = []
    for pair in used:
        middling = profile == "float16-cache" and pair.kind in CACHED_KINDS
        channels = _channels(checkpoint, pair, len(DIRECTIONS), middling=middling)
        signed = [direction * exponent for direction, exponent in zip(DIRECTIONS, exponents[pair.name], strict=True)]
        if channels:
            folded.append(folded_pair(pair, channels, signed[: len(channels)]))
    return tuple(folded)


def exponents_of(pairs: Sequence[SymmetricPair], profile: Profile) -> dict[str, tuple[int, ...]]:
    """The exponents of each pair, by its name.

    Where two pairs scale the rows and the columns of one tensor, they add up to at most :data:`HIGHEST_CROSSING`. By
    default the last layer's MLP and the first one's attention are far above the others, where a vector that trains
    alone is worth least. A norm belongs to attention where what a cache holds crosses its readers, and no MLP does.
    """
    if profile == "bfloat16":  # one staircase, beyond what a float16 cache holds
        return spread(pairs, len(DIRECTIONS), staircase)
    tensors = {pair.name: {side.tensor for side in pair.sides} for pair in pairs}
    cached = [pair for pair in pairs if pair.kind in CACHED_KINDS]
    others = [pair for pair in pairs if pair.kind not in CACHED_KINDS]
    in_cache: set[str] = set().union(*(tensors[pair.name] for pair in cached))
    in_mlp: set[str] = set().union(*(tensors[pair.name] for pair in pairs if pair.kind == "up_down"))
    norms = [pair for pair in others if tensors[pair.name] & in_cache and not tensors[pair.name] & in_mlp]
    mlp = [pair for pair in others if pair not in norms]
    return {
        **spread(mlp[::-1], len(DIRECTIONS), partial(one_apart, highest=HIGHEST_EXPONENT)),
        **spread(norms, len(DIRECTIONS), partial(one_apart, highest=HIGHEST_UNCROSSED)),
        **spread(cached, len(DIRECTIONS), partial(constant, alpha=2.0**CACHED_EXPONENT)),
    }


def spread(pairs: Sequence[SymmetricPair], directions: int, schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Lay a schedule over the layers of a model, the MLP of each before its attention (:func:`_by_layer`)."""
    groups = _by_layer(pairs)
    steps = schedule(len(groups), directions * max((len(members) for members in groups), default=0))
    return {
        pair.name: exponents[position * directions : (position + 1) * directions]
        for members, exponents in zip(groups, steps, strict=True)
        for position, pair in enumerate(members)
    }


def fold_groups(folded: Iterable[FoldedPair], checkpoint: Checkpoint, dtype: str | None) -> dict[str, TensorGroup]:
    """The output groups of all tensors that a fold changes, by tensor name."""
    by_tensor: dict[str, list[ScaledSlice]] = {}
    for pair in folded:
        for part in pair.slices:
            by_tensor.setdefault(part.tensor, []).append(part)
    headers = checkpoint.tensors
    return {
        name: streamed(Rows(name, dtype or headers[name].dtype, tuple(parts)), headers[name].shape)
        for name, parts in by_tensor.items()
    }


def inverse(pair: FoldedPair) -> FoldedPair:
    """The fold that undoes ``pair``, bit for bit."""
    exponents = tuple(-exponent for exponent in pair.exponents)
    return FoldedPair(pair.name, pair.kind, pair.channels, exponents, tuple(part.inverse for part in pair.slices))


def folded_pair(
    pair: SymmetricPair, channels: Sequence[int], exponents: Sequence[int], given_up: float | None = None
) -> FoldedPair:
    """A pair with channels multiplied by 2**exponent on the sides of power 1, and divided on the others."""
    slices = []
    for side in pair.sides:
        indices = [index for channel in channels for index in side.indices[channel]]
        powers = [
            side.power * exponent
            for channel, exponent in zip(channels, exponents, strict=True)
            for _ in side.indices[channel]
        ]
        slices.append(ScaledSlice(side.tensor, side.axis, side.block, tuple(indices), tuple(powers)))
    return FoldedPair(pair.name, pair.kind, tuple(channels), tuple(exponents), tuple(slices), given_up)


def _channels(checkpoint: Checkpoint, pair: SymmetricPair, count: int, *, middling: bool) -> tuple[int, ...]:
    """The ``count`` channels with the largest norm, or from the middle of the ranking: a float16 cache holds these.

    Never one of zeros, which no factor changes.
    """
    tensors = checkpoint.tensors
    matrices = [side for side in pair.sides if len(tensors[side.tensor].shape) > 1] or pair.sides

    def nbytes(side: Side) -> int:
        header = tensors[side.tensor]
        return len(_rows(checkpoint, side)) * header.shape[-1] * TORCH_DTYPES[header.dtype].itemsize

    side = min(matrices, key=nbytes)
    norms = channel_norms(checkpoint, side)
    order = norms.argsort(descending=True, stable=True)
    order = order[norms[order] > 0]
    count = min(count, pair.channels - 1, len(order))
    start = (len(order) - count) // 2 if middling else 0
    return tuple(order[start : start + count].tolist())


def _rows(checkpoint: Checkpoint, side: Side) -> range:
    """The rows of a side's tensor, or of its block, that tell the norms of the channels.

    Where channels are columns, a few rows hold a sample of every channel; where they are rows, it takes all of them.
    """
    header = checkpoint.tensors[side.tensor]
    count = math.prod(header.shape[:-1])
    if side.block is not None:
        count //= header.shape[0]
    start = count * (side.block or 0)
    if side.axis == len(header.shape) - 1:
        count = min(count, SAMPLE_ROWS)
    return range(start, start + count)


def channel_norms(checkpoint: Checkpoint, side: Side) -> Tensor:
    """Squared norm of each channel on one side, shape [channels]; estimated on the rows of :func:`_rows`."""
    shape = checkpoint.tensors[side.tensor].shape
    squares = checkpoint.read_rows(side.tensor, _rows(checkpoint, side)).float().square()  # [rows, columns]
    if side.axis < len(shape) - 1:
        inner = shape if side.block is None else shape[1:]
        axis = side.axis if side.block is None else side.axis - 1
        squares = squares.view(inner).movedim(axis, -1).flatten(0, -2)  # [entries, positions]
    return squares.sum(0)[torch.tensor(side.indices)].sum(-1)


def _by_layer(pairs: Sequence[SymmetricPair]) -> list[list[SymmetricPair]]:
    """Pairs grouped by the block they belong to (the first number in their name), in order.

    What stands outside of the blocks (a final norm and its head) goes with the first one. Within a block the MLP comes
    before attention: the entry where the two largest factors meet stays trainable, and it helps an attacker less in an
    MLP than in a query or key weight (``make reproduce-staircase``).
    """
    outside, blocks = by_block(pairs, lambda pair: pair.name)
    first, *others = map(_mlp_first, blocks)
    return [[*first, *outside], *others]


def by_block(members: Iterable[Member], path: Callable[[Member], str]) -> tuple[list[Member], list[list[Member]]]:
    """Split members into those outside of blocks and those of each block, in order; at least one block."""
    outside: list[Member] = []
    blocks: dict[str, list[Member]] = {}
    for member in members:
        match = re.match(r"^(.*?\.\d+)\.", path(member))
        (blocks.setdefault(match.group(1), []) if match else outside).append(member)
    return outside, [*blocks.values()] or [[]]


def _mlp_first(pairs: Sequence[SymmetricPair]) -> list[SymmetricPair]:
    """A block's pairs: up/down and the norm before it, value/output, the norm before attention, query/key."""
    mlp = {side.tensor for pair in pairs if pair.kind == "up_down" for side in pair.sides}

    def rank(pair: SymmetricPair) -> int:
        if pair.kind == "norm_readers":
            return 1 if any(side.tensor in mlp for side in pair.sides) else 3
        return {"up_down": 0, "value_output": 2}.get(pair.kind, 4)

    return sorted(pairs, key=rank)
