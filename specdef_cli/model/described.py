"""How a hardened directory describes itself: its config.json and names, and a manifest that has to fit its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers.quantizers.auto  # noqa: F401 (before configuration_specdef: a cycle, see specdef_cli.model)

from specdef_cli.checkpoint.changes import ScaledChannels, ScaledSlice
from specdef_cli.checkpoint.files import FLOATING_DTYPES, library_of
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, Manifest
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.errors import SpecDefError
from specdef_cli.model.configuration_specdef import AUTO_MAP, BASE_MODEL_TYPE_KEY, MODEL_TYPE
from specdef_cli.model.skeleton import Skeleton
from specdef_cli.model.symmetries import symmetries

RESTORE = f"Restore {MANIFEST_NAME} and the shards as `specdef harden` wrote them."
MAX_EXPONENT = 1000
"""No power of two beyond is a number of any dtype here."""
CERTAIN_OCTAVES = 8
"""Half of that is further than the channels of a trained model stand out by themselves, outside of norms' readers."""


def require_code_allows(skeleton: Skeleton, *, verify: bool, adds_code: bool) -> None:
    """Refuse to harden a class of the checkpoint's own code in ways that would lose or trust that code unseen."""
    if skeleton.is_native:
        return
    name = f"{type(skeleton.model).__name__} is a class of the checkpoint's own code"
    if not symmetries(skeleton).pairs:
        raise SpecDefError(
            f"{name}, and no part of it is one whose symmetric pairs are known",
            "Nothing here hardens it. If transformers has the architecture, use a checkpoint in that format.",
        )
    if adds_code:
        raise SpecDefError(f"{name}, which a model that brings code of specdef cannot load", "Use --method fold.")
    if not verify:
        raise SpecDefError(f"{name}, so that only a run shows whether a fold keeps it", "Leave --no-verify out.")


def require_its_own(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Refuse a manifest that belongs to other weights: undoing what was never done destroys a model without a sign.

    Replaced modules have tensors of their own, which :func:`require_as_described` looks for. A fold has none: the
    channel that it multiplied most must stand out, in the smallest tensor that shows that.
    """
    require_as_described(checkpoint, manifest)
    telling = [
        (part, exponent, index)
        for part in manifest.folded_slices
        for exponent, index in [max(zip(part.exponents, part.indices, strict=True), default=(0, 0))]
        if exponent >= CERTAIN_OCTAVES and len(checkpoint.tensors[part.tensor].shape) > 1
    ]
    largest = max((exponent for _, exponent, _ in telling), default=0)
    telling = [entry for entry in telling if 2 * entry[1] >= largest]
    if not telling:
        return
    part, exponent, index = min(telling, key=lambda entry: checkpoint.tensors[entry[0].tensor].nbytes)
    tensor = checkpoint.read(part.tensor)
    weight, axis = (tensor, part.axis) if part.block is None else (tensor[part.block], part.axis - 1)
    sizes = weight.movedim(axis, 0).flatten(1).float().abs().median(1).values  # [channels]
    usual = float(sizes.median())
    if usual > 0 and float(sizes[index]) < usual * 2.0 ** (exponent / 2):
        raise SpecDefError(
            f"{MANIFEST_NAME} says that channel {index} of {part.tensor} is multiplied by 2^{exponent}, and it is not",
            f"Give the {MANIFEST_NAME} that belongs to these weights. If a fold was undone, nothing is left to do.",
        )


def as_original(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as its original architecture describes it: native config, tombstones with the weights' shapes.

    The names on disk say which modules were replaced, with a manifest or without one. The weights of GPT-2's layers
    stay as their factors are stored; :func:`transposed_back` knows the model.
    """
    tensors = dict(checkpoint.tensors)
    for stem in replaced_stems(tensors):
        inflated = tensors.get(f"{stem}.inflated.weight")
        bias = tensors.get(f"{stem}.inflated.bias", tensors.get(f"{stem}.compensation.bias"))
        if inflated is None:  # a head that shares the embedding's weight
            tensors.pop(f"{stem}.weight", None)
            continue
        tensors[f"{stem}.weight"] = replace(inflated, name=f"{stem}.weight")
        if bias is not None:
            tensors[f"{stem}.bias"] = bias
    return replace(checkpoint, config=unshim_config(checkpoint.config), tensors=tensors)


def transposed_back(skeleton: Skeleton) -> Skeleton:
    """The skeleton of :func:`as_original`, where factors of GPT-2's layers have the shape of the weight again."""
    shapes = dict(skeleton.shapes)
    if not any(name.endswith(".compensation.weight") for name in shapes):
        return skeleton
    for tensor, parameter in skeleton.names.parameters.items():
        own = tuple(skeleton.parameters[parameter].shape) if parameter in skeleton.parameters else ()
        if f"{tensor.removesuffix('.weight')}.compensation.weight" in shapes and shapes[tensor] == own[::-1]:
            shapes[tensor] = own
    return replace(skeleton, shapes=shapes)


def require_as_described(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Check that every tensor that the manifest names is there, in the shape that it says."""
    for module in manifest.scaled:
        for side in module.scales.values():
            periodic = side.period is None or side.period >= 1
            if not (_lies_in(module.shape, side) and _is_a_scale(side) and periodic):
                raise SpecDefError(f"{MANIFEST_NAME} scales {module.tensor} by 2**{list(side.exponents)}", RESTORE)
        if module.output is None:
            raise SpecDefError(f"{MANIFEST_NAME} scales no output of {module.module}", RESTORE)
    wanted = {name: shape for layer in manifest.replaced for name, shape in layer.stored.items()}
    slices = manifest.folded_slices
    for name in (*wanted, *(part.tensor for part in slices)):
        header = checkpoint.tensors.get(name)
        if header is None:
            raise SpecDefError(f"{name} is missing from {checkpoint.directory}", RESTORE)
        shape = wanted.get(name, header.shape)
        if header.shape != shape or header.dtype not in FLOATING_DTYPES:
            raise SpecDefError(
                f"{name} is {header.dtype} {list(header.shape)}, but {MANIFEST_NAME} says floating {list(shape)}",
                RESTORE,
            )
    for part in slices:
        shape = checkpoint.tensors[part.tensor].shape
        if not _lies_in(shape, part) or not (part.block is None or 0 <= part.block < shape[0]):
            raise SpecDefError(f"{part.tensor} is {list(shape)}, smaller than {MANIFEST_NAME} says", RESTORE)
        if not _is_a_scale(part):
            raise SpecDefError(f"{MANIFEST_NAME} scales {part.tensor} by 2**{list(part.exponents)}", RESTORE)


def _lies_in(shape: tuple[int, ...], part: ScaledSlice | ScaledChannels) -> bool:
    return 0 <= part.axis < len(shape) and all(0 <= index < shape[part.axis] for index in part.indices)


def _is_a_scale(part: ScaledSlice | ScaledChannels) -> bool:
    return len(part.exponents) == len(part.indices) and all(abs(power) <= MAX_EXPONENT for power in part.exponents)


def replaced_stems(names: Iterable[str]) -> list[str]:
    """Prefixes of the names on disk of replaced layers and scaled modules, in order."""
    ends = (".inflated.weight", ".input_scale.weight", ".output_scale.weight")
    return list(dict.fromkeys(name.removesuffix(end) for name in names for end in ends if name.endswith(end)))


SHIM_SOURCE = Path(__file__).with_name("configuration_specdef.py")
"""The file to copy, verbatim and under the same name, into every directory of transformers that brings code."""

BASE_AUTO_MAP_KEY = "specdef_base_auto_map"


def shim_config(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The ``config.json`` of a directory of *scale* or *factors*.

    Args:
        config: The base model's ``config.json``, of a model that is neither hardened nor quantized. It is not changed.
        layers: The replaced linears and scaled modules by module path in the class that ``architectures`` names,
            e.g. ``model.layers.0.self_attn.o_proj``.
    """
    library, native = library_of(config), config.get("model_type")
    listed = {module: dict(spec) for module, spec in layers.items()}
    shimmed = {**config, "quantization_config": {"quant_method": MODEL_TYPE, "layers": listed}}
    if not library.is_transformers:
        return shimmed
    if "auto_map" in config:
        # The base's own code would be looked up in a directory that does not hold it; transformers' classes serve.
        shimmed[BASE_AUTO_MAP_KEY] = config["auto_map"]
    return shimmed | {"model_type": MODEL_TYPE, BASE_MODEL_TYPE_KEY: native, "auto_map": dict(AUTO_MAP)}


def is_shim(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of *scale* or *factors*; in diffusers' there is no model type."""
    listed = config.get("quantization_config")
    method = listed.get("quant_method") if isinstance(listed, Mapping) else None
    return MODEL_TYPE in (config.get("model_type"), method)


def unshim_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's ``config.json``, the inverse of :func:`shim_config`; of a config that is no shim, a copy."""
    if not is_shim(config):
        return dict(config)
    ours = ("quantization_config", "auto_map", BASE_MODEL_TYPE_KEY, BASE_AUTO_MAP_KEY)
    plain = {key: value for key, value in config.items() if key not in ours}
    if BASE_AUTO_MAP_KEY in config:
        plain["auto_map"] = config[BASE_AUTO_MAP_KEY]
    if not library_of(config).is_transformers:
        return plain
    native = config.get(BASE_MODEL_TYPE_KEY)
    if not isinstance(native, str) or not native:
        raise SpecDefError(
            f"a hardened model's config.json has no usable {BASE_MODEL_TYPE_KEY}",
            "Restore its files, or harden the base model again.",
        )
    return plain | {"model_type": native}
