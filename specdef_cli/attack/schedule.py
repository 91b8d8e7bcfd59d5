"""Runs series after series, or several runs at a time (:mod:`specdef_cli.attack.workers`).

A series decides by its results which learning rate comes next (:mod:`specdef_cli.attack.search`), so there is always a
queue of what may run now, and a finished run may add to it. What is found finished in the store is never run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from specdef_cli.attack.cost import Deadline, expected_runs
from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.plan import Series
from specdef_cli.attack.prospects import Lead, trains_as_control
from specdef_cli.attack.recorder import EventKind, ProgressEvent, ProgressHook
from specdef_cli.attack.run_result import RunResult
from specdef_cli.attack.search import best_rate, is_refinement, next_rates
from specdef_cli.attack.spec import RunSpec
from specdef_cli.attack.workers import Execute, Submit, executor
from specdef_cli.waiting import first_completed


@dataclass(frozen=True)
class Outcome:
    """What came of a plan.

    Attributes:
        runs: Every run, by series in the order of the plan, largest learning rate first.
        left_out: Series that the model has nothing for: the label, and why.
        not_reached: Labels of series that the time did not suffice for, in the order in which they would have come.
        cut_short: Labels of series that were begun, and whose best learning rate may be another decade's.
        coarse: Labels of series whose best learning rate is known to a decade only.
    """

    runs: tuple[RunResult, ...]
    left_out: tuple[tuple[str, str], ...]
    not_reached: tuple[str, ...] = ()
    cut_short: tuple[str, ...] = ()
    coarse: tuple[str, ...] = ()


@dataclass
class _Progress:
    """One series while it is under way.

    Attributes:
        rank: Its place in the order in which runs are made.
        hasty: Whether time is limited: every attack gets to its best decade before any is searched more closely.
        control: The series of its control; ``None`` for a control's own.
        follows: Whether the control's best rates are taken over, as the first of them gave the control's curve.
        lead: What it knew when the runs that are under way were chosen. What one of them finds does not change what
            becomes of the others: the same runs are made with every number of jobs.
        refining: Whether what is under way, or comes next, only halves the steps around the best learning rate.
    """

    series: Series
    rank: int
    hasty: bool = False
    control: _Progress | None = None
    follows: bool | None = None
    lead: Lead | None = None
    results: dict[RunSpec, RunResult] = field(default_factory=dict)
    outstanding: set[RunSpec] = field(default_factory=set)
    left_out: str | None = None
    complete: bool = False
    refining: bool = False

    def ready(self) -> tuple[RunSpec, ...]:
        """Runs that can be started now, given what is finished and what is under way."""
        if self.outstanding or self.left_out is not None:
            return ()
        series = self.series
        first, *others = series.seeds
        if not series.search:
            specs = series.runs(series.grid, series.seeds)
        else:
            found = self.found
            rates = self._next_rates(found)
            if rates is None:
                return ()
            self.refining = not rates or is_refinement(rates, found)
            specs = series.runs(rates, [first]) if rates else series.runs([best_rate(found)], others)
            hurried = series.hurried and bool(rates)
            self.lead = Lead.of(found.values()) if hurried else None
        wanted = tuple(spec for spec in specs if spec not in self.results)
        self.outstanding |= set(wanted)
        self.complete = not wanted
        return wanted

    @property
    def recipe(self) -> RunSpec:
        """What it has in common with its control."""
        return self.series.first.control("").attack

    @property
    def found(self) -> dict[float, RunResult]:
        """The runs of the first seed by learning rate."""
        first = self.series.seeds[0]
        return {spec.learning_rate: run for spec, run in self.results.items() if spec.seed == first}

    def _next_rates(self, found: Mapping[float, RunResult]) -> tuple[float, ...] | None:
        """The rates to run next, empty at the end; ``None`` while that hangs on the control.

        What trains as the control does at the control's best rate does so at every rate, and is not searched.
        """
        control = self.control
        if not self.series.hurried or control is None or control.left_out is not None or self.follows is False:
            return next_rates(self.series.grid, found)
        if not (control.complete or (self.hasty and control.refining)):
            return None
        best = best_rate(control.found)
        if best not in found:
            return (best,)
        self.follows = trains_as_control(found[best], control.found[best])
        return () if self.follows else next_rates(self.series.grid, found)

    @property
    def turn(self) -> tuple[bool, int]:
        """What comes first."""
        return self.hasty and self.refining, self.rank

    @property
    def remaining(self) -> int:
        """Runs that it will still make, about: how many a search takes is known on average only."""
        if self.complete or self.left_out is not None:
            return 0
        return max(len(self.outstanding), expected_runs(self.series) - len(self.results))

    def finish(self, spec: RunSpec, result: RunResult) -> None:
        self.outstanding.discard(spec)
        self.results[spec] = result

    def ordered(self) -> list[RunResult]:
        return sorted(self.results.values(), key=lambda run: (-run.spec.learning_rate, run.spec.seed))


def run_all(
    plan: Sequence[Series],
    execute: Execute,
    *,
    load: Callable[[RunSpec], RunResult | None],
    save: Callable[[RunResult], None],
    jobs: int = 1,
    order: Sequence[Series] = (),
    deadline: Deadline | None = None,
    on_progress: ProgressHook = lambda event: None,
) -> Outcome:
    """Run a plan to its end, or to a deadline.

    Args:
        plan: The series.
        execute: Runs one.
        load, save: The store.
        jobs: Runs at a time.
        order: The same series in the order in which they are run, one to its end before the next where one run is made
            at a time. Empty is the order of the plan.
        deadline: Says whether one more run may start. With one, every series gets to its best decade first; the steps
            around the best rates are halved after that.
        on_progress: Called as runs start, step and end; in this process.

    Raises:
        SpecDefError: A run cannot be made; those that are finished are in the store.
    """
    ranks = {id(series): rank for rank, series in enumerate(order or plan)}
    under_way = [_Progress(series, ranks[id(series)], deadline is not None) for series in plan]
    controls = {search.recipe: search for search in under_way if search.series.first.subject == "control"}
    for progress in under_way:
        if progress.series.first.subject == "model":
            progress.control = controls.get(progress.recipe)
    schedule = _Schedule(under_way, load, save, deadline, on_progress)
    for progress in under_way:
        schedule.enqueue(progress)
    with executor(execute, jobs, schedule.tell) as submit:
        while schedule.queue or schedule.running:
            schedule.start(submit, jobs)
            if schedule.running:
                done, _ = first_completed(schedule.running)
                for future in done:
                    schedule.take(future)
    return schedule.outcome()


@dataclass
class _Schedule:
    """What waits and what runs, of all series.

    Attributes:
        queue: Runs that may start now.
        running: Runs that have been started, by what will hold their results.
        began: When a run was started.
        finished: How many runs have results, those that were in the store among them.
    """

    under_way: list[_Progress]
    load: Callable[[RunSpec], RunResult | None]
    save: Callable[[RunResult], None]
    deadline: Deadline | None
    on_progress: ProgressHook
    queue: list[tuple[_Progress, RunSpec]] = field(default_factory=list)
    running: dict[Future[RunResult], tuple[_Progress, RunSpec]] = field(default_factory=dict)
    began: dict[RunSpec, float] = field(default_factory=dict)
    finished: int = 0

    def tell(self, kind: EventKind, spec: RunSpec, result: RunResult | None = None, **changes: Any) -> None:
        """Pass on that a run started, stepped or ended."""
        total = self.finished + sum(progress.remaining for progress in self.under_way)
        label = spec.label if spec.is_edit else f"{spec.label} · η={spec.learning_rate:g}"
        steps = len(spec.variant.strengths) if spec.is_edit else spec.steps
        event = ProgressEvent(kind, self.finished, total, label, 0, steps)
        if result is not None:
            steps = result.train[-1].step if result.train else 0
            event = replace(event, step=steps, loss=result.final, diverged=result.divergence is not None)
        self.on_progress(replace(event, **changes))

    def enqueue(self, progress: _Progress) -> None:
        """All that this series can run now; what is in the store counts as finished at once."""
        while specs := progress.ready():
            for spec in specs:
                kept = self.load(spec)
                if kept is None or (kept.shortened and progress.lead is None):
                    self.queue.append((progress, spec))
                else:
                    self._finish(progress, spec, kept, "run-reused")

    def start(self, submit: Submit, jobs: int) -> None:
        """Start what comes first, as long as there is a place for it and time."""
        while self.queue and len(self.running) < jobs:
            if self.deadline is not None and not self.deadline.allows():
                self.queue.clear()
                return
            progress, spec = self.queue.pop(min(range(len(self.queue)), key=lambda place: self.queue[place][0].turn))
            if progress.left_out is not None:
                progress.outstanding.discard(spec)
                continue
            self.began[spec] = time.monotonic()
            self.running[submit(spec, progress.lead)] = (progress, spec)

    def take(self, future: Future[RunResult]) -> None:
        """Keep what a run found, and enqueue what its series, and those that it is the control of, can run now."""
        progress, spec = self.running.pop(future)
        try:
            result = future.result()
        except NotApplicable as error:
            if not progress.series.optional:
                raise
            progress.left_out = error.problem
            progress.outstanding.discard(spec)
        else:
            self.save(result)
            if self.deadline is not None:
                self.deadline.finished(time.monotonic() - self.began[spec])
            self._finish(progress, spec, result, "run-end")
        self.enqueue(progress)
        for other in self.under_way:
            if other.control is progress:
                self.enqueue(other)

    def _finish(self, progress: _Progress, spec: RunSpec, result: RunResult, kind: EventKind) -> None:
        progress.finish(spec, result)
        self.finished += 1
        self.tell(kind, spec, result)

    def outcome(self) -> Outcome:
        lacking = [progress for progress in self.under_way if not progress.complete and progress.left_out is None]
        lacking.sort(key=lambda progress: progress.rank)
        begun = [progress for progress in lacking if progress.results]
        return Outcome(
            runs=tuple(run for progress in self.under_way for run in progress.ordered()),
            left_out=tuple(
                (progress.series.first.label, progress.left_out)
                for progress in self.under_way
                if progress.left_out is not None
            ),
            not_reached=tuple(progress.series.first.label for progress in lacking if not progress.results),
            cut_short=tuple(progress.series.first.label for progress in begun if not progress.refining),
            coarse=tuple(progress.series.first.label for progress in begun if progress.refining),
        )
