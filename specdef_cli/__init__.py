"""SpecDef: harden open-weight checkpoints against fine-tuning, and measure how far that holds.

Importing this package makes ``AutoModelFor*.from_pretrained`` of transformers load hardened directories. It imports
neither transformers nor torch: the registration waits for transformers, and the public names for their first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from specdef_cli.runtime.register import register

__version__ = "0.1.0"

_PUBLIC = {
    "SpecDefError": "specdef_cli.errors",
    "SpecDefLinear": "specdef_cli.runtime",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register()
