"""A model on the meta device, from its config alone: modules, names and shapes, no data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from specdef_cli.checkpoint.library import DIFFUSERS, TRANSFORMERS, Library, diffusers_missing
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.runtime.own_code import own_class

DIFFUSION_MODELS = ("UNet2DConditionModel",)
"""The classes of diffusers that can be hardened."""


def native_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """transformers' config object of a checkpoint; diffusers has none, and ``config.json`` itself serves."""
    if not checkpoint.library.has_model_types:
        return checkpoint.config
    if checkpoint.config.get("quantization_config") == {}:
        raise SpecDefError(
            f"{checkpoint.directory}/config.json has an empty quantization_config, which transformers cannot load",
            "Remove that key if the weights are floating-point numbers.",
        )
    try:
        return transformers.AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        # transformers raises anything from ValueError to pydantic-like validation errors here.
        if "trust_remote_code" in str(error):
            raise SpecDefError(
                f"{checkpoint.directory} needs Python code that comes with the model",
                "Read that code, then pass --trust-remote-code.",
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpecDefError(
            f"{checkpoint.directory}/config.json is not accepted by transformers: {reason[:300]}",
            "Check model_type and the values in config.json.",
        ) from error


def meta_model(config: PreTrainedConfig | Mapping[str, Any], *, trust_remote_code: bool = False) -> nn.Module:
    """The model of ``config.architectures[0]`` (``AutoModel``'s choice where that is unset), without storage.

    Args:
        config: A native config; of a hardened directory, the base model's. Of a diffusers model, its ``config.json``.

    Returns:
        The model on the meta device: modules, names and shapes, no data.
    """
    if isinstance(config, Mapping):
        return _diffusion_model(config)
    # A copy, because building a model writes into its config; eager, because a config may name an attention kernel that
    # is not installed here and that has no bearing on names.
    config = copy.deepcopy(config)
    architecture = (config.architectures or [None])[0]
    with _building(architecture or config.model_type, TRANSFORMERS):
        if architecture is None:
            model = transformers.AutoModel.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
        else:
            model_class = _model_class(config, architecture, trust_remote_code)
            model = model_class._from_config(config, attn_implementation="eager")
    for module in model.modules():  # some are made by `torch.Tensor(size)`, which asks for no device
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return model


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
    """Build on the meta device; any exception from the constructor becomes a :class:`SpecDefError`."""
    try:
        with torch.device("meta"):
            yield
    except SpecDefError:
        raise
    except Exception as error:
        raise SpecDefError(
            f"{name} cannot be built from this config.json: {first_line(error)}",
            f"Check that config.json belongs to this checkpoint and that {library.name} supports the model.",
        ) from error


def _model_class(config: PreTrainedConfig, architecture: str, trust_remote_code: bool) -> Any:
    own = own_class(config, architecture, trust_remote_code=trust_remote_code)
    if own is not None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(own[1], config._name_or_path)
    model_class = getattr(transformers, architecture, None)
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    raise SpecDefError(
        f"transformers {transformers.__version__} has no architecture {architecture!r}",
        "Install the transformers release that the checkpoint's config.json names, or correct `architectures` there.",
    )
