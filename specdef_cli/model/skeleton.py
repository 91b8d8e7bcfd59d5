"""The model of a checkpoint without its weights: its modules, and which tensor on disk becomes which parameter.

The two names differ often: a ViT checkpoint stores ``encoder.layer.0.attention.attention.query`` for the parameter
``layers.0.attention.q_proj``, and a Mixtral checkpoint one tensor an expert where the model has one stacked parameter.
transformers resolves this while it loads; its own conversion mapping is asked here, on a model without storage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.errors import SpecDefError
from specdef_cli.model.inputs import Trial, try_out
from specdef_cli.model.loading import empty_model, meta_model


@dataclass(frozen=True)
class TensorNames:
    """Which tensor on disk becomes which parameter (or buffer) of the model.

    Attributes:
        parameters: Tensor name on disk → parameter name in the model, for every tensor that the model loads. A tensor
            that is split over several parameters is listed under the first of them.
        sources: Parameter name → the tensors on disk that it is made of, in the order in which they are merged.
        stacked: Parameters with one tensor an expert on disk → those tensors, by the pattern of their names.
    """

    parameters: Mapping[str, str]
    sources: Mapping[str, tuple[str, ...]]
    converted: frozenset[str]
    stacked: Mapping[str, Mapping[str, tuple[str, ...]]]

    def tensor(self, parameter: str) -> str | None:
        """The one tensor on disk that is ``parameter`` as it stands; ``None`` if there is none."""
        sources = self.sources.get(parameter, ())
        return sources[0] if len(sources) == 1 and parameter not in self.converted else None


def match_names(model: nn.Module, tensors: Iterable[str], *, added: Iterable[str] = ()) -> TensorNames:
    """Match tensor names on disk with the parameters of ``model``, by the rules its library loads them with."""
    native = isinstance(model, PreTrainedModel)
    transforms = get_model_conversion_mapping(model) if native else []
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known: dict[str, Any] = {**model.state_dict(), **dict.fromkeys(added, True)}
    prefix = model.base_model_prefix if native else ""

    parameters: dict[str, str] = {}
    sources: dict[str, list[str]] = {}
    converted: set[str] = set()
    # By the converter's every pattern: the tensors of one may all be missing.
    patterns = {
        pattern: converter.source_patterns
        for converter in converters
        if any(isinstance(operation, MergeModulelist) for operation in converter.operations)
        for pattern in converter.source_patterns
    }
    stacked: dict[str, dict[str, tuple[str, ...]]] = {}
    # Sorted: merging keeps this order, and some of transformers' renamings depend on an earlier name having been seen.
    for name in sorted(tensors, key=dot_natural_key):
        parameter, converter = rename_source_key(name, renamings, converters, prefix, known)
        if parameter not in known and name in known:
            parameter, converter = rename_source_key(name, [], [], prefix, known)
        if parameter not in known:
            continue
        parameters[name] = parameter
        sources.setdefault(parameter, []).append(name)
        if converter is not None:
            converted.add(parameter)
        if converter in patterns:
            stacked.setdefault(parameter, dict.fromkeys(patterns[converter], ()))[converter] += (name,)
    return TensorNames(
        parameters=parameters,
        sources={parameter: tuple(names) for parameter, names in sources.items()},
        converted=frozenset(converted),
        stacked=stacked,
    )


def tied_parameters(model: nn.Module) -> frozenset[str]:
    """Names of all parameters that share their storage with another one, or will once the model is loaded."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    keys = model.get_expanded_tied_weights_keys(all_submodels=True) if isinstance(model, PreTrainedModel) else {}
    return frozenset(shared | set(keys) | set(keys.values()))


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of all elements of the model's ``ModuleList``s: the blocks that a deep model repeats."""
    return tuple(
        f"{path}.{child}" if path else child
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, _ in module.named_children()
    )


def is_causal_lm(config: Mapping[str, Any]) -> bool:
    """Whether the architecture that a ``config.json`` names predicts the next token of text, and reads text alone."""
    architecture = (config.get("architectures") or [""])[0]
    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a model of transformers; ``None`` where it has none, and for models of other libraries."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


_IN_A_BLOCK = re.compile(r"(.*?)\.(\d+)\.(.+)")

WRONG_CONFIG = "Use the config.json that belongs to this checkpoint (of a quantized one, the unquantized checkpoint)."

INCOMPLETE = "Fetch the checkpoint again, or use the config.json that belongs to it."

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Skeleton:
    """A model's modules on the meta device, and the tensors on disk that become its parameters.

    Attributes:
        config: The model's native config; of a model of diffusers, its ``config.json``.
        model: The model; its class is the one that ``architectures`` names.
        shapes: Tensor name on disk → shape.
    """

    config: Any
    model: nn.Module
    shapes: Mapping[str, Shape]
    names: TensorNames
    tied: frozenset[str]

    @classmethod
    def read(cls, checkpoint: Checkpoint, **loading: bool) -> Skeleton:
        """The model that a checkpoint's ``config.json`` describes; ``loading`` is whether its code may run."""
        config, model = empty_model(checkpoint, **loading)
        return cls.of(config, {name: header.shape for name, header in checkpoint.tensors.items()}, model)

    @classmethod
    def of(cls, config: Any, shapes: Mapping[str, Shape], model: nn.Module | None = None) -> Skeleton:
        """Build a skeleton from a native config and the shapes of the tensors on disk."""
        model = model if model is not None else meta_model(config)
        return cls(config, model, shapes, match_names(model, shapes), tied_parameters(model))

    @classmethod
    def around(cls, model: Any) -> Skeleton:
        """The skeleton of a model in memory, whose parameters take the place of the tensors on disk. Where layers were
        replaced, its modules are the original architecture's, and the parameters of those layers are missing.
        """
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
        with torch.device("meta"):
            native = type(model)(model.config)
        return cls.of(model.config, shapes, native)

    @cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter by name; tied ones under each of their names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        return dict(self.model.named_modules())

    @cached_property
    def trial(self) -> Trial:
        """A run on made-up inputs, without numbers."""
        return try_out(self.model)

    @property
    def is_native(self) -> bool:
        """Whether the model's class is transformers' or diffusers' own, not code that comes with the checkpoint."""
        return type(self.model).__module__.split(".")[0] in ("transformers", "diffusers")

    def require_shape(self, tensor: str, expected: Shape, place: str) -> None:
        shape = tuple(self.shapes[tensor])
        if shape != expected:
            raise SpecDefError(
                f"tensor {tensor} has shape {list(shape)}, but by config.json {place} needs {list(expected)}",
                WRONG_CONFIG,
            )

    @cached_property
    def strangers(self) -> tuple[str, ...]:
        """Tensors on disk that the model has no place for, and that transformers would warn of."""
        known = self.names.parameters.keys() | self.model.state_dict().keys()
        expected = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return tuple(
            name
            for name in self.shapes
            if name not in known and not any(re.search(pattern, name) for pattern in expected)
        )

    def _require_all_blocks(self) -> None:
        """Refuse a block beyond the model's last that is like those before: config.json counts too few."""
        parts = [match.groups() for match in map(_IN_A_BLOCK.fullmatch, self.names.parameters) if match]
        alike, counted = {(stack, rest) for stack, _, rest in parts}, {(stack, number) for stack, number, _ in parts}
        beyond: dict[tuple[str, str], set[str]] = {}
        for match in filter(None, map(_IN_A_BLOCK.fullmatch, self.strangers)):
            beyond.setdefault((match[1], match[2]), set()).add(match[3])
        for (stack, number), rests in beyond.items():
            # What predicts further tokens beside the model (DeepSeek's layer 61) has more than a block has.
            if (stack, number) not in counted and all((stack, rest) in alike for rest in rests):
                raise SpecDefError(
                    f"the checkpoint has {stack}.{number}, and by config.json the model has fewer such layers",
                    "Use the config.json that belongs to this checkpoint, or save the model that it describes: "
                    "from_pretrained(...).save_pretrained(...).",
                )

    def require_complete(self) -> None:
        """Refuse a checkpoint that lacks a parameter: transformers would fill it with random values, and only warn.

        What transformers makes anew without a warning (Marian's sinusoidal positions) may be missing. A layer that
        config.json does not count is refused too: it would be published as it is.
        """
        self._require_all_blocks()
        made_anew = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        for parameter, expected in self.parameters.items():
            for pattern, parts in self.names.stacked.get(parameter, {}).items():
                if len(parts) != expected.shape[0]:
                    raise SpecDefError(
                        f"by config.json {parameter} is stacked from {expected.shape[0]} tensors {pattern}, and the "
                        f"checkpoint has {len(parts)}",
                        INCOMPLETE,
                    )
            if parameter in self.names.sources:
                tensor = self.names.tensor(parameter)
                if tensor is not None:
                    self.require_shape(tensor, tuple(expected.shape), "the model")
            elif parameter not in self.tied and not any(re.search(pattern, parameter) for pattern in made_anew):
                raise SpecDefError(
                    f"by config.json the model has {parameter}, but no tensor of the checkpoint becomes it", INCOMPLETE
                )
