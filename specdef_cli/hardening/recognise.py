"""The traces of hardening, read off the weights: a published model need not say how it was made.

A fold scales a few channels of a symmetric pair by large powers of two and divides their partners by them. How much
larger one side is than its channels usually are, against how much smaller the other side is, gives the factor. Names
on disk give factors away, and α is how much larger their singular values are than their product's.

A channel's size is the median of its weights' absolute values: a fold changes few channels of each pair, so that what
other pairs did to single entries of the same row or column does not move a median.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdef_cli.checkpoint.changes import Change
from specdef_cli.checkpoint.files import FLOATING_DTYPES
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.model.body import Side, SymmetricPair
from specdef_cli.model.skeleton import Skeleton
from specdef_cli.model.symmetries import symmetries
from specdef_cli.spectral.subspace import layer_seed, top_subspace

NATURAL_OCTAVES = 4
NATURAL_OCTAVES_OF_NORMS = 6
"""So far do channels of a trained model stand out by themselves: at most 1 in pairs of value and output or query and
key, 3 in MLPs, 6 between norms and what reads them (SmolLM2-135M; 1, 2 and none such in Gemma 3 270M).
"""

SAMPLE = 512
"""Weights of a channel that are enough to see a factor of hundreds."""


@dataclass(frozen=True)
class Recognised:
    """What was found in the weights of a model.

    Attributes:
        octaves: The largest power of two among those, as a whole number; 0 where there is none.
        alpha: The largest factor by which anything is inflated; 1 where nothing is.
    """

    folded: tuple[str, ...] = ()
    octaves: int = 0
    factored: tuple[str, ...] = ()
    alpha: float = 1.0
    scaled: tuple[str, ...] = ()

    @property
    def constructions(self) -> frozenset[Change]:
        """The constructions that the weights show."""
        found: dict[Change, tuple[str, ...]] = {"folded": self.folded, "scaled": self.scaled, "factored": self.factored}
        return frozenset(change for change, there in found.items() if there)

    @property
    def sentence(self) -> str | None:
        """For people; ``None`` where nothing was found."""
        parts = []
        if self.folded:
            parts.append(f"a fold: {len(self.folded)} symmetric pairs have channels scaled by up to 2^{self.octaves}")
        if self.factored:
            parts.append(f"factors: {len(self.factored)} layers are a product C·W~ with α about {self.alpha:.0e}")
        if self.scaled:
            parts.append(f"{len(self.scaled)} modules with vectors that undo a scale of their weight")
        return f"The weights show {' and '.join(parts)}." if parts else None


def recognise(checkpoint: Checkpoint, skeleton: Skeleton) -> Recognised:
    """Look at the weights of a checkpoint, one tensor in memory at a time; the skeleton is the original model's."""

    def is_intact(side: Side) -> bool:
        header = checkpoint.tensors.get(side.tensor)
        return header is not None and header.dtype in FLOATING_DTYPES and header.shape == skeleton.shapes[side.tensor]

    found = symmetries(skeleton).pairs
    pairs = [pair for pair in found if pair.channels > 1 and all(map(is_intact, pair.sides))]
    return recognised_in(checkpoint.read, checkpoint.tensors, pairs)


def recognised_in(read: Callable[[str], Tensor], names: Collection[str], pairs: Sequence[SymmetricPair]) -> Recognised:
    """Look at tensors that are read by name, and the symmetric pairs of their model."""
    folded, octaves = [], 0
    for pair in pairs:
        largest = int(channel_exponents(pair, read, sample=SAMPLE).abs().max())
        if largest > (NATURAL_OCTAVES_OF_NORMS if pair.kind == "norm_readers" else NATURAL_OCTAVES):
            folded.append(pair.name)
            octaves = max(octaves, largest)
    factored, alpha = [], 2.0**octaves
    for layer in _stems(names, ".compensation.weight"):
        factor = inflation(read(f"{layer}.inflated.weight"), read(f"{layer}.compensation.weight"))
        if factor > 2**NATURAL_OCTAVES:
            factored.append(layer)
            alpha = max(alpha, factor)
    scaled = _stems(names, ".input_scale.weight") | _stems(names, ".output_scale.weight")
    return Recognised(tuple(folded), octaves, tuple(factored), alpha, tuple(sorted(scaled)))


def _stems(names: Collection[str], end: str) -> dict[str, None]:
    """Strip an ending from the names that have it, in their order."""
    return {name.removesuffix(end): None for name in names if name.endswith(end)}


def inflation(inflated: Tensor, compensation: Tensor) -> float:
    """σ₁(W~)·σ₁(C)/σ₁(C·W~): α for a pair, whatever its gauge; about 1 for matrices that do not cancel.

    Args:
        inflated: W~, shape [m, n].
        compensation: C, shape [m, m].
    """
    first, second = inflated.float(), compensation.float()
    product = second @ first
    if not all(bool(matrix.isfinite().all()) for matrix in (first, second, product)):
        return 1.0  # a broken model: there is nothing to recognise
    values = [float(top_subspace(matrix, 1, layer_seed(0, "recognise")).singular_values[0])
              for matrix in (first, second, product)]  # fmt: skip
    return values[0] * values[1] / values[2] if values[2] > 0 else 1.0


def channel_exponents(pair: SymmetricPair, read: Callable[[str], Tensor], *, sample: int | None = None) -> Tensor:
    """The power of two by which each channel of a pair seems to be scaled, shape [channels], whole numbers.

    Half the difference between how far (in octaves) the channel stands out on the sides that a fold multiplies, and
    on those that it divides. What a channel weighs naturally stands out on both and cancels.
    """
    found: dict[int, list[Tensor]] = {1: [], -1: []}
    for side in pair.sides:
        tensor, axis = read(side.tensor), side.axis
        if side.block is not None:
            tensor, axis = tensor[side.block], axis - 1
        index = torch.tensor(side.indices, device=tensor.device)  # [channels, entries]
        rows = tensor.movedim(axis, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]
        stride = 1 if sample is None else max(1, rows.shape[1] // sample)
        chosen = rows[:, ::stride][index.flatten()].float().abs()
        sizes = chosen.reshape(len(side.indices), -1).median(-1).values.cpu()
        if bool((sizes > 0).all()):
            octaves = sizes.log2()
            found[side.power].append(octaves - octaves.median())
    if not found[1] or not found[-1]:
        return torch.zeros(pair.channels, dtype=torch.int64)
    multiplied, divided = (torch.stack(found[power]).mean(0) for power in (1, -1))
    return ((multiplied - divided) / 2).round().long()
