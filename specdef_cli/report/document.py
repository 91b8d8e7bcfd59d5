"""The shape of ``report.json``: what is written, what is read, and ``schema.json``
(`make schema`) follow from it; and several of them side by side.

Keys are only ever added under one schema name, with a default, so that reports of earlier releases are still read; keys
of later releases are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from specdef_cli.attack.one_run import (
    DIVERGENCE_FACTOR,
    KL_LIMIT,
    UTILITY_LIMIT,
    Behaviour,
    Budget,
    Divergence,
    Edit,
    EvalPoint,
    RunOutcome,
    RunResult,
    SpecPart,
    TrainPoint,
)
from specdef_cli.attack.results import (
    CONTROL_SHARE,
    Attack,
    AttackReport,
    DataSummary,
    Hardening,
    PromptSummary,
    same_start,
)
from specdef_cli.errors import SpecDefError, first_violation
from specdef_cli.option import flag_of
from specdef_cli.report import STOPPED_SHARE, Finding, Part, cell, findings, number, percent, rate
from specdef_cli.report.text import summary

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


DEFINITIONS = Definitions(
    control_share=CONTROL_SHARE,
    divergence_factor=DIVERGENCE_FACTOR,
    stopped_share=STOPPED_SHARE,
    utility_limit=UTILITY_LIMIT,
    kl_limit=KL_LIMIT,
)


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
    return ReportDocument(
        schema=SCHEMA_NAME,
        summary=summary(report),
        model=ModelPart(name=report.model, hardening=report.hardening),
        control=ControlPart(name=report.control),
        data=report.data,
        prompts=report.prompts,
        assumed=report.assumed,
        notes=report.notes,
        definitions=DEFINITIONS,
        versions=report.versions,
        device=report.device,
        attacks=findings(report),
        runs=tuple(_run(attack, run) for attack in report.attacks for run in attack.runs),
    )


def report_dict(report: AttackReport) -> dict[str, Any]:
    """A report as plain JSON data, as ``schema.json`` describes it."""
    return report_document(report).model_dump(mode="json", by_alias=True)


def report_json(report: AttackReport) -> str:
    return json.dumps(report_dict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _run(attack: Attack, run: RunResult) -> RunPart:
    reached = attack.reached_control(run)
    return RunPart(
        id=run.spec.run_id,
        label=run.spec.label,
        spec=_SPEC.validate_python(run.spec.record),
        loss=RunLoss(start=run.start, best=run.best, final=run.final),
        best_step=run.best_step,
        steps_to_control=None if reached is None else reached.step,
        first_grad_norm=run.first_grad_norm,
        parameters=RunParameters(
            total=run.parameters, trainable=run.trainable_parameters, times=attack.parameters_times
        ),
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
    """Read a ``report.json``, or the one in a directory."""
    file = require_report(path)
    try:
        return ReportDocument.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        reason = first_violation(error)
    except (OSError, ValueError) as error:
        reason = str(error)
    raise SpecDefError(f"{file} is not an attack report: {reason}", "Give the report.json that `specdef attack` wrote.")


REPORT_NAME = "report.json"


def require_report(path: Path) -> Path:
    """Find the file of an attack report."""
    file = path / REPORT_NAME if path.is_dir() else path
    if not file.is_file():
        raise SpecDefError(f"no attack report {file} found", "Give the report.json that `specdef attack` wrote.")
    return file


@dataclass(frozen=True)
class ComparedAttack:
    attack: str  # what was done first, trained, and with which optimizer
    control: str  # how far the undefended control came by the same training, with its rate
    control_share: float | None  # what that control made of the best control's progress
    cells: tuple[Finding | None, ...]  # one for each model; None where a report lacks the attack

    @property
    def texts(self) -> tuple[str, ...]:
        """The row as people read it: the attack, its control, and each model."""
        cells = ("–" if cell is None else cell.cell for cell in self.cells)
        return (self.attack, f"{self.control}, {percent(self.control_share)}", *cells)


@dataclass(frozen=True)
class Comparison:
    """Reports side by side."""

    models: tuple[str, ...]  # names of the models, as directories end
    verdicts: tuple[str, ...]  # the first line of each report's summary
    rows: tuple[ComparedAttack, ...]  # in the order in which the attacks first appear
    notes: tuple[str, ...]  # what a mark means, and why the columns may not be compared, one sentence each

    @property
    def said(self) -> tuple[str, ...]:
        """The lines below the table."""
        verdicts = zip(self.models, self.verdicts, strict=True)
        return (*(f"{model}: {verdict}" for model, verdict in verdicts), *self.notes)


def compare(reports: Sequence[ReportDocument]) -> Comparison:
    controls: dict[tuple[str, ...], Finding] = {}
    columns = []
    for report in reports:
        for attack in report.attacks:
            if attack.subject == "control":
                controls.setdefault(_recipe(attack), attack)
        columns.append({attack.label: attack for attack in report.attacks if attack.subject == "model"})
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        attacks = [column.get(name) for column in columns]
        control = controls.get(next(_recipe(attack) for attack in attacks if attack is not None))
        rows.append(
            ComparedAttack(
                attack=name,
                control=_learned(control) if control else "–",
                control_share=control.share_of_best if control else None,
                cells=tuple(attacks),
            )
        )
    return Comparison(
        models=_columns([Path(report.model.name).name or report.model.name for report in reports]),
        verdicts=tuple(report.summary[0] for report in reports),
        rows=tuple(rows),
        notes=_notes(reports),
    )


def _columns(names: Sequence[str]) -> tuple[str, ...]:
    """Names with a number behind those that several reports share, in their order."""
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[:place].count(name) + 1})"
        for place, name in enumerate(names)
    )


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as a table for a model card or a page."""
    head = ["attack", "control: loss (best η), of the best control", *comparison.models]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(map(cell, row.texts))} |" for row in comparison.rows]
    return "\n".join([*lines, "", *(f"- {cell(line)}" for line in comparison.said)]) + "\n"


def _recipe(attack: Finding) -> tuple[str, ...]:
    """What it has in common with its control."""
    return (attack.trained, attack.optimizer) if attack.edit is None else (attack.variant,)


def _learned(control: Finding) -> str:
    if control.edit is not None:
        return f"{percent(control.edit.left)} of the direction left, KL {number(control.edit.kl)}"
    return f"{number(control.start)} → {number(control.best)} ({rate(control.learning_rate)})"


def _notes(reports: Sequence[ReportDocument]) -> tuple[str, ...]:
    """Explain a cell's mark, and say what keeps reports from being compared: data, control or budget."""
    notes = []
    controls = ((run.loss.start for run in report.runs if run.spec.subject == "control") for report in reports)
    starts = [next(losses, None) for losses in controls]
    if any(attack.verdict == "not settled" for report in reports for attack in report.attacks):
        notes.append("?: the rates tried do not bracket the best one, so that more may be reached than stands there.")
    if len({report.data.fingerprint for report in reports}) > 1:
        notes.append("The reports were made on different data; their columns cannot be compared.")
    elif not all(same_start(start, other) for start, other in pairwise(starts)):
        names = dict.fromkeys(Path(report.control.name).name for report in reports)
        notes.append(f"The reports have different controls ({', '.join(names)}): the table shows the first one's.")
    else:
        called: dict[str, set[str]] = {}
        for attack in (attack for report in reports for attack in report.attacks):
            called.setdefault(attack.trained, set()).add(attack.training)
        several = {name: sorted(trainings) for name, trainings in called.items() if len(trainings) > 1}
        notes += [f"{name} is not the same in all reports: {'; '.join(them)}." for name, them in several.items()]
    if len({run.spec.prompts for report in reports for run in report.runs} - {""}) > 1:
        notes.append("The reports were made with different prompts; edits and refusals cannot be compared.")
    budgets = [run.spec.budget for report in reports for run in report.runs]
    differing = {name: {str(budget[name]) for budget in budgets} for name in (budgets[0] if budgets else ())}
    told = [
        f"{flag_of(Budget, name)} {' or '.join(sorted(values))}"
        for name, values in differing.items()
        if len(values) > 1 and name != "eval_tasks"
    ]
    if told:
        notes.append(f"The reports had different budgets ({', '.join(told)}); their columns cannot be compared.")
    return tuple(notes)
