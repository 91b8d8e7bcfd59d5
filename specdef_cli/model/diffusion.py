"""Load hardened models of diffusers, alone or in their pipelines.

diffusers offers the same hook as transformers between building a model and loading its weights: a quantizer, named in
``config.json``. It runs no code that comes with a checkpoint, so there is no file to copy into the directory: without
this package diffusers raises on the unknown name. Where a user removes the name, diffusers raises on the tombstones:
one element where a weight belongs.

This module is imported by the registration, while diffusers itself is being imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from specdef_cli.checkpoint.files import FLOATING_DTYPES, read_headers
from specdef_cli.checkpoint.reader import TORCH_DTYPES, read_config
from specdef_cli.model.configuration_specdef import MODEL_TYPE, SpecDefLoadError, swap


class _Method(StrEnum):
    SPECDEF = MODEL_TYPE


METHOD = _Method.SPECDEF
"""The name in ``config.json``; an enumeration's member, because diffusers asks for its ``value``."""


class SpecDefDiffusersConfig(QuantizationConfigMixin):
    """The replaced layers, in the place where diffusers looks for a loading hook.

    Args:
        layers: ``{module path: {"in_features": n, "out_features": m, "bias": bool}}``.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, Any]], quant_method: str = MODEL_TYPE) -> None:
        self.quant_method = _Method(quant_method)
        self.layers = {module: dict(spec) for module, spec in layers.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Write everything, as there are no defaults."""
        return self.to_dict()


class SpecDefDiffusersQuantizer(DiffusersQuantizer):
    """Swaps the layers before the weights are loaded, and checks that all of their weights are there."""

    is_serializable = True
    is_trainable = True
    is_compileable = True
    use_keep_in_fp32_modules = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = self.quantization_config.layers
        known = {name for name, _ in model.named_modules()}
        unknown = [path for path in layers if path not in known]
        if unknown:
            raise SpecDefLoadError(f"config.json lists {unknown[0]}, which {type(model).__name__} does not have")
        swap(layers, model)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise where diffusers would only warn, and go on with whatever the memory held.

        A layer that only the files replace needs no check here, as its tombstone has another shape than a weight.
        """
        if missing_keys:
            raise SpecDefLoadError(f"{min(missing_keys)} is missing from the checkpoint")
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # Nothing here is quantized: `.half()`, `.to(dtype)` and LoRA ask for these, and refuse.
        del model.is_quantized, model.quantization_method


def load_denoiser(
    directory: Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None, **kwargs: Any
) -> Any:
    """Load a model of diffusers, hardened or not, in evaluation mode.

    Args:
        dtype: The parameters' dtype; by default the widest that they are stored in (diffusers itself takes float32).
        **kwargs: Passed on to ``from_pretrained``.
    """
    import diffusers

    if dtype in (None, "auto"):
        headers = [header for file in directory.glob("*.safetensors") for header in read_headers(file).values()]
        stored = {TORCH_DTYPES[header.dtype] for header in headers if header.dtype in FLOATING_DTYPES}
        dtype = max(stored, key=lambda dtype: (dtype.itemsize, str(dtype)), default=None)
    if device is not None:
        kwargs.setdefault("device_map", {"": device})
    model_class = getattr(diffusers, read_config(directory)["_class_name"])
    return model_class.from_pretrained(directory, dtype=dtype, use_safetensors=True, **kwargs)
