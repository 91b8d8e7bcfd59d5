"""A model's body beside its family's description: which blocks and sublayers there are, and the sides they make.

A *body* is the model without its head, and the part that :mod:`specdef_cli.architectures.families` describes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.architectures.families import FAMILIES, Attention, Experts, Family, Mlp, Stack
from specdef_cli.architectures.pairs import Indices, Power, Side
from specdef_cli.architectures.skeleton import Skeleton


class NotOnDisk(Exception):
    """A parameter that a pair needs is not on disk as a tensor of its own."""


@lru_cache(maxsize=64)
def singles(count: int, start: int = 0) -> Indices:
    """One position a channel, from ``start``. Cached: a large model has thousands of sides with the same positions."""
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
    """The body of one described family within a checkpoint's model.

    Attributes:
        skeleton: The whole model.
        path: Where the body is in it; empty where it is the model itself.
        family: Its description.
    """

    skeleton: Skeleton
    path: str
    family: Family

    @property
    def module(self) -> PreTrainedModel:
        """The body itself."""
        module = self.skeleton.modules[self.path]
        assert isinstance(module, PreTrainedModel)
        return module

    @property
    def config(self) -> Any:
        """The config of what the body reads."""
        return self.module.config.get_text_config()

    # --- what there is

    def blocks(self, stack: Stack) -> list[str]:
        """Paths of a stack's blocks."""
        return blocks(self.skeleton.model, self.path, stack)

    def sublayers(self, stack: Stack, block: str) -> Iterator[Attention | Mlp | Experts]:
        """The described sublayers that a block has."""
        for layer in stack.sublayers:
            if isinstance(layer, Attention):
                needed = [join(block, layer.path, layer.query, "weight")]
            elif isinstance(layer, Mlp):
                needed = [join(block, layer.path, part, "weight") for part in (layer.gate, layer.up) if part]
            else:
                needed = [join(block, layer.path, "gate_up_proj")]
            if all(self.has(parameter) for parameter in needed):
                yield layer

    def has(self, parameter: str) -> bool:
        """Whether the model has this parameter."""
        return parameter in self.skeleton.parameters

    def out_features(self, module: str) -> int:
        """Length of what a linear puts out."""
        return int(self.skeleton.parameters[f"{module}.weight"].shape[1 if self._is_transposed(module) else 0])

    def in_features(self, module: str) -> int:
        """Length of what a linear takes in."""
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
            NotOnDisk: There is none.
        """
        tensor = self.skeleton.names.tensor(parameter)
        if tensor is None:
            raise NotOnDisk(parameter)
        self.skeleton.require_shape(tensor, tuple(self.skeleton.parameters[parameter].shape), parameter)
        return tensor

    def side(self, parameter: str, axis: int, indices: Indices, power: Power) -> Side:
        """Some positions of a parameter.

        Raises:
            NotOnDisk, SpecDefError: As :meth:`tensor`.
        """
        return Side(self.tensor(parameter), axis, indices, power)

    def rows(self, module: str, indices: Indices, power: Power) -> list[Side]:
        """What a linear (or a norm) puts out on some channels: rows of the weight, entries of the bias."""
        sides = [self.side(f"{module}.weight", 1 if self._is_transposed(module) else 0, indices, power)]
        if self.has(f"{module}.bias"):
            sides.append(self.side(f"{module}.bias", 0, indices, power))
        return sides

    def columns(self, module: str, indices: Indices, power: Power) -> list[Side]:
        """How a linear reads some channels: columns of the weight."""
        return [self.side(f"{module}.weight", 0 if self._is_transposed(module) else 1, indices, power)]

    def _is_transposed(self, module: str) -> bool:
        return isinstance(self.skeleton.modules[module], Conv1D)
