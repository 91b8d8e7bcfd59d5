"""Fine-tunes a model and its control, by strangers to the construction and by those who know it, and records how far
each gets.
"""

import logging

from specdef_cli.callable_package import make_callable
from specdef_cli.extras import require_extra

require_extra("attack", "attacks")
# PEFT imports bitsandbytes where it is installed, and that warns of kernels that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# ruff: noqa: E402 (the imports below are what has to be kept quiet)
from specdef_cli.attack.options import AttackOptions, Expansion
from specdef_cli.attack.recorder import ProgressEvent, ProgressHook
from specdef_cli.attack.results import Attack, AttackReport, RunResult
from specdef_cli.attack.run import attack, is_main_process

__all__ = [
    "Attack",
    "AttackOptions",
    "AttackReport",
    "Expansion",
    "ProgressEvent",
    "ProgressHook",
    "RunResult",
    "attack",
    "is_main_process",
]

make_callable(__name__)
