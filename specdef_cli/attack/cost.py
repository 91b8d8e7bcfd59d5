"""What runs cost on this machine, and what fits into the time that there is.

A run's cost is measured on two steps of the control; everything else here is arithmetic on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from specdef_cli.attack.data import AttackData
from specdef_cli.attack.data.attack_data import Examples
from specdef_cli.attack.optimizers.table import OPTIMIZERS
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.plan import Series
from specdef_cli.attack.run_result import RunResult
from specdef_cli.attack.spec import RunSpec
from specdef_cli.attack.trainings.table import Training
from specdef_cli.checkpoint.reader import open_checkpoint

SEARCHED_RUNS = 8
"""Runs of a search for a learning rate, on average over those of ``make attack-suite``."""

SHORTENED = 0.6
"""Of the time of a run in full, what a run takes on average in a search that ends what cannot become its best."""

DECADE_RUNS = 5
"""Of these, what it takes to know the decade of the best rate; a first verdict needs no more."""

SECOND_ORDER_TIMES = 3
"""How many times as long a step takes that differentiates the gradient once more."""

FORWARD_SHARE = 1 / 3
"""Of a training step's time, what the forward pass takes, which is all of an evaluation."""

BUDGETS = (
    {"steps": 30, "batch_size": 16, "sequence_length": 128, "eval_sequences": 64},
    {"steps": 30, "batch_size": 8, "sequence_length": 128, "eval_sequences": 32},
    {"steps": 20, "batch_size": 8, "sequence_length": 96, "eval_sequences": 16},
    {"steps": 20, "batch_size": 4, "sequence_length": 96, "eval_sequences": 16},
    {"steps": 15, "batch_size": 4, "sequence_length": 64, "eval_sequences": 8},
    {"steps": 10, "batch_size": 4, "sequence_length": 64, "eval_sequences": 8},
    {"steps": 10, "batch_size": 2, "sequence_length": 64, "eval_sequences": 8},
    {"steps": 6, "batch_size": 2, "sequence_length": 32, "eval_sequences": 4},
)
"""Budgets of a run, largest first. Fewer steps than the last one's tell nothing."""

EVALUATIONS = 3
"""Of a run on a chosen budget, besides the one at step 0."""

_NOMINAL_SECONDS = 60
_NOMINAL_SPEED = {"cpu": 1e11, "accelerator": 1e14}
"""Floating-point operations a second that a few cores, and a data centre's GPU, make of training in float32."""

FOR_A_VERDICT = 0.8
"""Share of a time limit within which the first verdict is to stand; the rest is for further attacks."""


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        load: Seconds to load the model and set a run up.
        step: Seconds for each token that is trained on.
        evaluation: Seconds for each token that is evaluated.
    """

    load: float
    step: float
    evaluation: float

    def run(self, spec: RunSpec, held_out: int) -> float:
        """Seconds that a run takes, about.

        Args:
            spec: The run.
            held_out: Sequences that every evaluation takes, retained text included.
        """
        slower = SECOND_ORDER_TIMES if OPTIMIZERS.choose(spec.optimizer).second_order else 1
        trained = spec.steps * spec.batch_size * spec.sequence_length
        evaluations = spec.steps // spec.eval_every + 1
        return (
            self.load + slower * self.step * trained + self.evaluation * evaluations * held_out * spec.sequence_length
        )


def measure_speed(first: RunSpec, data: AttackData, train: Callable[[RunSpec, AttackData], RunResult]) -> Speed:
    """Train the control for two steps, each followed by an evaluation. The first pair warms caches up; the second is
    what further ones cost.

    Args:
        first: A run of the control.
        data: What it is trained on.
        train: Makes a run on data.
    """
    count = min(first.batch_size, len(data.held_out))
    few = replace(data, held_out=_part(data.held_out, count), retained=None)
    began = time.perf_counter()
    result = train(replace(first, steps=2, eval_every=1, warmup_steps=0, eval_tasks=()), few)
    load = time.perf_counter() - began - result.seconds
    times = [point.seconds for point in result.evaluations]
    last = times[-1] - times[-2]  # the rate may be one at which the control diverges: then there is no second step
    tokens = first.batch_size * first.sequence_length, count * first.sequence_length
    step = last / (tokens[0] + FORWARD_SHARE * tokens[1])
    return Speed(max(load, 0.0), step, FORWARD_SHARE * step)


def speed_of(finished: RunResult, held_out: int) -> Speed:
    """What a finished run tells of the cost of another one; loading is not known from it.

    Args:
        finished: A run that made at least one step.
        held_out: Sequences that every evaluation of it took.
    """
    spec = finished.spec
    trained = finished.train[-1].step * spec.batch_size * spec.sequence_length
    evaluated = len(finished.evaluations) * held_out * spec.sequence_length
    step = finished.seconds / (trained + FORWARD_SHARE * evaluated)
    return Speed(0.0, step, FORWARD_SHARE * step)


def _part(examples: Examples, count: int) -> Examples:
    return Subset(examples, range(min(count, len(examples))))  # type: ignore[arg-type]


def expected_runs(series: Series) -> int:
    """Runs of a series: as many as it names, or what a search takes on average."""
    return SEARCHED_RUNS + len(series.seeds) - 1 if series.search else len(series.grid) * len(series.seeds)


def seconds_of(series: Series, runs: int, speed: Speed, held_out: int) -> float:
    """What some runs of a series take, about.

    Args:
        series: Its runs are of the size of its first one.
        runs: How many of them.
        speed: As measured.
        held_out: Sequences that every evaluation takes.
    """
    return runs * speed.run(series.first, held_out) * (SHORTENED if series.hurried else 1.0)


def verdict_runs(series: Series) -> int:
    """Runs of a series before a first verdict stands."""
    return min(DECADE_RUNS, expected_runs(series)) if series.search else expected_runs(series)


def by_telling(plan: Sequence[Series]) -> tuple[Series, ...]:
    """A plan in the order in which it tells most: what may walk through and costs no more than any other run, then what
    everybody tries, then the rest; every attack right after its control.
    """
    controls = {series.first.control("").attack: series for series in plan if series.first.subject == "control"}
    attacks = [series for series in plan if series.first.subject == "model"]
    ordered: dict[int, Series] = {}
    for attack in sorted(attacks, key=_rank):  # stable: within a rank, the order of the plan
        control = controls.get(attack.first.control("").attack)
        for series in (control, attack):
            if series is not None:
                ordered.setdefault(id(series), series)
    return tuple(ordered.values())


_SEE_NO_SCALE = ("hira", "adapter")
"""Trainings that walk through a diagonal hardening without knowing of it."""


def _rank(series: Series) -> int:
    """0 for what undoes the hardening, 1 for recipes that see no scale, 2 for full fine-tuning, 3 for LoRA, 4 for
    anything else.
    """
    spec = series.first
    plain, usual = spec.variant.choice.function is None, spec.optimizer == "adamw"
    if usual and spec.variant.choice.informed is not None and spec.training == Training("full"):
        return 0
    known = [*(Training(name) for name in _SEE_NO_SCALE), Training("full"), Training("lora")]
    if not (usual and plain and spec.training in known):
        return 4
    return max(1, known.index(spec.training))


def first_verdict(plan: Sequence[Series]) -> tuple[Series, ...]:
    """Those of an ordered plan without which there is no verdict: up to full fine-tuning and LoRA with AdamW."""
    ordered = by_telling(plan)
    attacks = [series for series in ordered if series.first.subject == "model"]
    needed = [series for series in attacks if _rank(series) < 4] or attacks[:1]
    last = max((ordered.index(series) for series in needed), default=0)
    return ordered[: last + 1]


def default_budget(options: AttackOptions, control: Path) -> AttackOptions:
    """The options with a budget that suits the size of the model and the kind of device. Not its speed: the same
    command gives the same figures on another machine of the kind.

    Args:
        options: Those of the user; what ``options.free`` names may be lowered.
        control: The control's directory.
    """
    if not options.free:
        return options
    parameters = sum(math.prod(header.shape) for header in open_checkpoint(control).tensors.values())
    speed = _NOMINAL_SPEED["accelerator" if torch.accelerator.is_available() else "cpu"]
    lowered = options
    for budget in ({}, *BUDGETS):  # first of all as it is
        lowered = _lowered(options, budget)
        tokens = lowered.steps * lowered.batch_size * lowered.sequence_length
        if 6 * parameters * tokens <= speed * _NOMINAL_SECONDS:
            break
    return lowered


def _lowered(options: AttackOptions, budget: Mapping[str, int]) -> AttackOptions:
    changes: dict[str, Any] = {
        name: min(value, getattr(options, name)) for name, value in budget.items() if name in options.free
    }
    if "eval_every" in options.free and budget:
        changes["eval_every"] = max(1, changes.get("steps", options.steps) // EVALUATIONS)
    return replace(options, **changes)


def fitting_budget(options: AttackOptions, plan: Sequence[Series], speed: Speed, limit: float) -> AttackOptions:
    """The options with the largest budget at which the first verdict stands well within a time limit.

    Args:
        options: Those of the user; what ``options.free`` names may be lowered.
        plan: Of any budget.
        speed: As measured.
        limit: Seconds.
    """
    verdict = first_verdict(plan)
    chosen = options
    for budget in ({}, *BUDGETS):  # first of all as it is
        chosen = _lowered(options, budget)
        held_out = chosen.eval_sequences + max(1, chosen.eval_sequences // 4)
        resized = [replace(series, first=_on(series.first, chosen)) for series in verdict]
        seconds = sum(seconds_of(series, verdict_runs(series), speed, held_out) for series in resized)
        if seconds / chosen.jobs <= FOR_A_VERDICT * limit:
            break
    return chosen


def _on(spec: RunSpec, options: AttackOptions) -> RunSpec:
    return replace(
        spec,
        steps=options.steps,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        eval_every=options.eval_interval,
    )


class Deadline:
    """Whether one more run fits: it is taken to last as long as those so far did on average.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._spent: list[float] = []

    def finished(self, seconds: float) -> None:
        """A run has taken this long."""
        self._spent.append(seconds)

    def allows(self) -> bool:
        """Whether another run may start."""
        if not self._spent:
            return True  # without a single run there is nothing to report
        return time.monotonic() + sum(self._spent) / len(self._spent) <= self._end
