"""The shape of ``report.json``: what is written, what is read, and ``schema.json``
(:mod:`specdef_cli.schemas`) follow from it.

Keys are only ever added under one schema name, with a default, so that reports of earlier releases are still read; keys
of later releases are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from specdef_cli.attack.presence import require_report
from specdef_cli.attack.results import CONTROL_SHARE, AttackReport, DataSummary, Hardening, PromptSummary
from specdef_cli.attack.run_result import (
    DIVERGENCE_FACTOR,
    KL_LIMIT,
    UTILITY_LIMIT,
    Behaviour,
    Divergence,
    Edit,
    EvalPoint,
    RunOutcome,
    RunResult,
    TrainPoint,
)
from specdef_cli.attack.spec import Budget, Subject
from specdef_cli.attack.target import Task
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.errors import SpecDefError, first_violation
from specdef_cli.report.findings import STOPPED_SHARE, Finding, Part, findings
from specdef_cli.report.sentences import summary

SCHEMA_NAME: Final = "specdef-attack-report/2"


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
    growth: Growth | None
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
    attacks: tuple[Finding, ...]
    runs: tuple[RunPart, ...]


_SPEC = TypeAdapter(SpecPart)


def report_document(report: AttackReport) -> ReportDocument:
    """A report as ``report.json`` holds it."""
    return ReportDocument(
        schema=SCHEMA_NAME,
        summary=summary(report),
        model=ModelPart(name=report.model, hardening=report.hardening),
        control=ControlPart(name=report.control),
        data=report.data,
        prompts=report.prompts,
        assumed=report.assumed,
        notes=report.notes,
        definitions=Definitions(
            control_share=CONTROL_SHARE,
            divergence_factor=DIVERGENCE_FACTOR,
            stopped_share=STOPPED_SHARE,
            utility_limit=UTILITY_LIMIT,
            kl_limit=KL_LIMIT,
        ),
        versions=report.versions,
        device=report.device,
        attacks=findings(report),
        runs=tuple(_run(report, run) for run in report.runs),
    )


def report_dict(report: AttackReport) -> dict[str, Any]:
    """A report as plain JSON data, as ``schema.json`` describes it."""
    return report_document(report).model_dump(mode="json", by_alias=True)


def report_json(report: AttackReport) -> str:
    """The text of ``report.json``."""
    return json.dumps(report_dict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _run(report: AttackReport, run: RunResult) -> RunPart:
    reached = report.reached_control(run)
    return RunPart(
        id=run.spec.run_id,
        label=run.spec.label,
        spec=_SPEC.validate_python(run.spec.record),
        loss=RunLoss(start=run.start, best=run.best, final=run.final),
        best_step=run.best_step,
        steps_to_control=None if reached is None else reached.step,
        first_grad_norm=run.first_grad_norm,
        parameters=RunParameters(
            total=run.parameters, trainable=run.trainable_parameters, times=report.parameters_times(run)
        ),
        growth=run.growth,
        flops_per_step=run.flops_per_step,
        accuracy=run.accuracy,
        outcome=run.outcome,
        divergence=run.divergence,
        stopped=run.stopped,
        edits=run.edits,
        behaviour=run.behaviour,
        seconds=run.seconds,
        curve=Curve(train=run.train, evaluations=run.evaluations),
    )


def read_report(path: Path) -> ReportDocument:
    """The contents of a ``report.json``, or of the one in a directory."""
    file = require_report(path)
    try:
        return ReportDocument.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        reason = first_violation(error)
    except (OSError, ValueError) as error:
        reason = str(error)
    raise SpecDefError(f"{file} is not an attack report: {reason}", "Give the report.json that `specdef attack` wrote.")
