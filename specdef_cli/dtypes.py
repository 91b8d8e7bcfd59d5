"""Dtypes by the names that torch, ``config.json``, ``--dtype`` and safetensors have for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
)
"""What ``--dtype`` takes."""

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
        "C64": torch.complex64,
    }
)  # fmt: skip
"""By the names that safetensors has for them."""
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = MappingProxyType({v: k for k, v in TORCH_DTYPES.items()})
FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
