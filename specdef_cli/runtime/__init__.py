"""What makes a hardened directory load in transformers and PEFT.

The names are looked up when they are first used: this package is imported with ``specdef_cli`` itself, which must not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdef_cli.runtime.configuration_specdef import SpecDefLinear
    from specdef_cli.runtime.load import load_model, load_tokenizer, without_progress_bars

__all__ = ["SpecDefLinear", "load_model", "load_tokenizer", "without_progress_bars"]

_HOMES = {
    "SpecDefLinear": "specdef_cli.runtime.configuration_specdef",
    "load_model": "specdef_cli.runtime.load",
    "load_tokenizer": "specdef_cli.runtime.load",
    "without_progress_bars": "specdef_cli.runtime.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Before our own module, which it registers as soon as it is there (register.py): not while that is half imported.
    importlib.import_module("transformers.quantizers.auto")
    return getattr(importlib.import_module(_HOMES[name]), name)
