"""Fine-tunes a model and its control, by strangers to the construction and by those who know it, and records how far
each gets.
"""

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
