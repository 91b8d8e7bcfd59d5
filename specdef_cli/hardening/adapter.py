"""A LoRA adapter of a base, rewritten so that it does on the hardened model what it did on the base.

An adapter adds B·A to a weight W. Where rows and columns of W were scaled, the rows of B and the columns of A are
scaled alike. A replaced layer computes C(W~x): there the adapter sits on W~, with C⁻¹B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdef_cli.checkpoint.changes import ScaledSlice
from specdef_cli.checkpoint.output import discard, exclusive, prepare, publish, require_usable
from specdef_cli.checkpoint.shards import scale_slice
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.model.opened import OpenedModel, require_sound

PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""

MERGE = "Merge it into the base (PEFT's merge_and_unload), save that, and harden it instead."

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "lora_bias": (False,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "megatron_config": (None,),
    # Other ways to begin change the base's own weights when PEFT loads the adapter.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""Settings of PEFT's LoraConfig, and the values with which an adapter is B·A and nothing else."""


@dataclass(frozen=True)
class ConvertedAdapter:
    """The written adapter, its modules, and how many of them were rewritten."""

    out: Path
    modules: int
    rewritten: int


def convert_adapter(
    adapter: str, hardened: OpenedModel, out: Path, *, name: str | None = None, token: str | None = None,
) -> ConvertedAdapter:  # fmt: skip
    """Rewrite a LoRA adapter of the base for its hardened model, and publish it as ``out``."""
    require_usable(out, hardened.directory)
    config, weights = _read(adapter, token)
    require_sound(hardened)
    trained_on = config.base_model_name_or_path
    if trained_on and (trained_on == name or Path(trained_on).resolve() == hardened.directory.resolve()):
        raise SpecDefError(
            f"{adapter} names {trained_on} as its base: it was converted already, or trained there",
            "Give an adapter of the model that was hardened.",
        )
    changes = _Changes(hardened)
    found = _pairs(adapter, weights)
    written: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for path, (down, up) in found.items():
        places[path], new_down, new_up = changes.rewrite(path, down, up)
        written |= {
            f"{PREFIX}{places[path]}.lora_A.weight": new_down.contiguous(),
            f"{PREFIX}{places[path]}.lora_B.weight": new_up.contiguous(),
        }
    _retarget(config, places, {path: down.shape[0] for path, (down, _) in found.items()})
    config.base_model_name_or_path = name or str(hardened.directory)
    with exclusive(out):
        work = prepare(out, "adapter", resume=False)
        try:
            save_file(written, work / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(work)
        except BaseException:
            discard(out)
            raise
        publish(out)
    return ConvertedAdapter(out, len(found), changes.rewritten)


def _read(adapter: str, token: str | None) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the weights of an adapter that is nothing but B·A."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    try:
        config: Any = PeftConfig.from_pretrained(adapter, token=token)
        weights = load_peft_weights(adapter, device="cpu", token=token)
    except Exception as error:  # whatever PEFT, safetensors and huggingface_hub raise
        raise SpecDefError(
            f"{adapter} cannot be read as an adapter: {first_line(error)}",
            "Give a directory with adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained "
            "writes them, or a Hub id.",
        ) from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise SpecDefError(f"{adapter} is an adapter of type {kind}; only LORA is converted", MERGE)
    for setting, plain in UNSUPPORTED.items():
        value = getattr(config, setting, plain[0])
        if value not in plain:
            raise SpecDefError(f"{adapter} has {setting}={value!r}; only plain LoRA is converted", MERGE)
    return config, weights


def _pairs(adapter: str, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, n] and B [m, r] of every module by its path, in float32."""
    pattern = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if ".base_layer." in name:  # of a head PEFT saves the base's own weight too
            continue
        match = pattern.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise SpecDefError(
                f"{adapter} has a tensor {name} of shape {list(tensor.shape)}; only LoRA of linear layers is converted",
                MERGE,
            )
        if not torch.isfinite(tensor).all():
            raise SpecDefError(f"{adapter} holds NaN or infinity in {name}", "Train it again.")
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found or any(len(parts) != 2 for parts in found.values()):
        raise SpecDefError(f"{adapter} does not hold lora_A and lora_B of every module", "Save it again with PEFT.")
    return {path: (parts["A"], parts["B"]) for path, parts in found.items()}


class _Changes:
    """The changes to each module's weight, as an adapter of that module sees them."""

    def __init__(self, hardened: OpenedModel) -> None:
        self._skeleton = hardened.skeleton
        self._checkpoint = hardened.checkpoint
        manifest = hardened.hardening
        self._factored = {layer.module: layer for layer in manifest.factored}
        self._scaled = {module.module: module for module in manifest.scaled}
        self._folded: dict[str, list[ScaledSlice]] = {}
        for part in manifest.folded_slices:
            self._folded.setdefault(part.tensor, []).append(part)
        self.rewritten = 0

    def rewrite(self, path: str, down: Tensor, up: Tensor) -> tuple[str, Tensor, Tensor]:
        """Return the adapter's place on the hardened model, and its A and B there."""
        module = self._skeleton.modules.get(path)
        shape = _shape(module)
        if shape is None or shape != (up.shape[0], down.shape[1]):
            problem = "is no linear layer" if shape is None else f"has a weight of {shape[0]} × {shape[1]}"
            raise SpecDefError(
                f"the adapter changes {path} ({up.shape[0]} × {down.shape[1]}), which {problem} of the model",
                "Give an adapter of the model that was hardened.",
            )
        slices = self._slices(path)
        place = f"{path}.inflated" if path in self._scaled or path in self._factored else path
        down, up = down.clone(), up.clone()
        for part in slices:
            of_outputs = (part.axis == 0) != isinstance(module, Conv1D)
            factor, axis = (up, 0) if of_outputs else (down, 1)
            scale_slice(factor, ScaledSlice(part.tensor, axis, None, part.indices, part.exponents))
        if path in self._factored:
            compensation = self._checkpoint.read(self._factored[path].compensation_tensor).double()
            up = torch.linalg.solve(compensation, up.double()).float()
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise SpecDefError(f"the adapter of {path} leaves the range of float32 on the hardened model", MERGE)
        self.rewritten += bool(slices) or place != path
        return place, down, up

    def _slices(self, path: str) -> list[ScaledSlice]:
        if path in self._scaled:
            scaled = self._scaled[path]
            return [
                ScaledSlice(scaled.tensor, side.axis, None, *side.along(scaled.shape[side.axis]))
                for side in scaled.scales.values()
            ]
        parameter = f"{path}.weight"
        tensor = self._skeleton.names.tensor(parameter)
        if tensor is None and self._folded and parameter not in self._skeleton.tied:
            raise SpecDefError(f"the weight of {path} is no tensor of its own in the checkpoint", MERGE)
        return self._folded.get(tensor or "", [])


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


def _retarget(config: Any, places: Mapping[str, str], ranks: Mapping[str, int]) -> None:
    """Name every module by its path on the hardened model, with the rank and alpha that it had."""
    from peft.utils.other import get_pattern_key

    alphas = {}
    for path, place in places.items():
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), path), config.lora_alpha)
        if alpha != config.lora_alpha:
            alphas[re.escape(place)] = alpha
    config.rank_pattern = {re.escape(places[path]): rank for path, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = alphas
    config.target_modules = sorted(places.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
