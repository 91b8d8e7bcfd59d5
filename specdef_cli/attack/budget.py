"""What every run of an attack gets, the control's included: so many steps, of so many tokens, taken in such a way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16", "float16", "mixed", "auto"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What all runs of an attack have in common. Options, run records and the report take these fields from here.

    Attributes:
        schedule, warmup_steps: The learning rate's course.
        max_grad_norm: Gradient clipping, as the Trainer does it; 0 turns it off.
        weight_decay: As the optimizer takes it.
        steps: Optimizer steps of every run.
        batch_size: Sequences of a step, over all processes and passes together.
        sequence_length: Tokens of a sequence.
        dtype: The dtype of training. float32 unless memory forbids: in bfloat16, small rates round to nothing, which
            flatters a defence. ``mixed`` keeps float32 parameters and computes in bfloat16.
        eval_tasks: Tasks of lm-eval on which accuracy is measured after every run (``specdef-cli[eval]``).
        stop_at_divergence: Whether a run ends where its held-out loss passes twice its start. Some come back after
            thousands of steps.
    """

    schedule: Schedule = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    steps: int = 30
    batch_size: int = 16
    sequence_length: int = 128
    dtype: Dtype = "float32"
    eval_tasks: tuple[str, ...] = ()
    stop_at_divergence: bool = True

    @property
    def budget(self) -> dict[str, Any]:
        """These fields alone, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Budget)}
