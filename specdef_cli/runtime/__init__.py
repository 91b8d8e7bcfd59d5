"""What makes a hardened directory load in transformers and PEFT.

The names are looked up when they are first used: this package is imported with ``specdef_cli`` itself, which must not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdef_cli.runtime.configuration_specdef import SpecDefLinear, SpecDefScaled
    from specdef_cli.runtime.load import load_model, load_tokenizer, without_progress_bars

__all__ = ["SpecDefLinear", "SpecDefScaled", "load_model", "load_tokenizer", "without_progress_bars"]

_HOMES = {
    "SpecDefLinear": "specdef_cli.runtime.configuration_specdef",
    "SpecDefScaled": "specdef_cli.runtime.configuration_specdef",
    "load_model": "specdef_cli.runtime.load",
    "load_tokenizer": "specdef_cli.runtime.load",
    "without_progress_bars": "specdef_cli.runtime.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A cycle: configuration_specdef imports transformers.quantizers.auto, whose callback (register.py) imports
    # configuration_specdef. With the former imported first, the callback finds the latter whole.
    importlib.import_module("transformers.quantizers.auto")
    return getattr(importlib.import_module(_HOMES[name]), name)
