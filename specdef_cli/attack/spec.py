"""The budget and the specification of a training run, and the identity that follows from it.

Everything that can change a run's curve stands here, and nothing else: runs with equal specifications are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.table import Training
from specdef_cli.attack.variants.table import Variant
from specdef_cli.option import option

Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16", "float16", "mixed", "auto"]

_TRAINER = "Budget / As in Trainer."


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What all runs of an attack have in common. Options, run records and the report take these fields from here."""

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
        "End a run at twice its first loss.",
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


Subject = Literal["control", "model"]
RUN_FORMAT = 4
"""Raised whenever the same specification would give another curve, so that older files are not taken for it."""


VariantText = Annotated[Variant, PlainValidator(Variant.parse), PlainSerializer(str, return_type=str)]
TrainingText = Annotated[Training, PlainValidator(Training.parse), PlainSerializer(str, return_type=str)]


@dataclass(frozen=True)
class RunSpec(Budget):
    """One training run. In a record, variant and training stand as users write them."""

    subject: Subject
    checkpoint: str  # fingerprint of the checkpoint (checkpoint_fingerprint)
    data: str  # fingerprint of the tokens that are trained on and evaluated
    task: Task
    variant: VariantText
    training: TrainingText
    optimizer: str
    learning_rate: float
    eval_every: int
    seed: int
    prompts: str = ""  # fingerprint of the prompts that answers are measured on; empty where none are

    @property
    def run_id(self) -> str:
        """Sixteen hexadecimal digits that stand for this specification."""
        record = {"format": RUN_FORMAT, **self.record}
        if not self.prompts:  # as releases wrote it that measured no answers
            del record["prompts"]
        text = json.dumps(record, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def record(self) -> dict[str, Any]:
        """As plain JSON data."""
        return _RECORD.dump_python(self, mode="json")

    @property
    def attack(self) -> RunSpec:
        """What all runs of an attack share: everything but the learning rate and the seed."""
        return dataclasses.replace(self, learning_rate=0.0, seed=0)

    def control(self, checkpoint: str) -> RunSpec:
        """The same run on the undefended model, whose fingerprint is ``checkpoint``."""
        variant = self.variant if self.is_edit else Variant()
        return dataclasses.replace(self, subject="control", checkpoint=checkpoint, variant=variant)

    @property
    def is_edit(self) -> bool:
        """Whether the model is edited, and not trained."""
        return self.variant.choice.edits

    @property
    def label(self) -> str:
        """What is run, without the learning rate and the seed: ``hardened, collapsed · full · adamw``."""
        subject = "control" if self.subject == "control" else "hardened"
        what = f"{subject}, {self.variant.label}" if self.variant.label else subject
        return what if self.is_edit else f"{what} · {self.training.label} · {self.optimizer}"


_RECORD = TypeAdapter(RunSpec)
