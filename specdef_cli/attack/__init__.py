"""Fine-tunes a model and its control, by strangers to the construction and by those who know it, and records how far
each gets.

The public names are imported on their first use: the tables of attacks, which ``--help`` lists, need neither
transformers nor torch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

# ruff: noqa: F401 (the names of _PUBLIC, once more for type checkers, which do not see them looked up)
if TYPE_CHECKING:
    from specdef_cli.attack.errors import NotApplicable
    from specdef_cli.attack.forecast import Forecast
    from specdef_cli.attack.optimizers.table import OptimizerChoice
    from specdef_cli.attack.options import AttackOptions
    from specdef_cli.attack.recorder import ProgressEvent, ProgressHook
    from specdef_cli.attack.results import Attack, AttackReport
    from specdef_cli.attack.run import attack, is_main_process, plan_attack
    from specdef_cli.attack.run_result import RunResult
    from specdef_cli.attack.table import Factor
    from specdef_cli.attack.trainings.table import Training, TrainingChoice
    from specdef_cli.attack.variants.growth import Growth
    from specdef_cli.attack.variants.table import Variant, VariantChoice

from specdef_cli.callable_package import make_callable

# PEFT imports bitsandbytes where it is installed, and that warns of kernels that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_PUBLIC = {
    "Attack": "specdef_cli.attack.results",
    "AttackOptions": "specdef_cli.attack.options",
    "AttackReport": "specdef_cli.attack.results",
    "Factor": "specdef_cli.attack.table",
    "Forecast": "specdef_cli.attack.forecast",
    "Growth": "specdef_cli.attack.variants.growth",
    "NotApplicable": "specdef_cli.attack.errors",
    "OptimizerChoice": "specdef_cli.attack.optimizers.table",
    "ProgressEvent": "specdef_cli.attack.recorder",
    "ProgressHook": "specdef_cli.attack.recorder",
    "RunResult": "specdef_cli.attack.run_result",
    "Training": "specdef_cli.attack.trainings.table",
    "TrainingChoice": "specdef_cli.attack.trainings.table",
    "Variant": "specdef_cli.attack.variants.table",
    "VariantChoice": "specdef_cli.attack.variants.table",
    "attack": "specdef_cli.attack.run",
    "is_main_process": "specdef_cli.attack.run",
    "plan_attack": "specdef_cli.attack.run",
}

__all__ = [*_PUBLIC]

make_callable(__name__)
