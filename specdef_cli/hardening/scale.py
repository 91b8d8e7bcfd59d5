"""Scale the weight of a module by channel, and have the module undo it: a fold where no second weight is needed.

A few channels of a weight are multiplied by powers of two; a vector beside the weight (rows of a linear, columns of an
embedding, entries of a norm's gain) holds their inverses. Nothing is rounded, so the outputs are the base's, bit for
bit, in any architecture. It costs a vector a side instead of the paper's matrix, and the model needs code to load.

What is scaled where was decided by measuring (``make real-attack``):

* a linear layer on both of its sides. At the learning rate of an inflated row that row trains, which is a vector, and a
  vector in every layer is a LoRA of rank one. Where a scaled row crosses a scaled column, one number is left;
* two channels a side, one inflated and one deflated, as in a fold and for its reasons;
* a few tokens of a vocabulary in steps. A column of the embedding or the head that trains alone is a number for each
  token, which is worth much; beside tokens on higher steps, which diverge, the others hardly move;
* the gain of one norm far above all others, one that does not write to the residual stream, where an entry is worth
  more. Gains have one side, so that neighbours on a staircase train together;
* the channels with the largest norm among a sample: a channel without signal has no gradient to diverge on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from specdef_cli.checkpoint.changes import ScaledChannels, ScaledModule
from specdef_cli.checkpoint.reader import TORCH_DTYPES, Checkpoint
from specdef_cli.checkpoint.shards import Produced, Rows, TensorGroup, TensorSpec
from specdef_cli.checkpoint.stream import one_thread
from specdef_cli.hardening.fold import DIRECTIONS, HIGHEST_UNCROSSED, SAMPLE_ROWS, by_block, one_apart, staircase
from specdef_cli.model.sites import ScalableSite, require_findable
from specdef_cli.model.skeleton import Skeleton

HEAD_TOKENS = ScaledChannels(axis=0, indices=tuple(range(1, 8)), exponents=tuple(range(-4, -32, -4)), period=128)
"""Steps of a decade and more, down to where a token's entry in a column at 2**-28 is at 2**-56. What trains at the best
rate are the tokens on the last step, so they are few; each has a gradient from every position.
"""
LOOKUP_TOKENS = replace(HEAD_TOKENS, period=8)
"""The same where only tokens that occur have a gradient: one of every step must be in a batch."""


@dataclass(frozen=True)
class ScaleVectors:
    """The transform that makes the vectors that undo a scale, and what stands where the weight was.

    Attributes:
        modules: The module that holds the weight, then the head that shares it, if one does.
        dtype: safetensors dtype of everything written.
    """

    modules: tuple[ScaledModule, ...]
    dtype: str

    def group(self) -> TensorGroup:
        """Describe the output; the weight and its bias are streamed."""
        owner = self.modules[0]
        outputs = [
            TensorSpec(name, self.dtype, shape) for module in self.modules for name, shape in module.stored.items()
        ]
        return TensorGroup(owner.module, tuple(outputs), self, _scaled(owner, self.dtype))

    def __call__(self, checkpoint: Checkpoint, device: torch.device) -> Produced:
        """The vectors, from the plan alone."""
        tensors, stored = {}, TORCH_DTYPES[self.dtype]
        for module in self.modules:
            for name, side in module.scales.items():
                tensors[name] = scale_vector(module.shape[side.axis], side, stored)
            tensors[module.tombstone] = torch.zeros(1, dtype=stored)
        return Produced(tensors)


def _scaled(module: ScaledModule, dtype: str) -> dict[str, Rows]:
    """Weight and bias of a module, by their new names."""
    names = {module.inflated_tensor: module.tensor}
    if module.inflated_bias is not None and module.bias is not None:
        names[module.inflated_bias] = module.bias
    return {
        new: Rows(old, dtype, tuple(part for part in module.slices if part.tensor == old)) for new, old in names.items()
    }


def unscaled_group(module: ScaledModule, dtype: str) -> TensorGroup:
    """Multiply weight and bias back, bit for bit."""
    outputs = [TensorSpec(name, dtype, shape) for name, shape in module.original.items()]
    undone = {
        rows.tensor: Rows(scaled, dtype, tuple(part.inverse for part in rows.slices))
        for scaled, rows in _scaled(module, dtype).items()
    }
    return TensorGroup(module.module, tuple(outputs), streamed=undone)


def scale_vector(length: int, side: ScaledChannels, dtype: torch.dtype) -> Tensor:
    """2**-exponent at the scaled channels and 1 elsewhere, shape [length]."""
    vector = torch.ones(length, dtype=dtype)
    indices, exponents = side.along(length)
    vector[list(indices)] = torch.tensor([2.0**-exponent for exponent in exponents], dtype=dtype)
    return vector


@one_thread()
def scale_modules(
    checkpoint: Checkpoint, skeleton: Skeleton, sites: Sequence[ScalableSite]
) -> tuple[ScaledModule, ...]:
    """Choose channels and exponents.

    Reads a sample of every weight, to find channels with signal.
    """
    exponents = spread_exponents(sites)
    shared = {site.tied_to for site in sites}
    modules: dict[str, ScaledModule] = {}
    for site in sites:
        owner = modules.get(site.tied_to or "")
        if site.tied_to is not None:
            assert owner is not None
            output, inputs = owner.input, owner.output
        else:
            start, squares = _sample(checkpoint, site)
            looked_up = site.kind == "embedding" and site.module not in shared
            tokens = LOOKUP_TOKENS if looked_up else HEAD_TOKENS
            output, inputs = (
                None
                if axis is None
                else _within(tokens, site.shape[axis])
                if site.kind in ("embedding", "head") and axis == tokens.axis
                else _channels(start, squares, axis, steps)
                for axis, steps in zip((site.output_axis, site.input_axis), exponents[site.module], strict=True)
            )
            if output is None:
                continue
        modules[site.module] = ScaledModule(
            site.module, site.kind, site.tensor, site.stem, site.shape, site.bias, output, inputs, site.tied_to
        )
    scaled = tuple(modules.values())
    require_findable(skeleton, scaled)
    return scaled


def spread_exponents(sites: Iterable[ScalableSite]) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
    """Exponents by module, for the channels on the side of its output and on that of its input.

    The first block stands apart, together with what lies outside of the blocks; within a block the modules that come
    last in the model (the MLP's) have the highest steps. Norms have steps of their own: the last of the first block
    that does not write to the residual stream stands apart from all others.
    """
    own = [site for site in sites if site.tied_to is None]
    count = len(DIRECTIONS)
    outside, (first, *others) = _last_first(site for site in own if site.kind != "norm")
    layers = [[*outside, *first], *others]
    steps = staircase(len(layers), 2 * count * max(map(len, layers)))
    exponents: dict[str, tuple[Sequence[int], Sequence[int]]] = {
        site.module: (layer[position : position + count], layer[position + count : position + 2 * count])
        for members, layer in zip(layers, steps, strict=True)
        for position, site in zip(range(0, len(layer), 2 * count), members, strict=False)
    }
    outside, (first, *others) = _last_first(site for site in own if site.kind == "norm")
    norms = [*sorted(first, key=lambda norm: norm.writes), *outside, *chain.from_iterable(others)]
    steps = one_apart(len(norms), count, HIGHEST_UNCROSSED)
    return exponents | {site.module: (gains, ()) for site, gains in zip(norms, steps, strict=True)}


def _last_first(sites: Iterable[ScalableSite]) -> tuple[list[ScalableSite], list[list[ScalableSite]]]:
    """Split as :func:`by_block`, each block with its last module first."""
    outside, blocks = by_block(sites, lambda site: site.module)
    return outside, [members[::-1] for members in blocks]


def scaled_groups(modules: Sequence[ScaledModule], checkpoint: Checkpoint, dtype: str | None) -> dict[str, TensorGroup]:
    """The output groups of all scaled modules, by the name of the base's tensor."""
    by_tensor: dict[str, list[ScaledModule]] = {}
    for module in sorted(modules, key=lambda module: module.tied_to is not None):
        by_tensor.setdefault(module.tensor, []).append(module)
    return {
        tensor: ScaleVectors(tuple(members), dtype or checkpoint.tensors[tensor].dtype).group()
        for tensor, members in by_tensor.items()
    }


def _sample(checkpoint: Checkpoint, site: ScalableSite) -> tuple[int, Tensor]:
    """Squares of some rows of a weight, shape [rows, columns], and the index of the first; of a vector, as one column.

    From the middle: the first tokens of a vocabulary are special ones.
    """
    if len(site.shape) == 1:
        return 0, checkpoint.read(site.tensor).float().square()[:, None]
    count = min(SAMPLE_ROWS, site.shape[0])
    start = (site.shape[0] - count) // 2
    return start, checkpoint.read_rows(site.tensor, range(start, start + count)).float().square()


def _within(tokens: ScaledChannels, vocabulary: int) -> ScaledChannels | None:
    """Drop steps beyond a vocabulary; ``None`` if none is left."""
    kept = sum(index < vocabulary for index in tokens.indices)
    return replace(tokens, indices=tokens.indices[:kept], exponents=tokens.exponents[:kept]) if kept else None


def _channels(start: int, squares: Tensor, axis: int, steps: Sequence[int]) -> ScaledChannels | None:
    """The channels of a sample with the largest norm; ``None`` where all are zero."""
    norms = squares.sum(1 - axis)
    order = norms.argsort(descending=True, stable=True)
    chosen = order[norms[order] > 0][: len(steps)].tolist()
    if not chosen:
        return None
    exponents = tuple(direction * step for direction, step in zip(DIRECTIONS, steps, strict=True))
    first = start if axis == 0 else 0
    return ScaledChannels(axis, tuple(first + index for index in chosen), exponents[: len(chosen)])
