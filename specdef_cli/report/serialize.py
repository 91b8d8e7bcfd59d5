"""``report.json`` and ``curves.csv``: the report for programs.

Its shape is :class:`specdef_cli.report.document.ReportDocument`, for others ``schema.json`` beside this file. Numbers
that are not finite are null.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from typing import Any

from pydantic import TypeAdapter

from specdef_cli.attack.results import CONTROL_SHARE, AttackReport
from specdef_cli.attack.run_result import DIVERGENCE_FACTOR, KL_LIMIT, UTILITY_LIMIT, RunResult
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.report.document import (
    SCHEMA_NAME,
    AttackPart,
    Best,
    ControlPart,
    Curve,
    Definitions,
    GrowthPart,
    ModelPart,
    ReportDocument,
    RunLoss,
    RunParameters,
    RunPart,
    SpecPart,
)
from specdef_cli.report.findings import STOPPED_SHARE, Finding, findings, summary

CURVE_COLUMNS = (
    "run", "label", "subject", "variant", "trained", "optimizer", "learning_rate", "seed",
    "step", "train_loss", "grad_norm", "eval_loss", "retained_loss", "seconds",
)  # fmt: skip

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
        attacks=tuple(_attack(finding) for finding in findings(report)),
        runs=tuple(_run(report, run) for run in report.runs),
    )


def report_dict(report: AttackReport) -> dict[str, Any]:
    """A report as plain JSON data, as ``schema.json`` describes it."""
    return report_document(report).model_dump(mode="json", by_alias=True)


def report_json(report: AttackReport) -> str:
    """The text of ``report.json``."""
    return json.dumps(report_dict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def curves_csv(report: AttackReport) -> str:
    """The text of ``curves.csv``: one row for each step of each run that has a value; step 0 is before the first
    update.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CURVE_COLUMNS)
    for run in report.runs:
        spec = run.spec
        train = {point.step: point for point in run.train}
        evaluations = {point.step: point for point in run.evaluations}
        for step in sorted(train.keys() | evaluations.keys()):
            trained, evaluated = train.get(step), evaluations.get(step)
            writer.writerow(
                [
                    spec.run_id, spec.label, spec.subject, spec.variant, spec.training.label, spec.optimizer,
                    spec.learning_rate, spec.seed, step, trained and trained.loss, trained and trained.grad_norm,
                    evaluated and evaluated.loss, evaluated and evaluated.retained,
                    evaluated and round(evaluated.seconds, 3),
                ]
            )  # fmt: skip
    return text.getvalue()


def _attack(finding: Finding) -> AttackPart:
    spec, behaviour = finding.attack.runs[0].spec, finding.attack.behaviour
    return AttackPart(
        label=finding.attack.label,
        subject=spec.subject,
        variant=str(spec.variant),
        knowledge=finding.attack.knowledge,
        training=str(spec.training),
        trained=spec.training.label,
        optimizer=spec.optimizer,
        learning_rates=finding.attack.learning_rates,
        best=Best(learning_rate=finding.learning_rate, loss=finding.best),
        start=finding.start,
        share_of_control=finding.share,
        share_of_best_control=finding.share_of_best,
        share_of_control_over_seeds=finding.share_range,
        share_of_control_at_its_rates=finding.usual_share,
        share_of_control_with_utility_kept=finding.useful_share,
        control_share_with_utility_kept=finding.control_useful_share,
        divergent_learning_rate=finding.divergent_rate,
        steps_to_control=finding.steps_to_control,
        seconds_to_control=finding.seconds_to_control,
        parameters_times=finding.parameters_times,
        flops_times=finding.flops_times,
        verdict=finding.verdict,
        edit=finding.attack.edit,
        refusals=finding.refusals,
        refusals_before=behaviour.refusals_before if behaviour is not None else None,
        kl=behaviour.kl if behaviour is not None else None,
        runs=tuple(run.spec.run_id for run in finding.attack.runs),
    )


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
        growth=None if run.growth is None else _growth(run.growth),
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


def _growth(growth: Growth) -> GrowthPart:
    added, times = growth.parameters_added, growth.times
    return GrowthPart(**dataclasses.asdict(growth), parameters_added=added, layers_times=times)
