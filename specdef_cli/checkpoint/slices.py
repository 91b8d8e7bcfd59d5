"""Parts of a tensor that are multiplied by powers of two, and the names that a linear layer has on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specdef_cli.errors import SpecDefError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer y = Wx (+ b), W ∈ R^{m×n}, whose weight is one tensor on disk."""

    module: str
    """Path of the layer in the transformers model, e.g. ``model.layers.0.self_attn.o_proj``."""
    tensor: str
    """Name of the weight on disk; it ends in ``.weight``."""
    out_features: int
    """m, the length of y."""
    in_features: int
    """n, the length of x."""
    bias: str | None
    """Name of the bias on disk, or ``None``."""
    transposed: bool
    """Whether the tensor on disk is Wᵀ (transformers' ``Conv1D``)."""


@dataclass(frozen=True)
class ScaledSlice:
    """Part of one tensor, multiplied by powers of two."""

    tensor: str
    """Name in the checkpoint's files."""
    axis: int
    """The dimension that ``indices`` count along."""
    block: int | None
    """Index on dimension 0 of a tensor that stacks experts, or ``None``; ``axis`` counts dimension 0 too."""
    indices: tuple[int, ...]
    """Positions along ``axis``."""
    exponents: tuple[int, ...]
    """The slice at each of them is scaled by 2**exponent."""

    @property
    def inverse(self) -> ScaledSlice:
        """What undoes it, bit for bit."""
        negated = tuple(-exponent for exponent in self.exponents)
        return ScaledSlice(self.tensor, self.axis, self.block, self.indices, negated)


def scale_rows(rows: Tensor, first: int, shape: tuple[int, ...], part: ScaledSlice) -> None:
    """Multiply what a slice has in some consecutive rows of its tensor; every dimension but the last counts rows.

    Args:
        rows: Shape [rows, columns].
        first: Index of the first of them in the tensor.
        shape: Of the tensor.
    """
    import torch

    numbers = torch.arange(first, first + len(rows))
    inside = numbers >= 0 if part.block is None else numbers // math.prod(shape[1:-1]) == part.block
    if part.axis == len(shape) - 1:
        positions = inside.nonzero().flatten().tolist()
        if positions:
            scale_slice(rows[positions[0] : positions[-1] + 1], replace(part, axis=1, block=None))
        return
    along = torch.zeros(shape[part.axis], dtype=torch.int64)
    along[torch.tensor(part.indices)] = torch.tensor(part.exponents)
    exponents = along[numbers // math.prod(shape[part.axis + 1 : -1]) % shape[part.axis]] * inside
    scaled = exponents.nonzero().flatten()
    if len(scaled):
        indices, powers = tuple(scaled.tolist()), tuple(exponents[scaled].tolist())
        scale_slice(rows, replace(part, axis=0, block=None, indices=indices, exponents=powers))


def scale_slice(tensor: Tensor, part: ScaledSlice) -> None:
    """Multiply a slice of ``tensor`` by powers of two in place."""
    import torch  # here: a manifest, which lists slices, is read without it

    from specdef_cli.dtypes import dtype_name

    target = tensor if part.block is None else tensor[part.block]
    axis = part.axis if part.block is None else part.axis - 1
    factors = torch.tensor([2.0**exponent for exponent in part.exponents], dtype=torch.float64, device=tensor.device)
    index = torch.tensor(part.indices, device=tensor.device)
    old = target.index_select(axis, index)
    wanted = old.double() * factors.reshape([-1 if dimension == axis else 1 for dimension in range(target.dim())])
    new = wanted.to(tensor.dtype)
    # A subnormal result may still be stored exactly, but kernels flush subnormals to zero.
    flushed = (new != 0) & (new.abs().double() < torch.finfo(tensor.dtype).tiny)
    if not torch.equal(new.double(), wanted) or bool(flushed.any()):
        leave = f"--exclude '{part.tensor.removesuffix('.weight')}'"
        if not bool(old.isfinite().all()):
            raise SpecDefError(f"{part.tensor} holds NaN or infinity", "Repair it: what it computes is NaN already.")
        nonzero = old[old != 0].abs().double()
        wider = "" if tensor.dtype in (torch.float32, torch.bfloat16) else "Store float32 (--dtype float32), or "
        raise SpecDefError(
            f"{part.tensor} holds numbers from {nonzero.min():.2g} to {nonzero.max():.2g}, and times up to "
            f"2**{max(map(abs, part.exponents))} they leave the range of {dtype_name(tensor.dtype)}",
            f"{wider}{'leave' if wider else 'Leave'} it as it is: {leave}.",
        )
    target.index_copy_(axis, index, new)
