"""The specification of one training run, and the identity that follows from it.

Everything that can change a run's curve stands here, and nothing else: two runs with equal specifications are the
same run, wherever and whenever they were made. That makes the result files reusable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from specdef_cli.attack.budget import Budget
from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.table import Training
from specdef_cli.attack.variants.table import Variant

Subject = Literal["control", "model"]
RUN_FORMAT = 4
"""Raised whenever the same specification would give another curve, so that older files are not taken for it."""


VariantText = Annotated[Variant, PlainValidator(Variant.parse), PlainSerializer(str, return_type=str)]
TrainingText = Annotated[Training, PlainValidator(Training.parse), PlainSerializer(str, return_type=str)]


@dataclass(frozen=True)
class RunSpec(Budget):
    """One training run. In a record, variant and training stand as users write them.

    Attributes:
        subject: Whether the control or the model under attack is trained.
        checkpoint: Fingerprint of the checkpoint (:func:`checkpoint_fingerprint`).
        data: Fingerprint of the tokens that are trained on and evaluated.
        variant: What happens to the model before training.
        training: What is trained.
        prompts: Fingerprint of the prompts that answers are measured on; empty where none are.
        optimizer, learning_rate, eval_every, seed: As in :class:`specdef_cli.attack.options.AttackOptions`.
    """

    subject: Subject
    checkpoint: str
    data: str
    task: Task
    variant: VariantText
    training: TrainingText
    optimizer: str
    learning_rate: float
    eval_every: int
    seed: int
    prompts: str = ""

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
