"""A Dask cluster whose workers make the runs of an attack (``--dask``), one at a time each."""

from __future__ import annotations

import importlib.metadata
import logging
import pickle
import platform
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from specdef_cli import __version__
from specdef_cli.attack.one_run import RunResult, RunSpec
from specdef_cli.attack.search import Lead
from specdef_cli.errors import SpecDefError, first_line, require_extra

CONNECT_WITHIN = 5  # seconds
WITHOUT_WORKERS = 600
"""Seconds that an attack waits for a worker when all are gone: nannies and batch systems start them again."""


def surroundings() -> dict[str, str]:
    """Versions of packages, and the ``device``: what the figures of a run depend on besides the model."""
    import torch

    from specdef_cli.model.loading import process_state

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else process_state().device.type
    return {"specdef-cli": __version__, **versions, "device": device}


def _look(paths: Sequence[Path]) -> tuple[dict[str, str], list[Path]]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {**surroundings(), "Python": python}, [path for path in paths if not path.is_dir()]


@dataclass
class Cluster:
    """A connection to a scheduler."""

    address: str
    client: Any
    paths: tuple[Path, ...] = ()  # directories that every worker has to have
    devices: dict[str, str] = field(default_factory=dict)  # of each worker that was looked at
    _had_workers: float = field(default_factory=time.monotonic)

    def places(self) -> int:
        """Count the runs that it makes at once, one a worker; a worker that differs from this machine is refused."""
        try:
            workers = self.client.nthreads()
        except OSError as error:
            raise self._lost() from error
        if workers:
            self._had_workers = time.monotonic()
        elif time.monotonic() - self._had_workers > WITHOUT_WORKERS or not self.devices:
            raise SpecDefError(
                f"the Dask scheduler {self.address} has no worker",
                f"Run `dask worker {self.address} --nthreads 1` where runs are to be made. Finished runs are kept.",
            )
        self._require_alike({name: threads for name, threads in workers.items() if name not in self.devices})
        return max(1, len(workers))

    def require(self, *paths: Path) -> None:
        """Refuse workers that do not see these directories."""
        self.paths = paths
        self.devices.clear()
        self.places()

    def _require_alike(self, workers: dict[str, int]) -> None:
        for worker, threads in workers.items():
            if threads > 1:
                raise SpecDefError(
                    f"worker {worker} takes {threads} tasks at once, and a run needs its process for itself",
                    f"Start it with `dask worker {self.address} --nthreads 1`.",
                )
        found = self.client.run(_look, self.paths, workers=list(workers), on_error="return") if workers else {}
        here = _look(())[0] if found else {}
        for worker, there in found.items():
            if isinstance(there, Exception):
                if worker not in self.client.nthreads():  # it has just died
                    continue
                raise SpecDefError(
                    f"worker {worker} cannot make runs: {first_line(there)}",
                    f"Install specdef-cli[attack] {__version__} there.",
                )
            versions, lacking = there
            for name, version in versions.items():
                if name != "device" and version != here.get(name):
                    raise SpecDefError(
                        f"worker {worker} has {name} {version}, and this machine {here.get(name)}",
                        "Install the same version on both.",
                    )
            if lacking:
                raise SpecDefError(
                    f"worker {worker} has no directory {lacking[0]}",
                    "Put it there under the same path, or give a Hub id.",
                )
            self.devices[worker] = versions["device"]

    def _lost(self) -> SpecDefError:
        return SpecDefError(
            f"the Dask scheduler {self.address} does not answer any more",
            "Start it again, and give the same command: finished runs are kept.",
        )

    @contextmanager
    def pool(self) -> Iterator[Callable[..., Future[RunResult]]]:
        """Yield a function that starts a run; Dask repeats a run whose worker dies."""
        import cloudpickle
        from distributed.scheduler import KilledWorker

        executor = self.client.get_executor(pure=False)

        def submit(execute: Callable[..., RunResult], spec: RunSpec, lead: Lead | None) -> Future[RunResult]:
            key = f"{spec.label} η={spec.learning_rate:g}-{uuid.uuid4().hex}"
            run = cloudpickle.dumps(partial(execute, spec, _stop_if_unwanted, lead))
            # Dask sends a function that has no name by value, and a scheduler can read it that has dask alone.
            return executor.submit(lambda: pickle.loads(run)(), key=key)

        try:
            yield submit
        except KilledWorker as error:
            raise SpecDefError(
                f"{error.allowed_failures + 1} workers died of {error.task.rpartition('-')[0]}, the last "
                f"{error.last_worker.address}",
                "Read that worker's log; if memory did not suffice, give --gradient-accumulation or a smaller "
                "--batch-size.",
            ) from error
        except CancelledError as error:
            raise self._lost() from error
        finally:
            with suppress(OSError):
                executor.shutdown(wait=False)


def _stop_if_unwanted(step: int, loss: float | None) -> None:
    """End a run that nobody waits for any more: Dask cannot stop a thread."""
    from distributed import get_worker
    from distributed.worker import thread_state

    task = get_worker().state.tasks.get(thread_state.key)
    if task is None or task.state == "cancelled":
        raise CancelledError


@contextmanager
def connected(address: str | None) -> Iterator[Cluster | None]:
    """The cluster of ``--dask``; without it, none."""
    if address is None:
        yield None
        return
    require_extra("cluster", "runs on a Dask cluster")
    import dask
    from distributed import Client

    for name in ("distributed", "distributed.client"):  # what they say comes as an exception too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    dask.config.set({"distributed.comm.timeouts.connect": CONNECT_WITHIN})
    dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 GiB"})  # a run brings its data
    try:
        if not address.strip():  # Client would start a cluster here
            raise ValueError("it is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the versions that matter are compared later
            client = Client(address, set_as_default=False)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise SpecDefError(
            f"no Dask scheduler answers at --dask {address}: {first_line(error)}",
            "Start one with `dask scheduler`, and give the address that it prints, e.g. tcp://HOST:8786.",
        ) from error
    with client:
        cluster = Cluster(address, client)
        cluster.places()
        yield cluster
