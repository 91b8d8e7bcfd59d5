"""What makes a hardened directory load in transformers and PEFT.

The names are looked up when they are first used: this package is imported with ``specdef_cli`` itself, which must not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdef_cli.model.configuration_specdef import SpecDefLinear, SpecDefScaled
    from specdef_cli.model.loading import load_model, load_tokenizer, without_progress_bars

__all__ = ["SpecDefLinear", "SpecDefScaled", "load_model", "load_tokenizer", "without_progress_bars"]

_HOMES = {
    "SpecDefLinear": "specdef_cli.model.configuration_specdef",
    "SpecDefScaled": "specdef_cli.model.configuration_specdef",
    "load_model": "specdef_cli.model.loading",
    "load_tokenizer": "specdef_cli.model.loading",
    "without_progress_bars": "specdef_cli.model.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A cycle: configuration_specdef imports transformers.quantizers.auto, whose callback (register.py) imports
    # configuration_specdef. With the former imported first, the callback finds the latter whole.
    importlib.import_module("transformers.quantizers.auto")
    return getattr(importlib.import_module(_HOMES[name]), name)
