"""Tensor names on disk against parameter names in the model.

The two differ more often than one would think: a ViT checkpoint stores ``encoder.layer.0.attention.attention.query``
for the parameter ``layers.0.attention.q_proj``, a Mixtral checkpoint stores one tensor an expert where the model has
one stacked parameter, a checkpoint of the bare model lacks the prefix that the model with a head has. Transformers
resolves all of it while loading; asking its own conversion mapping, on a model without storage, is the way to agree.
diffusers has no such mapping: there, and in any other module, the names on disk are those of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class TensorNames:
    """Which tensor on disk becomes which parameter (or buffer) of the model.

    Attributes:
        parameters: Tensor name on disk → parameter name in the model, for every tensor that the model loads. A tensor
            that is split over several parameters is listed under the first of them.
        sources: Parameter name → the tensors on disk that it is made of, in the order in which they are merged.
        converted: Parameters that are not a tensor on disk as it stands, but one stacked, split or transposed.
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
    # By the converter's every pattern: of one whose tensors are all missing there is an empty list.
    patterns = {
        pattern: converter.source_patterns
        for converter in converters
        if any(isinstance(operation, MergeModulelist) for operation in converter.operations)
        for pattern in converter.source_patterns
    }
    stacked: dict[str, dict[str, list[str]]] = {}
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
            stacked.setdefault(parameter, {one: [] for one in patterns[converter]})[converter].append(name)
    return TensorNames(
        parameters=parameters,
        sources={parameter: tuple(names) for parameter, names in sources.items()},
        converted=frozenset(converted),
        stacked={
            parameter: {pattern: tuple(names) for pattern, names in parts.items()}
            for parameter, parts in stacked.items()
        },
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
