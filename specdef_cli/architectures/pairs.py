"""What an exact symmetry between the weights of a checkpoint is, in terms of its tensors on disk.

A symmetric pair is a set of tensor slices that can be multiplied by d and 1/d, channel by channel, without changing the
function. With d a power of two nothing is rounded: the logits keep every bit as long as nothing over- or underflows.
Folding puts the paper's inflated layer and its compensation (arXiv 2602.18868, Algorithm 1) into such a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PairKind = Literal["value_output", "up_down", "query_key", "norm_readers"]
Indices = tuple[tuple[int, ...], ...]
Power = Literal[1, -1]


@dataclass(frozen=True)
class Side:
    """The slices of one tensor that belong to a pair.

    Attributes:
        tensor: Name on disk.
        axis: The dimension that ``indices`` count along (dimension 0 included where the tensor stacks experts).
        indices: For each channel of the pair, the positions along ``axis`` that it scales; every channel has equally
            many, none is listed twice.
        power: +1 where the slices are multiplied by the channel's factor d, -1 where by 1/d.
        block: Index on dimension 0 of a tensor that stacks experts; ``None``: all of it.
    """

    tensor: str
    axis: int
    indices: Indices
    power: Power
    block: int | None = None


@dataclass(frozen=True)
class SymmetricPair:
    """Slices that can be rescaled against each other without changing the function.

    Attributes:
        name: Where, by the path in the transformers model, e.g. ``model.layers.0.self_attn.value_output``.
        kind: Which symmetry.
        channels: How many independent factors the pair takes.
        sides: The slices. Some have power +1 and some -1.
    """

    name: str
    kind: PairKind
    channels: int
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Unpaired:
    """Why pairs are missing.

    Attributes:
        kind: Which symmetry does not hold; ``None`` for parameters that none could involve.
        reason: A sentence that names the parameters.
    """

    kind: PairKind | None
    reason: str


Found = Iterator[SymmetricPair | Unpaired]
"""What one search yields: pairs, and why there are no more."""


@dataclass(frozen=True)
class Symmetries:
    """All symmetric pairs of a checkpoint, and why there are no more.

    Attributes:
        pairs: In the order of the model.
        unpaired: What has no pair, once for all blocks.
    """

    pairs: tuple[SymmetricPair, ...]
    unpaired: tuple[Unpaired, ...]
