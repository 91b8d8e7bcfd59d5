"""Tensor names on disk against parameter names in the model.

The two differ more often than one would think: a ViT checkpoint stores ``encoder.layer.0.attention.attention.query``
for the parameter ``layers.0.attention.q_proj``, a Mixtral checkpoint stores one tensor an expert where the model has
one stacked parameter, a checkpoint of the bare model lacks the prefix that the model with a head has. Transformers
resolves all of it while loading; asking its own conversion mapping, on a model without storage, is the way to agree.
diffusers has no such mapping: there, and in any other module, the names on disk are those of the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from specdef_cli.checkpoint.library import DIFFUSERS, TRANSFORMERS, Library, diffusers_missing
from specdef_cli.errors import SpecDefError

DIFFUSION_MODELS = ("UNet2DConditionModel",)
"""The classes of diffusers that can be hardened."""


def meta_model(config: PreTrainedConfig | Mapping[str, Any], *, trust_remote_code: bool = False) -> nn.Module:
    """The model of ``config.architectures[0]`` (``AutoModel``'s choice where that is unset), without storage.

    Args:
        config: A native config; of a hardened directory, the base model's. Of a diffusers model, its ``config.json``.
        trust_remote_code: Whether code that the checkpoint brings along may be run.

    Returns:
        The model on the meta device: modules, names and shapes, no data.

    Raises:
        SpecDefError: Transformers knows no such class, it needs code that is not trusted, or it refuses the config.
    """
    if isinstance(config, Mapping):
        return _diffusion_model(config)
    # A copy, because building a model writes into its config; eager, because a config may name an attention kernel that
    # is not installed here and that has no bearing on names.
    config = copy.deepcopy(config)
    architecture = (config.architectures or [None])[0]
    with _building(architecture or config.model_type, TRANSFORMERS):
        if architecture is None:
            return transformers.AutoModel.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
        model_class = _model_class(config, architecture, trust_remote_code)
        return model_class._from_config(config, attn_implementation="eager")


def _diffusion_model(config: Mapping[str, Any]) -> nn.Module:
    name = config["_class_name"]
    if name not in DIFFUSION_MODELS:
        raise SpecDefError(
            f"{name!r} is not among the models of diffusers that can be hardened",
            f"Give a directory with a {', '.join(DIFFUSION_MODELS)}, such as the unet/ of a Stable Diffusion pipeline.",
        )
    try:
        import diffusers
    except ImportError as error:
        raise diffusers_missing(name) from error
    with _building(name, DIFFUSERS):
        return getattr(diffusers, name).from_config(dict(config))


@contextmanager
def _building(name: str, library: Library) -> Iterator[None]:
    """Build a model without storage; whatever a config that does not fit makes its constructor raise is advice."""
    try:
        with torch.device("meta"):
            yield
    except SpecDefError:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecDefError(
            f"{name} cannot be built from this config.json: {first_line}",
            f"Check that config.json belongs to this checkpoint and that {library.name} supports the model.",
        ) from error


def _model_class(config: PreTrainedConfig, architecture: str, trust_remote_code: bool) -> Any:
    custom = {
        reference.rsplit(".", 1)[-1]: reference
        for reference in (getattr(config, "auto_map", None) or {}).values()
        if isinstance(reference, str)
    }
    if architecture in custom and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(custom[architecture], config._name_or_path)
    model_class = getattr(transformers, architecture, None)
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    if architecture in custom:
        raise SpecDefError(
            f"architecture {architecture!r} is defined by code in the checkpoint",
            "Read that code, then pass --trust-remote-code.",
        )
    raise SpecDefError(
        f"transformers {transformers.__version__} has no architecture {architecture!r}",
        "Install the transformers release that the checkpoint's config.json names, or correct `architectures` there.",
    )


@dataclass(frozen=True)
class TensorNames:
    """Which tensor on disk becomes which parameter (or buffer) of the model.

    Attributes:
        parameters: Tensor name on disk → parameter name in the model, for every tensor that the model loads. A tensor
            that is split over several parameters is listed under the first of them.
        sources: Parameter name → the tensors on disk that it is made of, in the order in which they are merged.
        converted: Parameters that are not a tensor on disk as it stands, but one stacked, split or transposed.
        unused: Tensors on disk that the model does not load.
    """

    parameters: Mapping[str, str]
    sources: Mapping[str, tuple[str, ...]]
    converted: frozenset[str]
    unused: tuple[str, ...]

    def tensor(self, parameter: str) -> str | None:
        """The one tensor on disk that is ``parameter`` as it stands; ``None`` if there is none."""
        sources = self.sources.get(parameter, ())
        return sources[0] if len(sources) == 1 and parameter not in self.converted else None


def match_names(model: nn.Module, tensors: Iterable[str], *, added: Iterable[str] = ()) -> TensorNames:
    """Match tensor names on disk with the parameters of ``model``, by the rules its library loads them with.

    Args:
        model: The model, usually on the meta device.
        tensors: Names on disk.
        added: Parameter names to count as the model's, beyond those it has (layers that a hardened model will grow).
    """
    native = isinstance(model, PreTrainedModel)
    transforms = get_model_conversion_mapping(model) if native else []
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known: dict[str, Any] = {**model.state_dict(), **dict.fromkeys(added, True)}
    prefix = model.base_model_prefix if native else ""

    parameters: dict[str, str] = {}
    sources: dict[str, list[str]] = {}
    converted: set[str] = set()
    unused: list[str] = []
    # The order matters twice: merges keep it, and some renamings are armed by an earlier name.
    for name in sorted(tensors, key=dot_natural_key):
        parameter, converter = rename_source_key(name, renamings, converters, prefix, known)
        if parameter not in known and name in known:
            parameter, converter = rename_source_key(name, [], [], prefix, known)
        if parameter not in known:
            unused.append(name)
            continue
        parameters[name] = parameter
        sources.setdefault(parameter, []).append(name)
        if converter is not None:
            converted.add(parameter)
    return TensorNames(
        parameters=parameters,
        sources={parameter: tuple(names) for parameter, names in sources.items()},
        converted=frozenset(converted),
        unused=tuple(unused),
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
