"""The shape of ``report.json``: what is written, what is read, and ``schema.json``
(:mod:`specdef_cli.schemas`) follow from it.

Keys are only ever added under one schema name, with a default, so that reports of earlier releases are still read; keys
of later releases are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specdef_cli.attack.budget import Budget
from specdef_cli.attack.presence import require_report
from specdef_cli.attack.results import DataSummary, Hardening, PromptSummary
from specdef_cli.attack.run_result import Behaviour, Divergence, Edit, EvalPoint, RunOutcome, TrainPoint
from specdef_cli.attack.spec import Subject
from specdef_cli.attack.target import Task
from specdef_cli.attack.variants.table import Knowledge
from specdef_cli.errors import SpecDefError, first_violation
from specdef_cli.report.findings import Verdict

SCHEMA_NAME: Final = "specdef-attack-report/2"


class Part(BaseModel):
    """A part of the document. The text below a field is its description in the schema."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ModelPart(Part):
    """What was attacked."""

    name: str
    hardening: Hardening | None
    """null: not hardened by this package."""


class ControlPart(Part):
    """The undefended model."""

    name: str


class Definitions(Part):
    """The numbers that verdicts rest on."""

    control_share: float
    """A run has reached the control's loss once it made this share of the control's best progress."""
    divergence_factor: float
    """A held-out loss above this many times the one at step 0 is divergence."""
    stopped_share: float
    """At or below this share of the control's progress an attack counts as stopped."""
    utility_limit: float
    """Utility is kept while perplexity on retained text is at most this share above the start's."""
    kl_limit: float = 1.0
    """An edit whose KL divergence on harmless prompts is beyond this has broken the model."""


class Best(Part):
    """Where an attack did best."""

    learning_rate: float
    loss: float | None


class AttackPart(Part):
    """Runs grouped over learning rates and seeds; judged at the best learning rate, means over seeds."""

    label: str
    subject: Subject
    variant: str
    """What the attacker did to the model before training, as --variant takes it."""
    knowledge: Knowledge
    training: str
    """What was trained, as --training takes it."""
    trained: str
    """The same in words."""
    optimizer: str
    learning_rates: tuple[float, ...]
    best: Best
    start: float | None
    share_of_control: float | None
    """Progress (start − best) over the control's."""
    share_of_best_control: float | None
    """Progress over the most that any control of the report made, by any training."""
    share_of_control_over_seeds: tuple[float, float] | None
    """Of the seed that did worst and the one that did best, at the best learning rate."""
    share_of_control_at_its_rates: float | None
    """As share_of_control, over the learning rates that the control ran at only."""
    share_of_control_with_utility_kept: float | None
    """The most of any run while perplexity on retained text was within the limit; null: not measured."""
    control_share_with_utility_kept: float | None
    """What the control reaches under that same limit; null: not measured."""
    divergent_learning_rate: float | None
    """The smallest at which a run diverged; null: none did."""
    steps_to_control: int | None
    """null: the budget did not get there."""
    seconds_to_control: float | None
    """Of training and evaluation."""
    parameters_times: float
    """Parameters over the control's."""
    flops_times: float
    """Operations of an optimizer step over the control's, estimated from parameters."""
    verdict: Verdict
    edit: Edit | None = None
    """What the best strength of an edit did; null for what is trained."""
    refusals: float | None = None
    """Share of unwanted prompts that the model refuses after the best run; null: not measured, or broken."""
    refusals_before: float | None = None
    """The same before the attack."""
    kl: float | None = None
    """KL divergence (nats) on harmless prompts from the model before the attack; null: not measured."""
    runs: tuple[str, ...]
    """Ids."""


@dataclass(frozen=True, kw_only=True)
class SpecPart(Budget):
    """What was run. Variants and trainings are text here, since a report may name some that another package brought."""

    subject: Subject
    checkpoint: str
    data: str
    task: Task
    variant: str
    training: str
    optimizer: str
    learning_rate: float
    eval_every: int
    seed: int
    prompts: str = ""


class RunLoss(Part):
    """Held-out losses of a run."""

    start: float | None
    best: float | None
    final: float | None


class RunParameters(Part):
    """Parameters of the model that was trained."""

    total: int
    """Without adapters."""
    trainable: int
    times: float
    """The total over the control's."""


class GrowthPart(Part):
    """What the variant did to the layers that it changed."""

    layers: int
    parameters_before: int
    parameters_after: int
    bytes_added: int
    parameters_added: int
    layers_times: float


class Curve(Part):
    """A run, step by step."""

    train: tuple[TrainPoint, ...]
    evaluations: tuple[EvalPoint, ...]


class RunPart(Part):
    """One finished run."""

    id: str
    """Hash of spec; also the name of the run's file in runs/."""
    label: str
    spec: SpecPart
    loss: RunLoss
    best_step: int | None
    steps_to_control: int | None
    """null: the budget did not get there."""
    first_grad_norm: float | None
    parameters: RunParameters
    growth: GrowthPart | None
    flops_per_step: int
    accuracy: dict[str, float]
    """On tasks of lm-eval, after the last step; empty: not measured."""
    outcome: RunOutcome
    """worse: ended above its start; stopped: ended by its search, as it could not become the best any more."""
    divergence: Divergence | None
    stopped: int | None = None
    """The step after which a search ended the run."""
    edits: tuple[Edit, ...] = ()
    """Of an edit, what each strength did."""
    behaviour: Behaviour | None = None
    """How the model answers afterwards; null: not measured."""
    seconds: float
    curve: Curve


class ReportDocument(Part):
    """report.json of a fine-tuning attack.

    Losses are held-out losses in nats. A number that is not finite is null. Keys are only ever added under one schema
    name.
    """

    schema_name: Literal["specdef-attack-report/2"] = Field(alias="schema")
    summary: tuple[str, ...] = Field(min_length=1)
    """The report in sentences; the verdict comes first."""
    model: ModelPart
    control: ControlPart
    data: DataSummary
    prompts: PromptSummary | None = None
    """What edits tell apart and refusals are counted on; null: neither was measured."""
    assumed: tuple[str, ...]
    """What the user left open and was chosen."""
    notes: tuple[str, ...]
    """What must be known to read the figures."""
    definitions: Definitions
    versions: dict[str, str]
    device: str
    attacks: tuple[AttackPart, ...]
    runs: tuple[RunPart, ...]


def read_report(path: Path) -> ReportDocument:
    """The contents of a ``report.json``, or of the one in a directory.

    Raises:
        SpecDefError: There is none, or it is not an attack report.
    """
    file = require_report(path)
    try:
        return ReportDocument.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        reason = first_violation(error)
    except (OSError, ValueError) as error:
        reason = str(error)
    raise SpecDefError(f"{file} is not an attack report: {reason}", "Give the report.json that `specdef attack` wrote.")
