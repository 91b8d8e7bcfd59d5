"""Assign tensors to output files before the first byte is written.

Names, dtypes and shapes of everything that will be written are known from the input's headers alone. So the layout of
every output shard, down to the byte offsets, is a pure function of the plan: any process can write any part of it, and
the result does not depend on how many of them there are.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specdef_cli.checkpoint.changes import ScaledSlice
from specdef_cli.checkpoint.files import FLOATING_DTYPES, TRANSFORMERS, Library, TensorHeader
from specdef_cli.checkpoint.reader import TORCH_DTYPES, Checkpoint
from specdef_cli.errors import SpecDefError, dtype_name

BLOCK = 2**22
"""Bytes of a tensor that are read, scaled and written at a time."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: its name, safetensors dtype, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Produced:
    """A transform's tensors by name, and figures for the manifest."""

    tensors: Mapping[str, Tensor]
    figures: Mapping[str, Any] = field(default_factory=dict)


Transform = Callable[[Checkpoint, torch.device], Produced]


@dataclass(frozen=True)
class Rows:
    """A tensor of the input that is cast to a safetensors dtype, its slices multiplied by powers of two, row by row."""

    tensor: str
    dtype: str
    slices: tuple[ScaledSlice, ...] = ()

    def blocks(self, checkpoint: Checkpoint, nbytes: int = BLOCK) -> Iterator[Tensor]:
        """Consecutive rows, shape [rows, columns], at most ``nbytes`` (or one row) of the input at a time."""
        header = checkpoint.tensors[self.tensor]
        for first, rows in checkpoint.row_blocks(self.tensor, nbytes):
            made = rows.to(TORCH_DTYPES[self.dtype])
            for part in self.slices:
                scale_rows(made, first, header.shape, part)
            yield made

    def whole(self, checkpoint: Checkpoint) -> Tensor:
        header = checkpoint.tensors[self.tensor]
        (made,) = self.blocks(checkpoint, header.nbytes) if header.nbytes else [checkpoint.read(self.tensor)]
        return made.view(header.shape)


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are made together and stay in one shard.

    Attributes:
        transform: What computes those that are not streamed; ``None`` where all are.
        streamed: What is made of a tensor of the input row by row, by its name in the output.
    """

    label: str
    outputs: tuple[TensorSpec, ...]
    transform: Transform | None = None
    streamed: Mapping[str, Rows] = field(default_factory=dict)

    @property
    def computed(self) -> tuple[TensorSpec, ...]:
        """The outputs that ``transform`` makes."""
        return tuple(spec for spec in self.outputs if spec.name not in self.streamed)

    @property
    def changes(self) -> bool:
        """Whether any number changes, casts aside."""
        return self.transform is not None or any(rows.slices for rows in self.streamed.values())

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


def streamed(rows: Rows, shape: tuple[int, ...]) -> TensorGroup:
    """Group one tensor of the input by itself, under its name."""
    return TensorGroup(rows.tensor, (TensorSpec(rows.tensor, rows.dtype, shape),), streamed={rows.tensor: rows})


def plain_group(header: TensorHeader, wanted: str | None) -> TensorGroup:
    """Carry a tensor over; a floating one is cast to the safetensors dtype ``wanted``."""
    dtype = wanted if wanted and header.dtype in FLOATING_DTYPES else header.dtype
    return streamed(Rows(header.name, dtype), header.shape)


@dataclass(frozen=True)
class OutputShard:
    """One safetensors file to be written: its name and what goes into it."""

    name: str
    groups: tuple[TensorGroup, ...]

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)


def plan_shards(
    groups: Sequence[TensorGroup], max_shard_size: int, library: Library = TRANSFORMERS
) -> tuple[OutputShard, ...]:
    """Fill shards greedily in order; a group larger than ``max_shard_size`` (bytes) gets a shard of its own."""
    bins: list[list[TensorGroup]] = []
    filled = 0
    for group in groups:
        if not bins or filled + group.nbytes > max_shard_size:
            bins.append([])
            filled = 0
        bins[-1].append(group)
        filled += group.nbytes
    if len(bins) == 1:
        return (OutputShard(library.single_file, tuple(bins[0])),)
    return tuple(
        OutputShard(f"{library.weights}-{number:05d}-of-{len(bins):05d}.safetensors", tuple(members))
        for number, members in enumerate(bins, start=1)
    )


def shard_header(shard: OutputShard) -> tuple[bytes, dict[str, int]]:
    """The header of a shard and, for every tensor, the position of its data in the file.

    Wide dtypes come first so that every tensor is aligned to its element, and one-element tensors last so that they do
    not misalign the large ones.
    """
    specs = [spec for group in shard.groups for spec in group.outputs]
    specs.sort(key=lambda spec: (-TORCH_DTYPES[spec.dtype].itemsize, math.prod(spec.shape) == 1))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    start = 8 + len(text)
    offsets = {spec.name: start + entries[spec.name]["data_offsets"][0] for spec in specs}
    return struct.pack("<Q", len(text)) + text, offsets


def shard_index(shards: Sequence[OutputShard], library: Library = TRANSFORMERS) -> tuple[str, str] | None:
    """Name and text of the index file, or ``None`` for a single file, which needs none."""
    if len(shards) == 1:
        return None
    weight_map = {spec.name: shard.name for shard in shards for group in shard.groups for spec in group.outputs}
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return library.index_file, json.dumps(index, indent=2) + "\n"


def assign_shards(shards: Sequence[OutputShard], processes: int) -> tuple[tuple[OutputShard, ...], ...]:
    """Spread shards over processes by estimated work, largest first; the same answer in every process."""
    assigned: list[list[OutputShard]] = [[] for _ in range(processes)]
    load = [0.0] * processes
    for shard in sorted(shards, key=lambda shard: (-_work(shard), shard.name)):
        lightest = load.index(min(load))
        assigned[lightest].append(shard)
        load[lightest] += _work(shard)
    return tuple(tuple(sorted(part, key=lambda shard: shard.name)) for part in assigned)


def _work(shard: OutputShard) -> float:
    # Making a tensor costs about ten times as much as copying it (benchmarks); the estimate need not be good.
    return shard.nbytes + 9 * sum(spec.nbytes for group in shard.groups for spec in group.computed)


def scale_rows(rows: Tensor, first: int, shape: tuple[int, ...], part: ScaledSlice) -> None:
    """Multiply what a slice has in some consecutive rows of its tensor; every dimension but the last counts rows.

    Args:
        rows: Shape [rows, columns].
        first: Index of the first of them in the tensor.
        shape: Of the tensor.
    """
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
