"""What every run of an attack gets, the control's included: so many steps, of so many tokens, taken in such a way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from specdef_cli.option import option

Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16", "float16", "mixed", "auto"]
_TRAINER = "Budget / As in Trainer."


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

    schedule: Schedule = option("constant", "constant, linear or cosine.", metavar="NAME", group="Budget")
    warmup_steps: int = option(0, "Steps of linear warm-up.", metavar="N", group=_TRAINER)
    max_grad_norm: float = option(1.0, "Gradient clipping; 0 turns it off.", metavar="X", group=_TRAINER)
    weight_decay: float = option(0.0, "Weight decay.", metavar="X", group=_TRAINER)
    steps: int = option(30, "Steps of a run; fewer for a large model.", metavar="N", group="Budget")
    batch_size: int = option(16, "Sequences a step.", metavar="N", group="Budget")
    sequence_length: int = option(128, "Tokens a sequence.", metavar="N", group="Budget")
    dtype: Dtype = option("float32", "bfloat16, float16, mixed or auto.", metavar="DTYPE", group="Budget")
    eval_tasks: tuple[str, ...] = option(
        (),
        "Accuracy on a task of lm-eval.",
        "--eval-task",
        metavar="NAME",
        group="Measurements / Accuracy on tasks of lm-eval.",
    )
    stop_at_divergence: bool = option(
        True,
        "End at twice the first loss.",
        "--stop-at-divergence/--no-stop-at-divergence",
        group="Budget",
    )

    @property
    def in_words(self) -> str:
        """What a run is: ``30 steps of 16 sequences of 128 tokens, float32``."""
        dtype = "float32 and bfloat16 mixed" if self.dtype == "mixed" else self.dtype
        return f"{self.steps} steps of {self.batch_size} sequences of {self.sequence_length} tokens, {dtype}"

    @property
    def budget(self) -> dict[str, Any]:
        """These fields alone, by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Budget)}
