"""SpecDef: harden open-weight checkpoints against fine-tuning, and measure how far that holds.

Importing this package makes ``AutoModelFor*.from_pretrained`` of transformers load hardened directories. It imports
neither transformers nor torch: the registration waits for transformers, and the public names for their first use.

    from specdef_cli import HardenOptions, harden
    result = harden(HardenOptions("org/name", Path("hardened")))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from specdef_cli.runtime.register import register

# ruff: noqa: F401 (the names of _PUBLIC, once more for type checkers, which do not see them looked up)
if TYPE_CHECKING:
    from specdef_cli.errors import SpecDefError
    from specdef_cli.hardening.collapse import CollapseResult, collapse
    from specdef_cli.hardening.options import CollapseOptions, HardenOptions
    from specdef_cli.hardening.run import HardenResult, PlanPreview, harden, preview
    from specdef_cli.hardening.survey import Survey, survey
    from specdef_cli.runtime import SpecDefLinear, load_model, load_tokenizer

__version__ = "0.1.0"

_PUBLIC = {
    "CollapseOptions": "specdef_cli.hardening.options",
    "CollapseResult": "specdef_cli.hardening.collapse",
    "HardenOptions": "specdef_cli.hardening.options",
    "HardenResult": "specdef_cli.hardening.run",
    "PlanPreview": "specdef_cli.hardening.run",
    "SpecDefError": "specdef_cli.errors",
    "SpecDefLinear": "specdef_cli.runtime",
    "Survey": "specdef_cli.hardening.survey",
    "collapse": "specdef_cli.hardening.collapse",
    "harden": "specdef_cli.hardening.run",
    "load_model": "specdef_cli.runtime",
    "load_tokenizer": "specdef_cli.runtime",
    "preview": "specdef_cli.hardening.run",
    "survey": "specdef_cli.hardening.survey",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register()
