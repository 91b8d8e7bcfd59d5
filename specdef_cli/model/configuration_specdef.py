"""What makes a hardened checkpoint load in transformers: ``trust_remote_code=True`` runs this file, nothing else.

A hardened checkpoint replaces some linear layers y = Wx + b by two, y = C(W~x) + b with C·W~ = W ("SpecDef", Rosati et
al., arXiv 2602.18868, Algorithm 1). On disk ``X.weight`` is a *tombstone* of one element, ``X.inflated.weight`` is W~,
``X.compensation.weight`` is C and ``X.compensation.bias`` is b. Or C is elementwise, powers of two on either side of a
module: ``X.inflated`` is that module with a scaled weight, ``X.input_scale.weight`` and ``X.output_scale.weight`` undo
the scale. The file is copied into every such directory, so it imports nothing but the standard library, torch and
transformers.

How it works, and why like this:

* ``config.json`` has ``model_type: specdef``, which transformers does not know. Without this file loading stops there;
  a known ``model_type`` would load the native class and re-initialise what is missing, with a warning only.
* The config made at load time is an instance of a subclass of the *native* config class that bears the native class's
  name. The Auto classes look models up by that name, so the model is of its native class, with all that transformers
  knows of that class: key conversions, generation, parallel plans.
* The linear layers are swapped in an ``HfQuantizer``, the one hook that transformers offers between building a model
  and loading its weights. Nothing is quantized, so all traces of the quantizer are removed once the weights are in.
* Whatever is missing from the files, or listed wrongly, raises before a weight is read.
* What is written to disk (``save_pretrained``, Trainer checkpoints) is the same kind of directory again.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import __version__ as transformers_version
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

MODEL_TYPE = "specdef"
BASE_MODEL_TYPE_KEY = "specdef_base_model_type"
FILE_NAME = "configuration_specdef.py"
AUTO_MAP = {"AutoConfig": "configuration_specdef.SpecDefConfig"}

_SOURCE = Path(
    __file__
).read_bytes()  # kept for save_pretrained: the cache that remote code runs from may be gone by then


class SpecDefLoadError(RuntimeError):
    """The directory is not what its ``config.json`` says, so that loading on would give a wrong model."""


# --- the layer -----------------------------------------------------------------------------------------------------


class SpecDefLinear(nn.Module):
    """y = C(W~x) + b: one linear layer as an inflated layer and its compensation.

    Both factors are plain ``nn.Linear`` children, so that PEFT, optimizers and hooks see two ordinary layers.

    Args:
        in_features: n, the last dimension of the input.
        out_features: m, the last dimension of the output. W~ is m×n and C is m×m.
        bias: Whether there is a b; it belongs to the compensation, because it is added after C.
        device, dtype: Where and as what the parameters are created.

    Attributes:
        inflated: ``nn.Linear(n, m, bias=False)`` with weight W~.
        compensation: ``nn.Linear(m, m, bias=bias)`` with weight C.
        weight: The tombstone, a buffer of shape [1] under the replaced weight's name. No loader that expects the m×n
            weight accepts it. It has the parameters' dtype, which model code reads off ``.weight.dtype`` (T5 does).
    """

    weight: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.inflated = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.compensation = nn.Linear(out_features, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @property
    def in_features(self) -> int:
        """n."""
        return self.inflated.in_features

    @property
    def out_features(self) -> int:
        """m."""
        return self.compensation.out_features

    @property
    def bias(self) -> torch.Tensor | None:
        """b, of shape [m]; it is the compensation's parameter."""
        return self.compensation.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.compensation(self.inflated(input))  # [..., n] → [..., m] → [..., m]


class SpecDefScale(nn.Module):
    """y = s ⊙ x, with a vector s of powers of two, so that nothing is rounded.

    Args:
        features: Length of s.
        device, dtype: Where and as what s is created.
    """

    def __init__(
        self, features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * self.weight  # [..., d]


class SpecDefScaled(nn.Module):
    """A module whose weight is scaled by channel, with the scale undone around it.

    y = r ⊙ f(c ⊙ x) for a linear layer or a head f, whose weight is diag(1/r) W diag(1/c) and whose bias is b/r. What
    an embedding takes in are tokens, and there c is looked up as well: y = c[x] · r ⊙ f(x). The gain of a norm cannot
    be undone behind it where it is applied as 1 + w, so there the gain itself is r ⊙ w, formed at every step.

    What this module does not have, it has from the module inside: its sizes, its ``eps``; no methods and no modules.

    Args:
        inflated: f.
        kind: ``linear``, ``head``, ``embedding`` or ``norm``.
        input_scale, output_scale: The lengths of c and r; ``None`` where there is none.

    Attributes:
        weight: The tombstone, a buffer of shape [1], as in :class:`SpecDefLinear`.
    """

    weight: torch.Tensor

    def __init__(
        self, inflated: nn.Module, kind: str, *, input_scale: int | None = None, output_scale: int | None = None
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": inflated.weight.device, "dtype": inflated.weight.dtype}
        self.register_buffer("weight", torch.zeros(1, **place))  # before there is a module inside that has one
        self.kind = kind
        self.inflated = inflated
        self.input_scale = None if input_scale is None else SpecDefScale(input_scale, **place)
        self.output_scale = None if output_scale is None else SpecDefScale(output_scale, **place)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inflated":
                raise
            found = getattr(self.inflated, name)
            # An adapter's ways to merge and its base layer are the inside's alone: PEFT would put that in this one's
            # place, and the scales would be gone without a message.
            if callable(found):
                raise
            return found

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.kind == "norm" and self.output_scale is not None:
            effective = {name: self.output_scale(parameter) for name, parameter in self.inflated.named_parameters()}
            return torch.func.functional_call(self.inflated, effective, (input, *args), kwargs)
        if self.kind != "embedding" and self.input_scale is not None:
            output = self.inflated(self.input_scale(input), *args, **kwargs)
        else:
            output = self.inflated(input, *args, **kwargs)
        if self.output_scale is not None:
            output = self.output_scale(output)
        if self.kind == "embedding" and self.input_scale is not None:
            output = output * self.input_scale.weight[input, None]  # [..., d] by [..., 1]
        return output


# --- the config ----------------------------------------------------------------------------------------------------


class SpecDefConfig(PreTrainedConfig):
    """What ``AutoConfig`` finds under ``model_type: specdef``. It makes configs of the native class, not of itself."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The native config that a hardened ``config.json`` describes.

        Raises:
            SpecDefLoadError: A key is missing, or transformers does not know the native model type.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        native = {key: value for key, value in config_dict.items() if key not in (BASE_MODEL_TYPE_KEY, "auto_map")}
        native_type = config_dict.get(BASE_MODEL_TYPE_KEY)
        if not native_type:
            raise SpecDefLoadError(f"config.json has no {BASE_MODEL_TYPE_KEY}, so the native architecture is unknown")
        if not (config_dict.get("quantization_config") or {}).get("layers"):
            raise SpecDefLoadError("config.json has no quantization_config.layers, so the replaced layers are unknown")
        if native_type == "mistral" and "layer_types" in config_dict:
            native_type = "ministral"  # as AutoConfig itself reads such a file
        if native_type not in CONFIG_MAPPING:
            raise SpecDefLoadError(
                f"config.json has {BASE_MODEL_TYPE_KEY} {native_type!r}, which transformers {transformers_version} "
                "does not know"
            )
        native["model_type"] = native_type
        return hardened_config_class(CONFIG_MAPPING[native_type]).from_dict(native, **kwargs)


class _HardenedConfig:
    """What a hardened model's config does otherwise than its native class: it writes the shim to disk.

    In memory it stays native throughout, ``to_dict`` included: PEFT picks its default targets by ``model_type`` there.
    """

    quantization_config: Any

    def to_json_string(self, use_diff: bool = True) -> str:
        text = super().to_json_string(use_diff=use_diff)  # type: ignore[misc]
        if not self._is_hardened():
            return text
        config = json.loads(text) | {
            "model_type": MODEL_TYPE,
            BASE_MODEL_TYPE_KEY: type(self).model_type,  # type: ignore[attr-defined]
            "auto_map": dict(AUTO_MAP),
        }
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
        if self._is_hardened():
            (Path(save_directory) / FILE_NAME).write_bytes(_SOURCE)

    def _is_hardened(self) -> bool:
        # Whoever multiplies the layers together again takes the entry away, and has a native config.
        listed = getattr(self, "quantization_config", None)
        return listed is not None and listed.get("quant_method") == MODEL_TYPE

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle cannot find it by name; it can be made again from the native one.
        return _blank_config, (type(self).native_config_class,), dict(self.__dict__)  # type: ignore[attr-defined]


@functools.cache
def hardened_config_class(native: Any) -> Any:
    """The subclass of a native config class that writes the shim. It bears the native class's name."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        native.__init__(self, *args, **kwargs)  # not a generated one: the native one also validates

    register_quantizer()
    namespace = {"__init__": __init__, "__module__": __name__, "native_config_class": native}
    return type(native.__name__, (_HardenedConfig, native), namespace)


def _blank_config(native: Any) -> Any:
    cls = hardened_config_class(native)
    return cls.__new__(cls)


def _harden_in_place(config: Any) -> None:
    """Make a config one of ours: a native class's own ``from_pretrained`` made it, or another copy of this file."""
    for key in (BASE_MODEL_TYPE_KEY, "auto_map"):
        config.__dict__.pop(key, None)
    if config.__dict__.get("model_type") == MODEL_TYPE:
        del config.__dict__["model_type"]
    cls: Any = type(config)
    config.__class__ = hardened_config_class(getattr(cls, "native_config_class", cls))


# --- the hook ------------------------------------------------------------------------------------------------------


class SpecDefQuantizationConfig(QuantizationConfigMixin):
    """The replaced layers, in the place where transformers looks for a loading hook.

    Args:
        layers: ``{module path: {"in_features": n, "out_features": m, "bias": bool}}`` for a linear layer that became
            two; for a scaled module ``{"kind": …, "weight": shape, "bias": length, "input_scale": length,
            "output_scale": length, "tied_to": module path}``, null where there is none. The paths are those of the
            class that ``architectures`` names in the same ``config.json``.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, Any]], quant_method: str = MODEL_TYPE, **kwargs: Any) -> None:
        self.quant_method = quant_method
        self.layers = {module: dict(spec) for module, spec in layers.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict: transformers takes the ``quantization_config`` of a config that is passed on for one."""
        return getattr(self, key, default)


class SpecDefQuantizer(HfQuantizer):
    """Swaps the layers before the weights are loaded, and checks that all of their weights are there."""

    requires_calibration = False
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _harden_in_place(model.config)
        listed = self.quantization_config.layers
        layers = _resolve(listed, model)
        swap(layers, model)
        # A model built here has the paths of its own class, and so must what it saves.
        self.quantization_config.layers = layers
        files = [str(file) for file in kwargs.get("checkpoint_files") or ()]
        if files and all(file.endswith(".safetensors") for file in files):
            _check_files(files, layers, len(listed), model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in self.quantization_config.layers:
            for name, parameter in model.get_submodule(module).named_parameters():
                # transformers marks what it loads, and accelerate keeps the mark; what was offloaded is on meta.
                if parameter.device.type != "meta" and not getattr(parameter, "_is_hf_initialized", False):
                    raise SpecDefLoadError(f"{module}.{name} was not loaded; it holds initial values")
        # Nothing here is quantized: `.half()`, full fine-tuning and the Trainer ask for these, and refuse.
        self.quantization_config.quant_method = MODEL_TYPE
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(attribute, None)
        for module in model.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config.__dict__.pop("_is_quantized", None)
        return model


def register_quantizer(*, replace: bool = False) -> None:
    """Make the hook known to transformers.

    The package and any number of directories' copies may be loaded in one process. The package replaces, a copy gives
    way: they do the same, and one set of classes is enough.
    """
    from transformers.quantizers import auto

    if replace or MODEL_TYPE not in auto.AUTO_QUANTIZER_MAPPING:
        auto.AUTO_QUANTIZER_MAPPING[MODEL_TYPE] = SpecDefQuantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[MODEL_TYPE] = SpecDefQuantizationConfig


def _resolve(listed: Mapping[str, Mapping[str, Any]], model: Any) -> dict[str, dict[str, Any]]:
    """The listed layers by their paths in ``model``, whose class may be another than the one that was hardened.

    A base model lacks the prefix that a model with a head has, and the other way round. Layers that ``model`` does not
    have at all (a head, a decoder) are left out.
    """
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    resolved = {}
    for module, spec in listed.items():
        for candidate in (module, module.removeprefix(prefix), prefix + module):
            if candidate in modules:
                resolved[candidate] = dict(spec)
                break
    for spec in resolved.values():
        owner = spec.get("tied_to")
        if owner:
            owners = (owner, owner.removeprefix(prefix), prefix + owner)
            spec["tied_to"] = next((name for name in owners if name in modules), owner)
    return resolved


def swap(layers: Mapping[str, Mapping[str, Any]], model: Any) -> None:
    """Put a :class:`SpecDefLinear` in the place of each layer, or a :class:`SpecDefScaled` around it.

    Raises:
        SpecDefLoadError: What is there is not a module of that shape, or shares its weight with another.
    """
    from transformers.pytorch_utils import Conv1D

    _wrap({path: spec for path, spec in layers.items() if "kind" in spec}, model)
    layers = {path: spec for path, spec in layers.items() if "kind" not in spec}

    keys = getattr(model, "all_tied_weights_keys", {})  # a model of diffusers has no tied weights
    tied = {*keys.keys(), *keys.values()}
    for path, spec in layers.items():
        old = model.get_submodule(path)
        expected = (spec["in_features"], spec["out_features"], spec["bias"])
        if type(old) is nn.Linear:
            found = (old.in_features, old.out_features, old.bias is not None)
        elif type(old) is Conv1D:
            found = (old.nx, old.nf, True)
        else:
            raise SpecDefLoadError(f"{path} is a {type(old).__name__}, not a linear layer that could be replaced")
        if found != expected:
            raise SpecDefLoadError(
                f"{path} is listed with (in_features, out_features, bias) = {expected}, but the model has {found}"
            )
        if f"{path}.weight" in tied:
            raise SpecDefLoadError(f"{path}.weight is tied to another weight, so it cannot have been replaced")
        new = SpecDefLinear(*expected, device=old.weight.device, dtype=old.weight.dtype)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)


def _wrap(layers: Mapping[str, Mapping[str, Any]], model: Any) -> None:
    for path, spec in layers.items():
        old = model.get_submodule(path)
        weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
        expected = (tuple(spec["weight"]), spec["bias"])
        found = (None if weight is None else tuple(weight.shape), None if bias is None else len(bias))
        if found != expected:
            raise SpecDefLoadError(f"{path} is listed with (weight, bias) = {expected}, but the model has {found}")
        new = SpecDefScaled(
            old,
            spec["kind"],
            input_scale=spec["input_scale"],
            output_scale=spec["output_scale"],
        )
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    _retie(layers, model)


def _retie(layers: Mapping[str, Mapping[str, Any]], model: Any) -> None:
    """Tie the weights inside of the wrappers, where the model ties those that stand there no longer."""
    moved = {f"{path}.weight": f"{path}.inflated.weight" for path in layers}
    keys = getattr(model, "all_tied_weights_keys", {})
    if any(name in moved for pair in keys.items() for name in pair):
        # Of this one model, not of its class. transformers reads the second whenever weights are to be tied anew.
        model.all_tied_weights_keys = {moved.get(one, one): moved.get(other, other) for one, other in keys.items()}
        model._tied_weights_keys = dict(model.all_tied_weights_keys)


def _check_files(files: Iterable[str], layers: Mapping[str, Mapping[str, Any]], listed: int, model: Any) -> None:
    """Check that the files hold every tensor of every replaced layer, in its shape, and no replaced layer besides.

    Names on disk are not always those of the modules (ViT, Mixtral), so they go through transformers' own conversions.

    Raises:
        SpecDefLoadError: A tensor is missing or of another shape, or layers are replaced in the files only.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    prefix = model.base_model_prefix

    def module_name(key: str, known: dict[str, Any]) -> str:
        renamed, _ = rename_source_key(key, renamings, converters, prefix, known)
        if renamed not in known and key in known:  # as transformers does: the rule was not meant for this key
            renamed, _ = rename_source_key(key, [], [], prefix, known)
        return renamed

    shapes = _shapes(files)
    found: dict[str, str] = {}  # name in the model: name on disk
    stems = set()  # names on disk of the layers replaced there, without `.weight`
    for key, shape in shapes.items():
        stem = next((key.removesuffix(end) for end in _FACTOR_ENDS if key.endswith(end)), None)
        if stem is not None:
            stems.add(stem)
        if stem is not None or shape == (1,):
            found[module_name(key, expected)] = key

    for path, spec in layers.items():
        wanted = {f"{path}.{end}": (end, shape) for end, shape in _factor_shapes(spec).items()}
        # What is missing has no name on disk, but its siblings have, and it would be named like them.
        stem = next((found[name].removesuffix(f".{end}") for name, (end, _) in wanted.items() if name in found), path)
        for name, (end, shape) in wanted.items():
            if name not in found:
                raise SpecDefLoadError(f"{stem}.{end} is missing from the checkpoint")
            if shapes[found[name]] != shape:
                stored = list(shapes[found[name]])
                raise SpecDefLoadError(f"{found[name]} has shape {stored} in the checkpoint, not {list(shape)}")
    used = {disk for name, disk in found.items() if name in expected}
    modules = {f"{name}.weight": True for name, _ in model.named_modules()}
    for stem in sorted(stems):
        for key in (f"{stem}{end}" for end in _FACTOR_ENDS):
            if key in shapes and key not in used:
                path = module_name(f"{stem}.weight", modules).removesuffix(".weight")
                if f"{path}.weight" in modules:
                    raise SpecDefLoadError(
                        f"{key} is in the checkpoint, but config.json does not list {path} as replaced"
                    )
    if len(stems) != listed:
        raise SpecDefLoadError(f"config.json lists {listed} replaced layers, but the checkpoint holds {len(stems)}")


_FACTOR_ENDS = (
    ".inflated.weight",
    ".inflated.bias",
    ".compensation.weight",
    ".compensation.bias",
    ".input_scale.weight",
    ".output_scale.weight",
)


def _factor_shapes(spec: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if "kind" in spec:
        lengths = {"inflated.bias": "bias", "input_scale.weight": "input_scale", "output_scale.weight": "output_scale"}
        found = {name: (spec[key],) for name, key in lengths.items() if spec[key] is not None}
        own = {} if spec["tied_to"] else {"inflated.weight": tuple(spec["weight"])}
        return {**own, **found, "weight": (1,)}
    n, m = spec["in_features"], spec["out_features"]
    shapes: dict[str, tuple[int, ...]] = {"inflated.weight": (m, n), "compensation.weight": (m, m), "weight": (1,)}
    return shapes | ({"compensation.bias": (m,)} if spec["bias"] else {})


def _shapes(files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in some safetensors files, read from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with Path(file).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes
