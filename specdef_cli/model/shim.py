"""What the ``config.json`` of a directory that brings code says beyond the base model's.

A hardened directory must load with the runtime and fail everywhere else. transformers only warns about missing tensors
and re-initialises them, so the failure has to happen before any weight is read: the config names a ``model_type`` that
transformers does not know, and points to the one file that does. This module writes those keys and takes them away
again; reading them is ``configuration_specdef.py``'s part, which restates the names because it is copied into every
hardened directory and may import nothing of this package.

diffusers has no model types, and it raises for a ``quantization_config`` that it does not know: that key is enough
there, and ``diffusion.py`` reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdef_cli.checkpoint.files import library_of
from specdef_cli.errors import SpecDefError

SHIM_SOURCE = Path(__file__).with_name("configuration_specdef.py")
"""The file to copy, verbatim and under the same name, into every directory of transformers that brings code."""

MODEL_TYPE = "specdef"
BASE_MODEL_TYPE_KEY = "specdef_base_model_type"
BASE_AUTO_MAP_KEY = "specdef_base_auto_map"
AUTO_MAP = {"AutoConfig": "configuration_specdef.SpecDefConfig"}


@dataclass(frozen=True)
class LayerSpec:
    """The shape of one replaced linear, y = Wx + b with W ∈ R^{m×n}.

    Attributes:
        in_features, out_features: n and m.
        bias: Whether there is a b; it then lives in the compensation layer.
    """

    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class ScaledSpec:
    """The shape of one module that undoes a scale of its weight.

    Attributes:
        kind: ``linear``, ``embedding``, ``head`` or ``norm``.
        weight: The weight's shape.
        bias: Length of the bias.
        input_scale, output_scale: Lengths of the scale vectors.
        tied_to: Module whose weight a head shares.
    """

    kind: str
    weight: tuple[int, ...]
    bias: int | None = None
    input_scale: int | None = None
    output_scale: int | None = None
    tied_to: str | None = None


def shim_config(config: Mapping[str, Any], layers: Mapping[str, LayerSpec | ScaledSpec]) -> dict[str, Any]:
    """The ``config.json`` of a directory of *scale* or *factors*.

    Args:
        config: The base model's ``config.json``. It is not changed.
        layers: The replaced linears and scaled modules by module path in the class that ``architectures`` names,
            e.g. ``model.layers.0.self_attn.o_proj``.
    """
    library, native = library_of(config), config.get("model_type")
    if library.has_model_types and not native:
        raise SpecDefError(
            "config.json names no model_type, so transformers cannot tell which model it describes",
            "Add the model_type of the architecture to config.json.",
        )
    if is_shim(config):
        raise SpecDefError(
            "config.json names 'specdef': these layers were replaced already",
            "Harden the base model, or run `specdef collapse` first.",
        )
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unnamed")
        raise SpecDefError(
            f"config.json has a quantization_config ({method}); the factors of a quantized weight cannot be stored",
            "Harden the unquantized checkpoint.",
        )
    shimmed = copy.deepcopy(dict(config))
    shimmed["quantization_config"] = {
        "quant_method": MODEL_TYPE,
        "layers": {module: _plain(spec) for module, spec in layers.items()},
    }
    if not library.has_model_types:
        return shimmed
    if "auto_map" in shimmed:
        # The base's own code would be looked up in a directory that does not hold it; transformers' classes serve.
        shimmed[BASE_AUTO_MAP_KEY] = shimmed["auto_map"]
    return shimmed | {"model_type": MODEL_TYPE, BASE_MODEL_TYPE_KEY: native, "auto_map": dict(AUTO_MAP)}


def is_shim(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of *scale* or *factors*."""
    if not library_of(config).has_model_types:
        listed = config.get("quantization_config")
        return isinstance(listed, Mapping) and listed.get("quant_method") == MODEL_TYPE
    return config.get("model_type") == MODEL_TYPE


def unshim_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's ``config.json``: the inverse of :func:`shim_config`.

    A config that is not a shim comes back as an equal copy.
    """
    plain = copy.deepcopy(dict(config))
    if not is_shim(config):
        return plain
    plain.pop("quantization_config", None)
    if not library_of(config).has_model_types:
        return plain
    native = plain.pop(BASE_MODEL_TYPE_KEY, None)
    if not isinstance(native, str) or not native:
        raise _incomplete(BASE_MODEL_TYPE_KEY)
    plain["model_type"] = native
    plain.pop("auto_map", None)
    if BASE_AUTO_MAP_KEY in plain:
        plain["auto_map"] = plain.pop(BASE_AUTO_MAP_KEY)
    return plain


def shim_layers(config: Mapping[str, Any]) -> dict[str, LayerSpec | ScaledSpec]:
    """The replaced linears and scaled modules that a shim names; empty for any other config."""
    if not is_shim(config):
        return {}
    try:
        listed = config["quantization_config"]["layers"]
        layers = {
            module: ScaledSpec(**{**spec, "weight": tuple(spec["weight"])}) if "kind" in spec else LayerSpec(**spec)
            for module, spec in listed.items()
        }
    except (AttributeError, KeyError, TypeError) as error:  # another value than JSON of that form
        raise _incomplete("quantization_config.layers") from error
    if not layers:
        raise _incomplete("quantization_config.layers")
    return layers


def _incomplete(key: str) -> SpecDefError:
    return SpecDefError(
        f"a hardened model's config.json has no usable {key}", "Restore its files, or harden the base model again."
    )


def _plain(spec: LayerSpec | ScaledSpec) -> dict[str, Any]:
    """As JSON has it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(spec).items()}
