"""Floating dtypes by the names that torch, ``config.json`` and ``--dtype`` have for them."""

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
