"""SpecDef: harden open-weight checkpoints against fine-tuning, and measure how far that holds.

Importing this package makes ``AutoModelFor*.from_pretrained`` of transformers load hardened directories. It imports
neither transformers nor torch: the registration waits for transformers, and the public names for their first use.

The commands are functions here, each with its options and its result:

    from pathlib import Path
    from specdef_cli import AttackOptions, HardenOptions, attack, harden

    result = harden(HardenOptions("org/name", Path("hardened")))
    report = attack(AttackOptions(model="hardened", out=Path("attack")))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from specdef_cli.runtime.register import register
from specdef_cli.version import __version__

# ruff: noqa: F401 (the names of _PUBLIC, once more for type checkers, which do not see them looked up)
if TYPE_CHECKING:
    from specdef_cli.attack.options import AttackOptions
    from specdef_cli.attack.results import AttackReport
    from specdef_cli.attack.run import attack
    from specdef_cli.certify.certificate import Certificate
    from specdef_cli.certify.options import CertifyOptions
    from specdef_cli.certify.run import certify
    from specdef_cli.errors import SpecDefError
    from specdef_cli.hardening.collapse import CollapseResult, collapse
    from specdef_cli.hardening.options import CollapseOptions, Factors, Fold, HardenOptions, Scale
    from specdef_cli.hardening.outlook import PlanSummary
    from specdef_cli.hardening.run import HardenResult, harden, preview
    from specdef_cli.hardening.survey import Survey
    from specdef_cli.hardening.survey import survey as inspect
    from specdef_cli.report.write import write_report
    from specdef_cli.runtime import SpecDefLinear, load_model, load_tokenizer


# Public name → where it is, as module or module:name. ``attack`` and ``certify`` are packages, and callable.
_PUBLIC = {
    "AttackOptions": "specdef_cli.attack.options",
    "AttackReport": "specdef_cli.attack.results",
    "Certificate": "specdef_cli.certify.certificate",
    "CertifyOptions": "specdef_cli.certify.options",
    "CollapseOptions": "specdef_cli.hardening.options",
    "CollapseResult": "specdef_cli.hardening.collapse",
    "Factors": "specdef_cli.hardening.options",
    "Fold": "specdef_cli.hardening.options",
    "HardenOptions": "specdef_cli.hardening.options",
    "HardenResult": "specdef_cli.hardening.run",
    "PlanSummary": "specdef_cli.hardening.outlook",
    "Scale": "specdef_cli.hardening.options",
    "SpecDefError": "specdef_cli.errors",
    "SpecDefLinear": "specdef_cli.runtime",
    "Survey": "specdef_cli.hardening.survey",
    "attack": "specdef_cli.attack",
    "certify": "specdef_cli.certify",
    "collapse": "specdef_cli.hardening.collapse",
    "harden": "specdef_cli.hardening.run",
    "inspect": "specdef_cli.hardening.survey:survey",
    "load_model": "specdef_cli.runtime",
    "load_tokenizer": "specdef_cli.runtime",
    "preview": "specdef_cli.hardening.run",
    "write_report": "specdef_cli.report.write",
}
_CALLABLE_PACKAGES = ("attack", "certify")

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, _, original = _PUBLIC[name].partition(":")
    module = importlib.import_module(place)
    return module if name in _CALLABLE_PACKAGES else getattr(module, original or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register()
