"""Runs series after series, or several runs at a time, each in a process of its own.

A series decides by its results which learning rate comes next (:mod:`specdef_cli.attack.search`), so there is always a
queue of what may run now, and a finished run may add to it. What is found finished in the store is never run again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from specdef_cli.attack.cost import Deadline, expected_runs
from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.plan import Series
from specdef_cli.attack.prospects import Lead, trains_as_control
from specdef_cli.attack.recorder import ProgressEvent, ProgressHook
from specdef_cli.attack.run_result import RunResult
from specdef_cli.attack.search import best_rate, is_refinement, next_rates
from specdef_cli.attack.spec import RunSpec
from specdef_cli.waiting import first_completed

Execute = Callable[[RunSpec, Callable[[int, float | None], None], Lead | None], RunResult]
"""(what to run, a hook for each step, what its search knows) → the result. Picklable, where runs get
processes of their own.
"""


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
    finished = 0

    def total() -> int:
        return finished + sum(progress.remaining for progress in under_way)

    def event(kind: str, spec: RunSpec, result: RunResult | None = None, **changes: object) -> ProgressEvent:
        label = f"{spec.label} · η={spec.learning_rate:g}"
        made = ProgressEvent(kind, finished, total(), label, 0, spec.steps)  # type: ignore[arg-type]
        if result is not None:
            steps = result.train[-1].step if result.train else 0
            made = replace(made, step=steps, loss=result.final, diverged=result.divergence is not None)
        return replace(made, **changes)  # type: ignore[arg-type]

    def enqueue(progress: _Progress) -> None:
        """All that this series can run now; what is in the store counts as finished at once."""
        nonlocal finished
        while specs := progress.ready():
            for spec in specs:
                kept = load(spec)
                if kept is None or (kept.shortened and progress.lead is None):
                    queue.append((progress, spec))
                else:
                    progress.finish(spec, kept)
                    finished += 1
                    on_progress(event("run-reused", spec, kept))

    def advance(progress: _Progress) -> None:
        """What this series, and those that it is the control of, can run now."""
        enqueue(progress)
        for other in under_way:
            if other.control is progress:
                enqueue(other)

    queue: list[tuple[_Progress, RunSpec]] = []
    running: dict[Future[RunResult], tuple[_Progress, RunSpec]] = {}
    began: dict[RunSpec, float] = {}
    for progress in under_way:
        enqueue(progress)
    with _executor(execute, jobs, on_progress, event) as submit:
        while queue or running:
            while queue and len(running) < jobs:
                if deadline is not None and not deadline.allows():
                    queue.clear()
                    break
                progress, spec = queue.pop(min(range(len(queue)), key=lambda place: queue[place][0].turn))
                if progress.left_out is not None:
                    progress.outstanding.discard(spec)
                    continue
                began[spec] = time.monotonic()
                running[submit(spec, progress.lead)] = (progress, spec)
            if not running:
                continue
            done, _ = first_completed(running)
            for future in done:
                progress, spec = running.pop(future)
                try:
                    result = future.result()
                except NotApplicable as error:
                    if not progress.series.optional:
                        raise
                    progress.left_out = error.problem
                    progress.outstanding.discard(spec)
                    advance(progress)
                    continue
                save(result)
                if deadline is not None:
                    deadline.finished(time.monotonic() - began[spec])
                progress.finish(spec, result)
                finished += 1
                on_progress(event("run-end", spec, result))
                advance(progress)
    lacking = [progress for progress in under_way if not progress.complete and progress.left_out is None]
    lacking.sort(key=lambda progress: progress.rank)
    return Outcome(
        runs=tuple(run for progress in under_way for run in progress.ordered()),
        left_out=tuple(
            (progress.series.first.label, progress.left_out) for progress in under_way if progress.left_out is not None
        ),
        not_reached=tuple(progress.series.first.label for progress in lacking if not progress.results),
        cut_short=tuple(search.series.first.label for search in lacking if search.results and not search.refining),
        coarse=tuple(search.series.first.label for search in lacking if search.results and search.refining),
    )


@contextmanager
def _executor(
    execute: Execute, jobs: int, on_progress: ProgressHook, event: Callable[..., ProgressEvent]
) -> Iterator[Callable[[RunSpec, Lead | None], Future[RunResult]]]:
    """A way to start a run: here and now for one job (also under ``accelerate launch``), else in a pool."""
    if jobs == 1:

        def run_here(spec: RunSpec, lead: Lead | None) -> Future[RunResult]:
            on_progress(event("run-start", spec))
            future: Future[RunResult] = Future()
            try:
                future.set_result(
                    execute(spec, lambda step, loss: on_progress(event("step", spec, step=step, loss=loss)), lead)
                )
            except Exception as error:
                future.set_exception(error)
            return future

        yield run_here
        return
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for place in range(jobs):
        places.put(place)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_claim_device, initargs=(places, jobs))

    def run_there(spec: RunSpec, lead: Lead | None) -> Future[RunResult]:
        on_progress(event("run-start", spec))
        return pool.submit(execute, spec, _no_step, lead)

    try:
        yield run_there
    except BaseException:
        # After Ctrl-C the user should not have to wait for runs that may take hours.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _claim_device(places: multiprocessing.SimpleQueue[int], jobs: int) -> None:
    """Give a worker its share of the machine: a GPU of its own where there are several, and its part of the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = places.get()
    import torch

    devices = torch.cuda.device_count()
    if devices > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % devices)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs if hasattr(os, "sched_getaffinity") else 1))


def _end_with_parent() -> None:
    """A pool's worker waits for work forever; where its parent was killed, it would keep its memory and its GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _no_step(step: int, loss: float | None) -> None:
    """Steps of a run in another process are not shown."""
