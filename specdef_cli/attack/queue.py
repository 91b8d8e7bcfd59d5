"""Runs series after series, or several at a time in processes of their own, here or on a cluster.

A series decides by its results which learning rate comes next (:mod:`specdef_cli.attack.search`), so a finished run may
add to the queue. What is found finished in the store is never run again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from specdef_cli.attack.cluster import Cluster
from specdef_cli.attack.one_run import RunResult, RunSpec
from specdef_cli.attack.plan import Series, expected_runs, in_order
from specdef_cli.attack.search import Lead, best_rate, is_refinement, next_rates, trains_as_control
from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.trainer import EventKind, ProgressEvent, ProgressHook
from specdef_cli.process import LONGEST_SLEEP, start_worker


class Deadline:
    """Decides whether one more run fits into a time, from the mean duration of those so far."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._spent: list[float] = []

    def finished(self, seconds: float) -> None:
        self._spent.append(seconds)

    def allows(self) -> bool:
        """Whether another run may start; the first always may."""
        return not self._spent or time.monotonic() + sum(self._spent) / len(self._spent) <= self._end


@dataclass(frozen=True)
class Outcome:
    runs: tuple[RunResult, ...]  # every run, by series in the order of the plan, largest learning rate first
    left_out: tuple[tuple[str, str], ...]  # series that the model has nothing for: the label, and why
    not_reached: tuple[str, ...] = ()
    """Labels of series that the time did not suffice for, in the order in which they would have come."""
    cut_short: tuple[str, ...] = ()
    """Labels of series that were begun, and whose best learning rate may be another decade's."""
    coarse: tuple[str, ...] = ()  # labels of series whose best learning rate is known to a decade only


@dataclass(eq=False)
class _Search:
    series: Series
    rank: int  # its place in the order in which runs are made
    hasty: bool  # whether every attack gets to its best decade before any is searched more closely
    control: _Search | None = None  # the series of its control; None for a control's own
    follows: bool | None = None
    """Whether it trained as its control at the control's best rate, and so does at every rate."""
    lead: Lead | None = None
    """What was known when the runs under way were chosen. What one of them finds does not change what becomes of the
    others: the same runs are made with every number of jobs."""
    results: dict[RunSpec, RunResult] = field(default_factory=dict)
    outstanding: tuple[RunSpec, ...] = ()
    left_out: str | None = None
    complete: bool = False
    refining: bool = False  # whether what is under way only halves the steps around the best learning rate

    @property
    def found(self) -> dict[float, RunResult]:
        """The runs of the first seed by learning rate."""
        first = self.series.seeds[0]
        return {spec.learning_rate: run for spec, run in self.results.items() if spec.seed == first}

    def ready(self) -> tuple[RunSpec, ...]:
        """Runs that can start now, given what is finished and what is under way."""
        if self.outstanding or self.left_out is not None:
            return ()
        series, found = self.series, self.found
        specs = series.runs(series.grid, series.seeds)
        if series.search:
            rates = self._next_rates(found)
            if rates is None:
                return ()
            self.refining = not rates or is_refinement(rates, found)
            self.lead = Lead.of(found.values()) if series.hurried and rates else None
            specs = series.runs(rates or [best_rate(found)], series.seeds[:1] if rates else series.seeds[1:])
        self.outstanding = tuple(spec for spec in specs if spec not in self.results)
        self.complete = not self.outstanding
        return self.outstanding

    def _next_rates(self, found: dict[float, RunResult]) -> tuple[float, ...] | None:
        """The rates to run next; empty at the end, ``None`` while they depend on the control."""
        control = self.control
        if not self.series.hurried or control is None or control.left_out is not None or self.follows is False:
            return next_rates(self.series.grid, found)
        if not (control.complete or (self.hasty and control.refining)):
            return None
        # In haste the best decade comes first, also where all of the control is there already: a plan that goes on
        # makes the runs of one that was never cut off.
        decades = {rate: run for rate, run in control.found.items() if f"{rate:.0e}".startswith("1e")}
        for best in (best_rate((self.hasty and decades) or control.found), best_rate(control.found)):
            if best not in found:
                return (best,)
            self.follows = trains_as_control(found[best], control.found[best])
            if not self.follows:
                return next_rates(self.series.grid, found)
        return ()

    def ended(self, spec: RunSpec, result: RunResult | None = None) -> None:
        """Take a run off the list, with its result if it has one."""
        self.outstanding = tuple(other for other in self.outstanding if other != spec)
        if result is not None:
            self.results[spec] = result

    @property
    def remaining(self) -> int:
        """The number of runs still to make; an average for a search."""
        if self.complete or self.left_out is not None:
            return 0
        return max(len(self.outstanding), expected_runs(self.series) - len(self.results))


def run_all(
    plan: Sequence[Series],
    execute: Execute,
    *,
    load: Callable[[RunSpec], RunResult | None],
    save: Callable[[RunResult], None],
    jobs: int = 1,
    cluster: Cluster | None = None,
    deadline: Deadline | None = None,
    on_progress: ProgressHook = lambda event: None,
) -> Outcome:
    """Run a plan to its end, or to a deadline, likely bypasses first; what is finished is saved whatever happens."""
    ranks = {id(series): rank for rank, series in enumerate(in_order(plan))}
    searches = [_Search(series, ranks[id(series)], deadline is not None) for series in plan]
    controls = {each.series.first.recipe: each for each in searches if each.series.first.subject == "control"}
    for search in searches:
        if search.series.first.subject == "model":
            search.control = controls.get(search.series.first.recipe)
    queue = _Queue(searches, load, save, deadline, on_progress)
    for search in searches:
        queue.add(search)
    with executor(execute, jobs, queue.tell, cluster) as submit:
        while queue.waiting or queue.running:
            places = jobs if cluster is None else cluster.places()  # its workers come and go
            queue.start(submit, places)
            for future in wait(queue.running, LONGEST_SLEEP, FIRST_COMPLETED).done:
                queue.take(future)
    return _outcome(searches)


@dataclass
class _Queue:
    """Waiting and running runs of all series; ``finished`` also counts results found in the store."""

    searches: list[_Search]
    load: Callable[[RunSpec], RunResult | None]
    save: Callable[[RunResult], None]
    deadline: Deadline | None
    on_progress: ProgressHook
    waiting: list[tuple[_Search, RunSpec]] = field(default_factory=list)
    running: dict[Future[RunResult], tuple[_Search, RunSpec, float]] = field(default_factory=dict)
    finished: int = 0

    def tell(self, kind: EventKind, spec: RunSpec, result: RunResult | None = None, **changes: Any) -> None:
        """Pass on that a run started, stepped or ended."""
        total = self.finished + sum(search.remaining for search in self.searches)
        label = spec.label if spec.is_edit else f"{spec.label} · η={spec.learning_rate:g}"
        steps = len(spec.variant.strengths) if spec.is_edit else spec.steps
        event = ProgressEvent(kind, self.finished, total, label, 0, steps)
        if result is not None:
            steps = result.train[-1].step if result.train else 0
            event = replace(event, step=steps, loss=result.final, diverged=result.divergence is not None)
        self.on_progress(replace(event, **changes))

    def add(self, search: _Search) -> None:
        """Queue what a series can run now; what the store has counts as finished at once."""
        while specs := search.ready():
            for spec in specs:
                kept = self.load(spec)
                if kept is None or (kept.shortened and search.lead is None):
                    self.waiting.append((search, spec))
                else:
                    self._finish(search, spec, kept, "run-reused")

    def start(self, submit: Submit, jobs: int) -> None:
        """Start waiting runs while there is a place and time."""
        while self.waiting and len(self.running) < jobs:
            if self.deadline is not None and not self.deadline.allows():
                self.waiting.clear()
                return
            search, spec = min(self.waiting, key=lambda entry: (entry[0].hasty and entry[0].refining, entry[0].rank))
            self.waiting.remove((search, spec))
            if search.left_out is not None:
                search.ended(spec)
                continue
            began = time.monotonic()
            self.running[submit(spec, search.lead)] = (search, spec, began)

    def take(self, future: Future[RunResult]) -> None:
        """Save a result, and queue what its series, and those it is the control of, can run now."""
        search, spec, began = self.running.pop(future)
        try:
            result = future.result()
        except NotApplicable as error:
            if not search.series.optional:
                raise
            search.left_out = error.problem
            search.ended(spec)
        else:
            self.save(result)
            if self.deadline is not None:
                self.deadline.finished(time.monotonic() - began)
            self._finish(search, spec, result, "run-end")
        for other in self.searches:
            if other is search or other.control is search:
                self.add(other)

    def _finish(self, search: _Search, spec: RunSpec, result: RunResult, kind: EventKind) -> None:
        search.ended(spec, result)
        self.finished += 1
        self.tell(kind, spec, result)


def _outcome(searches: Sequence[_Search]) -> Outcome:
    lacking = [search for search in searches if not search.complete and search.left_out is None]
    labels: dict[str, list[str]] = {"not_reached": [], "cut_short": [], "coarse": []}
    for search in sorted(lacking, key=lambda search: search.rank):
        state = "not_reached" if not search.results else "coarse" if search.refining else "cut_short"
        labels[state].append(search.series.first.label)
    return Outcome(
        runs=tuple(
            run
            for search in searches
            for run in sorted(search.results.values(), key=lambda run: (-run.spec.learning_rate, run.spec.seed))
        ),
        left_out=tuple((each.series.first.label, each.left_out) for each in searches if each.left_out is not None),
        **{state: tuple(names) for state, names in labels.items()},
    )


Execute = Callable[[RunSpec, Callable[[int, float | None], None], Lead | None], RunResult]
"""(what to run, a hook for each step, what its search knows) → the result. Picklable, where runs get
processes of their own.
"""

Submit = Callable[[RunSpec, Lead | None], Future[RunResult]]
"""(what to run, what its search knows) → what will hold the result."""


@contextmanager
def executor(
    execute: Execute, jobs: int, tell: Callable[..., None], cluster: Cluster | None = None
) -> Iterator[Submit]:
    """A way to start a run: here and now for one job (also under ``accelerate launch``), else in a pool.

    Args:
        tell: Called with ``"run-start"`` or ``"step"``, the run, and what there is to say of the step.
    """
    pool = cluster.pool() if cluster else _local_pool(jobs) if jobs > 1 else nullcontext(partial(_run_here, tell))
    with pool as start:

        def submit(spec: RunSpec, lead: Lead | None) -> Future[RunResult]:
            tell("run-start", spec)
            return start(execute, spec, lead)

        yield submit


def _run_here(tell: Callable[..., None], execute: Execute, spec: RunSpec, lead: Lead | None) -> Future[RunResult]:
    future: Future[RunResult] = Future()
    try:
        future.set_result(execute(spec, lambda step, loss: tell("step", spec, step=step, loss=loss), lead))
    except Exception as error:
        future.set_exception(error)
    return future


@contextmanager
def _local_pool(jobs: int) -> Iterator[Callable[[Execute, RunSpec, Lead | None], Future[RunResult]]]:
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for place in range(jobs):
        places.put(place)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker, initargs=(_CLAIM, places, jobs))
    try:
        yield lambda execute, spec, lead: pool.submit(execute, spec, _no_step, lead)
    except BaseException:
        # After Ctrl-C the user should not have to wait for runs that may take hours.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_CLAIM = f"{__name__}:_claim_device"


def _claim_device(places: multiprocessing.SimpleQueue[int], jobs: int) -> None:
    """Give a worker its share of the machine: a GPU of its own where there are several, and its part of the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = places.get()
    import torch

    devices = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count)
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs if hasattr(os, "sched_getaffinity") else 1))


def visible_devices(named: str, count: Callable[[], int]) -> tuple[str, ...]:
    """The GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them: numbers, UUIDs or parts of one (MIG).

    Args:
        count: Asks the driver. CUDA leaves out everything from the first name on that it does not know. Of MIG
            devices a process sees one, and to ask would fix which.
    """
    names = [name.strip() for name in named.split(",") if name.strip()]
    if any(name.startswith("MIG") for name in names):
        return tuple(names)
    found = count()
    return tuple(names[:found]) if names else tuple(map(str, range(found)))


def _end_with_parent() -> None:
    """A pool's worker waits for work forever; where its parent was killed, it would keep its memory and its GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _no_step(step: int, loss: float | None) -> None:
    """Steps of a run in another process are not shown."""
