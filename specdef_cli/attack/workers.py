"""How a run gets a process: this one, or one of several that share the machine and end with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager

from specdef_cli.attack.prospects import Lead
from specdef_cli.attack.run_result import RunResult
from specdef_cli.attack.spec import RunSpec

Execute = Callable[[RunSpec, Callable[[int, float | None], None], Lead | None], RunResult]
"""(what to run, a hook for each step, what its search knows) → the result. Picklable, where runs get
processes of their own.
"""

Submit = Callable[[RunSpec, Lead | None], Future[RunResult]]
"""(what to run, what its search knows) → what will hold the result."""


@contextmanager
def executor(execute: Execute, jobs: int, tell: Callable[..., None]) -> Iterator[Submit]:
    """A way to start a run: here and now for one job (also under ``accelerate launch``), else in a pool.

    Args:
        execute: Runs one.
        jobs: Runs at a time.
        tell: Called with ``"run-start"`` or ``"step"``, the run, and what there is to say of the step.
    """
    if jobs == 1:

        def run_here(spec: RunSpec, lead: Lead | None) -> Future[RunResult]:
            tell("run-start", spec)
            future: Future[RunResult] = Future()
            try:
                future.set_result(execute(spec, lambda step, loss: tell("step", spec, step=step, loss=loss), lead))
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
        tell("run-start", spec)
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

    devices = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count)
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs if hasattr(os, "sched_getaffinity") else 1))


def visible_devices(named: str, count: Callable[[], int]) -> tuple[str, ...]:
    """The GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them: numbers, UUIDs or parts of one (MIG).

    Args:
        named: The variable; empty where it is not set.
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
