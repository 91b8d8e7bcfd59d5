"""SpecDef: harden open-weight checkpoints against fine-tuning, and measure how far that holds.

Importing this package makes ``AutoModelFor*.from_pretrained`` of transformers load hardened directories. It imports
neither transformers nor torch: the registration waits for transformers, and the public names for their first use.

The commands are functions here, each with its options and its result:

    from pathlib import Path
    from specdef_cli import AttackOptions, HardenOptions, attack, harden

    result = harden(HardenOptions("org/name", Path("hardened")))
    report = attack(AttackOptions(model="hardened", out=Path("attack")))

Fields of options are named as those of the commands: ``specdef harden --help`` says what each is.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef_cli.model import register

__version__ = "0.1.0"

# ruff: noqa: F401 (looked up when they are first used)
if TYPE_CHECKING:
    from specdef_cli.attack.one_run import RunResult
    from specdef_cli.attack.optimizers import OptimizerChoice
    from specdef_cli.attack.options import AttackOptions
    from specdef_cli.attack.plan import Forecast
    from specdef_cli.attack.results import Attack, AttackReport
    from specdef_cli.attack.run import attack, is_main_process, plan_attack
    from specdef_cli.attack.table import Factor, NotApplicable
    from specdef_cli.attack.trainer import ProgressEvent, ProgressHook
    from specdef_cli.attack.trainings import Training, TrainingChoice
    from specdef_cli.attack.variants import Variant, VariantChoice
    from specdef_cli.certify import CertifyOptions
    from specdef_cli.certify.certificate import Certificate, Claim
    from specdef_cli.certify.run import certify
    from specdef_cli.errors import SpecDefError
    from specdef_cli.hardening.options import CollapseOptions, Factors, Fold, HardenOptions, Scale
    from specdef_cli.hardening.run import CollapseResult, HardenResult, collapse, harden, preview
    from specdef_cli.hardening.survey import PlanSummary, Survey
    from specdef_cli.hardening.survey import survey as inspect
    from specdef_cli.model import SpecDefLinear, load_model, load_tokenizer
    from specdef_cli.option import Source
    from specdef_cli.report.files import write_report

_PUBLIC = {
    alias.asname or alias.name: (node.module or "", alias.name)
    for block in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    for node in (block.body if isinstance(block, ast.If) else ())
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
"""Module and name there of what is public: the imports above are the only list, which type checkers read, too."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _PUBLIC[name]
    return getattr(importlib.import_module(module), there)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register()
