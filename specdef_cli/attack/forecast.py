"""The plan of an attack as one screen, before anything of it is run: what, how often, how long, and what would cost
less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from specdef_cli.attack.cost import (
    Speed,
    by_telling,
    expected_runs,
    first_verdict,
    fitting_budget,
    seconds_of,
    verdict_runs,
)
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.plan import Series
from specdef_cli.attack.run_result import RunResult
from specdef_cli.attack.spec import RunSpec
from specdef_cli.durations import in_words

CHEAPER = 30 * 60
"""Seconds of the time limit that is proposed where a plan takes longer than twice that."""


@dataclass(frozen=True)
class PlannedAttack:
    """One series of a plan.

    Attributes:
        label: What is attacked, how.
        runs: How many there will be; of a search, about.
        finished: How many of the runs to begin with are there already.
        search: Whether learning rates are searched.
        seconds: What the runs that are missing take, about; ``None`` where it was not measured.
        first_verdict: Whether the first verdict waits for it.
    """

    label: str
    runs: int
    finished: int
    search: bool
    seconds: float | None
    first_verdict: bool


@dataclass(frozen=True)
class Forecast:
    """A plan and its price.

    Attributes:
        model, control, data: As a report names them.
        budget: Of a run, in words.
        attacks: In the order in which they are run.
        assumed, notes: As a report has them, as far as they are known beforehand.
        seconds: Of everything that is missing, about; ``None`` where it was not measured.
        verdict_seconds: Until the first verdict, about.
        time_limit: Seconds.
        cheaper: What would cost less, in words; empty where nothing much would.
    """

    model: str
    control: str
    data: str
    budget: str
    attacks: tuple[PlannedAttack, ...]
    assumed: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float | None
    verdict_seconds: float | None
    time_limit: float | None
    cheaper: str

    @property
    def runs(self) -> str:
        """How many runs there are, in words: ``34``, or ``about 45`` with a search among them."""
        count = sum(attack.runs for attack in self.attacks)
        return f"about {count}" if any(attack.search for attack in self.attacks) else str(count)


def foresee(
    options: AttackOptions,
    plan: Sequence[Series],
    *,
    names: tuple[str, str, str],
    held_out: int,
    speed: Speed | None,
    load: Callable[[RunSpec], RunResult | None],
    assumed: Sequence[str],
    notes: Sequence[str],
) -> Forecast:
    """Put a plan's price together.

    Args:
        options: Those of the attack.
        plan: Its series.
        names: Of the model, the control and the data.
        held_out: Sequences that every evaluation takes.
        speed: As measured; ``None`` leaves times out.
        load: The store.
        assumed, notes: Sentences for the reader.
    """
    verdict = {id(series) for series in first_verdict(plan)}
    attacks = []
    for series in by_telling(plan):
        finished = _finished(series, load)
        missing = max(expected_runs(series) - finished, 0)
        seconds = None if speed is None else seconds_of(series, missing, speed, held_out) / options.jobs
        attacks.append(
            PlannedAttack(
                series.first.label, expected_runs(series), finished, series.search, seconds, id(series) in verdict
            )
        )
    total = None if speed is None else sum(attack.seconds or 0.0 for attack in attacks)
    until = None
    if speed is not None:
        runs = ((series, max(verdict_runs(series) - _finished(series, load), 0)) for series in first_verdict(plan))
        until = sum(seconds_of(series, count, speed, held_out) for series, count in runs) / options.jobs
    return Forecast(
        model=names[0],
        control=names[1],
        data=names[2],
        budget=options.in_words,
        attacks=tuple(attacks),
        assumed=tuple(assumed),
        notes=tuple(notes),
        seconds=total,
        verdict_seconds=until,
        time_limit=options.time_limit,
        cheaper=_cheaper(options, plan, speed, total),
    )


def _finished(series: Series, load: Callable[[RunSpec], RunResult | None]) -> int:
    """How many of the runs that a series begins with are in the store."""
    grid = series.runs(series.grid, series.seeds[:1] if series.search else series.seeds)
    return sum(load(spec) is not None for spec in grid)


def _cheaper(options: AttackOptions, plan: Sequence[Series], speed: Speed | None, total: float | None) -> str:
    limit = options.time_limit
    if speed is None or total is None or total < 2 * CHEAPER or (limit is not None and limit <= CHEAPER):
        return ""
    free = options.free or ("steps", "batch_size", "sequence_length", "eval_every", "eval_sequences")
    smaller = fitting_budget(replace(options, free=free), plan, speed, CHEAPER)
    return f"--time-limit {in_words(CHEAPER).replace(' min', 'm')}: a first verdict by {smaller.in_words}"
