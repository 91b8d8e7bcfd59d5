"""Symmetric pairs as other rooms see them, and the parts of a transformer that they are found in.

A symmetric pair is a set of tensor slices that can be multiplied by d and 1/d, channel by channel, without changing the
function. With d a power of two nothing is rounded. Folding puts the paper's inflated layer and its compensation
(arXiv 2602.18868, Algorithm 1) into such a pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.model.families import FAMILIES, Attention, Experts, Family, Mlp, Stack
from specdef_cli.model.skeleton import Skeleton

PairKind = Literal["value_output", "up_down", "query_key", "norm_readers"]
Indices = tuple[tuple[int, ...], ...]
Power = Literal[1, -1]


@dataclass(frozen=True)
class Side:
    """The slices of one tensor that belong to a pair.

    Attributes:
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

    @property
    def weight(self) -> str:
        """Name of the tensor, and of its block where it stacks experts."""
        return self.tensor if self.block is None else in_stack(self.tensor, self.block)


@dataclass(frozen=True)
class SymmetricPair:
    """Slices that can be rescaled against each other without changing the function.

    Attributes:
        name: Where, by the path in the transformers model, e.g. ``model.layers.0.self_attn.value_output``.
        sides: The slices. Some have power +1 and some -1.
    """

    name: str
    kind: PairKind
    channels: int
    sides: tuple[Side, ...]


def in_stack(tensor: str, expert: int) -> str:
    """The name of an expert's part of a tensor that stacks them."""
    return f"{tensor}[{expert}]"


Found = Iterator[SymmetricPair | str]
"""Pairs that a search yields, and notes on why there are no more."""


@dataclass(frozen=True)
class Symmetries:
    """The symmetric pairs of a checkpoint, in the model's order, and reasons why there are no more."""

    pairs: tuple[SymmetricPair, ...]
    unpaired: tuple[str, ...]


class NoPair(Exception):
    """A pair that does not hold; the message says why."""


@lru_cache(maxsize=64)
def singles(count: int, start: int = 0) -> Indices:
    """One position a channel, from ``start``; cached, as thousands of sides have the same."""
    return tuple((start + channel,) for channel in range(count))


def join(*parts: str) -> str:
    """A module path from its parts, of which some may be empty."""
    return ".".join(part for part in parts if part)


def generic(path: str) -> str:
    """A path with its block indices replaced, so that equal notes of many blocks become one."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def described_bodies(model: nn.Module) -> Iterator[tuple[str, Family]]:
    """The outermost submodules whose class is described. A class of the same name from elsewhere is another class."""
    found: list[str] = []
    for path, module in model.named_modules():
        family = FAMILIES.get(type(module).__name__)
        if family is None or not type(module).__module__.startswith("transformers.models."):
            continue
        if not any(outer == "" or path.startswith(f"{outer}.") for outer in found):
            found.append(path)
            yield path, family


def blocks(model: nn.Module, path: str, stack: Stack) -> list[str]:
    """Paths of the blocks of a stack in the body at ``path``."""
    place = join(path, stack.blocks)
    try:
        return [join(place, child) for child, _ in model.get_submodule(place).named_children()]
    except AttributeError:  # a body without this stack
        return []


def output_norms(model: nn.Module) -> set[str]:
    """Paths of the norms whose output is, or is added to, the residual stream, as far as families are described."""
    return {
        join(block, norm)
        for path, family in described_bodies(model)
        for stack in family.stacks
        for block in blocks(model, path, stack)
        for norm in family.output_norms
    }


@dataclass(frozen=True)
class Body:
    """The body of one described family within a checkpoint's model."""

    skeleton: Skeleton
    path: str
    family: Family

    @property
    def module(self) -> PreTrainedModel:
        module = self.skeleton.modules[self.path]
        assert isinstance(module, PreTrainedModel)
        return module

    @property
    def config(self) -> Any:
        return self.module.config.get_text_config()

    # --- what there is

    def blocks(self, stack: Stack) -> list[str]:
        return blocks(self.skeleton.model, self.path, stack)

    def sublayers(self, stack: Stack, block: str) -> Iterator[Attention | Mlp | Experts]:
        """The described sublayers that a block has."""
        for layer in stack.sublayers:
            needed = ["gate_up_proj"] if isinstance(layer, Experts) else [f"{part}.weight" for part in layer.readers]
            if all(self.has(join(block, layer.path, parameter)) for parameter in needed):
                yield layer

    def undescribed(self) -> list[str]:
        """Parameters inside the blocks that the description does not account for (a cross-attention, say)."""
        unknown = set()
        extra = tuple(f".{suffix}" for suffix, _ in self.family.unpaired)
        for stack in self.family.stacks:
            for block in self.blocks(stack):
                known = [join(block, name) for name in self.family.output_norms]
                for layer in self.sublayers(stack, block):
                    known += [join(block, part) for part in _parts(layer)]
                for name in self.skeleton.parameters:
                    if not name.startswith(f"{block}.") or name.endswith(extra):
                        continue
                    if not any(name == path or name.startswith(f"{path}.") for path in known):
                        unknown.add(generic(name))
        return sorted(unknown)

    def has(self, parameter: str) -> bool:
        return parameter in self.skeleton.parameters

    def out_features(self, module: str) -> int:
        return int(self.skeleton.parameters[f"{module}.weight"].shape[1 if self._is_transposed(module) else 0])

    def in_features(self, module: str) -> int:
        return int(self.skeleton.parameters[f"{module}.weight"].shape[0 if self._is_transposed(module) else 1])

    def is_tied(self, head: str) -> bool:
        """Whether the head's weight is, or may be, the embeddings'.

        A checkpoint can hold both although its config ties them. Transformers then compares the values, other engines
        do not look; so they count as tied. T5's config class ties always and remembers what the checkpoint said as
        ``scale_decoder_outputs``.
        """
        weight = f"{head}.weight"
        kept_apart = (
            getattr(self.config, "scale_decoder_outputs", True) is False and weight in self.skeleton.names.sources
        )
        return weight in self.skeleton.tied and not kept_apart

    # --- sides

    def tensor(self, parameter: str) -> str:
        """The tensor on disk that is a parameter as it stands.

        Raises:
            NoPair: There is none.
        """
        tensor = self.skeleton.names.tensor(parameter)
        if tensor is None:
            raise NoPair(f"{generic(parameter)} is not one plain tensor on disk, so it takes part in no pair.")
        self.skeleton.require_shape(tensor, tuple(self.skeleton.parameters[parameter].shape), parameter)
        return tensor

    def side(self, parameter: str, axis: int, indices: Indices, power: Power) -> Side:
        """Some positions of a parameter, as :meth:`tensor` finds it."""
        return Side(self.tensor(parameter), axis, indices, power)

    def rows(self, module: str, indices: Indices, power: Power) -> list[Side]:
        """Output channels of a linear (or norm): rows of the weight, entries of the bias."""
        sides = [self.side(f"{module}.weight", 1 if self._is_transposed(module) else 0, indices, power)]
        if self.has(f"{module}.bias"):
            sides.append(self.side(f"{module}.bias", 0, indices, power))
        return sides

    def columns(self, module: str, indices: Indices, power: Power) -> list[Side]:
        """Input channels of a linear: columns of the weight."""
        return [self.side(f"{module}.weight", 0 if self._is_transposed(module) else 1, indices, power)]

    def _is_transposed(self, module: str) -> bool:
        return isinstance(self.skeleton.modules[module], Conv1D)


def _parts(layer: Attention | Mlp | Experts) -> list[str]:
    """Modules and parameters that a sublayer is described by, relative to the block."""
    norm = [layer.norm] if layer.norm else []
    if isinstance(layer, Experts):
        readers = [name for reader in layer.readers for name in (reader, reader.removesuffix(".weight"))]
        return [*norm, layer.path, *readers]
    norms = (layer.query_norm, layer.key_norm) if isinstance(layer, Attention) else ()
    return norm + [join(layer.path, part) for part in (*layer.readers, layer.writer, *norms) if part]
