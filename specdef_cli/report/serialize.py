"""``report.json`` and ``curves.csv``: the report for programs.

``schema.json`` beside this file is the documented shape of ``report.json``. Keys are only ever added under one schema
name. Numbers that are not finite are null.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from typing import Any

from specdef_cli.attack.results import (
    CONTROL_SHARE,
    DIVERGENCE_FACTOR,
    RUN_RECORD,
    UTILITY_LIMIT,
    AttackReport,
    RunResult,
)
from specdef_cli.report.findings import STOPPED_SHARE, Finding, findings, summary

SCHEMA_NAME = "specdef-attack-report/2"

CURVE_COLUMNS = (
    "run", "label", "subject", "variant", "trained", "optimizer", "learning_rate", "seed",
    "step", "train_loss", "grad_norm", "eval_loss", "retained_loss", "seconds",
)  # fmt: skip


def report_dict(report: AttackReport) -> dict[str, Any]:
    """A report as plain JSON data, as ``schema.json`` describes it."""
    return {
        "schema": SCHEMA_NAME,
        "summary": list(summary(report)),
        "model": {
            "name": report.model,
            "hardening": dataclasses.asdict(report.hardening) if report.hardening else None,
        },
        "control": {"name": report.control},
        "data": dataclasses.asdict(report.data),
        "assumed": list(report.assumed),
        "notes": list(report.notes),
        "definitions": {
            "control_share": CONTROL_SHARE,
            "divergence_factor": DIVERGENCE_FACTOR,
            "stopped_share": STOPPED_SHARE,
            "utility_limit": UTILITY_LIMIT,
        },
        "versions": report.versions,
        "device": report.device,
        "attacks": [_attack(each) for each in findings(report)],
        "runs": [_run(report, run) for run in report.runs],
    }


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


def _attack(finding: Finding) -> dict[str, Any]:
    spec = finding.attack.runs[0].spec
    return {
        "label": finding.attack.label,
        "subject": spec.subject,
        "variant": str(spec.variant),
        "knowledge": finding.attack.knowledge,
        "training": str(spec.training),
        "trained": spec.training.label,
        "optimizer": spec.optimizer,
        "learning_rates": list(finding.attack.learning_rates),
        "best": {"learning_rate": finding.learning_rate, "loss": finding.best},
        "start": finding.start,
        "share_of_control": finding.share,
        "share_of_best_control": finding.share_of_best,
        "share_of_control_over_seeds": finding.share_range and list(finding.share_range),
        "share_of_control_at_its_rates": finding.usual_share,
        "share_of_control_with_utility_kept": finding.useful_share,
        "control_share_with_utility_kept": finding.control_useful_share,
        "divergent_learning_rate": finding.divergent_rate,
        "steps_to_control": finding.steps_to_control,
        "seconds_to_control": finding.seconds_to_control,
        "parameters_times": finding.parameters_times,
        "flops_times": finding.flops_times,
        "verdict": finding.verdict,
        "runs": [run.spec.run_id for run in finding.attack.runs],
    }


def _run(report: AttackReport, run: RunResult) -> dict[str, Any]:
    growth = run.growth
    reached = report.reached_control(run)
    return {
        "id": run.spec.run_id,
        "label": run.spec.label,
        "spec": RUN_RECORD.dump_python(run, mode="json")["spec"],
        "loss": {"start": run.start, "best": run.best, "final": run.final},
        "best_step": run.best_step,
        "steps_to_control": reached and reached.step,
        "first_grad_norm": run.first_grad_norm,
        "parameters": {
            "total": run.parameters,
            "trainable": run.trainable_parameters,
            "times": report.parameters_times(run),
        },
        "growth": growth
        and {
            **dataclasses.asdict(growth),
            "parameters_added": growth.parameters_added,
            "layers_times": growth.times,
        },
        "flops_per_step": run.flops_per_step,
        "accuracy": run.accuracy,
        "outcome": run.outcome,
        "divergence": run.divergence and dataclasses.asdict(run.divergence),
        "seconds": run.seconds,
        "curve": {
            "train": [dataclasses.asdict(point) for point in run.train],
            "evaluations": [dataclasses.asdict(point) for point in run.evaluations],
        },
    }
