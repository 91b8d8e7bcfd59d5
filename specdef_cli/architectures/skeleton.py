"""The model of a checkpoint without its weights, built once: everything about names and shapes is asked of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from specdef_cli.architectures.meta_model import meta_model, native_config
from specdef_cli.architectures.names import TensorNames, match_names, tied_parameters
from specdef_cli.architectures.trial import Trial, try_out
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.errors import SpecDefError

WRONG_CONFIG = "Use the config.json that belongs to this checkpoint (of a quantized one, the unquantized checkpoint)."

DEEPEST = 1000
"""Layers that a model may share out among fewer tensors."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Skeleton:
    """A model's modules on the meta device, and the tensors on disk that become its parameters.

    Attributes:
        config: The model's native config; of a model of diffusers, its ``config.json``.
        model: The model; its class is the one that ``architectures`` names.
        shapes: Tensor name on disk → shape.
        names: Which tensor becomes which parameter.
        tied: Parameters that share their storage with another one.
    """

    config: Any
    model: nn.Module
    shapes: Mapping[str, Shape]
    names: TensorNames
    tied: frozenset[str]

    @classmethod
    def read(cls, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Skeleton:
        """The model that a checkpoint's ``config.json`` describes."""
        config = native_config(checkpoint, trust_remote_code=trust_remote_code)
        shapes = {name: header.shape for name, header in checkpoint.tensors.items()}
        _require_plausible_depth(config, len(shapes))
        return cls.of(config, shapes, trust_remote_code=trust_remote_code)

    @classmethod
    def of(cls, config: Any, shapes: Mapping[str, Shape], *, trust_remote_code: bool = False) -> Skeleton:
        """The same from a native config and the shapes of the tensors on disk."""
        model = meta_model(config, trust_remote_code=trust_remote_code)
        return cls(config, model, shapes, match_names(model, shapes), tied_parameters(model))

    @classmethod
    def around(cls, model: Any) -> Skeleton:
        """The skeleton of a model in memory, whose parameters take the place of the tensors on disk. Where layers were
        replaced, its modules are the original architecture's, and the parameters of those layers are missing.
        """
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
        with torch.device("meta"):
            native = type(model)(model.config)
        return cls(model.config, native, shapes, match_names(native, shapes), tied_parameters(native))

    def with_shapes(self, shapes: Mapping[str, Shape]) -> Skeleton:
        """The same model beside other tensors on disk."""
        if dict(shapes) == dict(self.shapes):
            return self
        return replace(self, shapes=shapes, names=match_names(self.model, shapes))

    @cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter by name; tied ones under each of their names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every module by its path."""
        return dict(self.model.named_modules())

    @cached_property
    def trial(self) -> Trial:
        """What a run on made-up inputs shows, without numbers."""
        return try_out(self.model)

    @property
    def is_native(self) -> bool:
        """Whether the model's class is transformers' or diffusers' own, not code that comes with the checkpoint."""
        return type(self.model).__module__.split(".")[0] in ("transformers", "diffusers")

    def require_shape(self, tensor: str, expected: Shape, place: str) -> None:
        """Check the shape of one tensor on disk."""
        shape = tuple(self.shapes[tensor])
        if shape != expected:
            raise SpecDefError(
                f"tensor {tensor} has shape {list(shape)}, but by config.json {place} needs {list(expected)}",
                WRONG_CONFIG,
            )

    def require_complete(self) -> None:
        """Refuse a checkpoint that lacks a parameter: transformers would fill it with random values, and only warn.

        What transformers makes anew without a warning (Marian's sinusoidal positions) may be missing.
        """
        made_anew = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        for parameter, expected in self.parameters.items():
            tensor = self.names.tensor(parameter)
            for pattern, parts in self.names.stacked.get(parameter, {}).items():
                if len(parts) != expected.shape[0]:
                    raise SpecDefError(
                        f"by config.json {parameter} is stacked from {expected.shape[0]} tensors {pattern}, and the "
                        f"checkpoint has {len(parts)}",
                        "Fetch the checkpoint again, or use the config.json that belongs to it.",
                    )
            if parameter not in self.names.sources:
                if parameter in self.tied or any(re.search(pattern, parameter) for pattern in made_anew):
                    continue
                raise SpecDefError(
                    f"by config.json the model has {parameter}, but no tensor of the checkpoint becomes it",
                    "Fetch the checkpoint again, or use the config.json that belongs to it.",
                )
            if tensor is not None and tuple(self.shapes[tensor]) != tuple(expected.shape):
                raise SpecDefError(
                    f"tensor {tensor} has shape {list(self.shapes[tensor])}, but config.json asks for "
                    f"{list(expected.shape)}",
                    WRONG_CONFIG,
                )


def _require_plausible_depth(config: Any, tensors: int) -> None:
    """Refuse more layers than there are tensors, which take minutes to build and memory without end."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(tensors, DEEPEST):
        raise SpecDefError(
            f"config.json says num_hidden_layers {layers}, and the checkpoint has {tensors} tensors",
            "Use the config.json that belongs to this checkpoint.",
        )
