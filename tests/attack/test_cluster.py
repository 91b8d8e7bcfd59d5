"""Runs on a Dask cluster of this machine. Its workers are processes without a nanny: one that is killed stays away."""

from __future__ import annotations

import _thread
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import pytest

from specdef_cli import AttackOptions, ProgressEvent, attack
from specdef_cli.attack.cluster import Cluster, connected
from specdef_cli.checkpoint.resolve import Resolved
from specdef_cli.errors import MissingExtraError, SpecDefError
from specdef_cli.model.opened import open_model
from tests.attack.conftest import small
from tests.commands import assert_refused, call_cli, environment, refusal

SOME_RUN: Any = SimpleNamespace(label="full fine-tuning", learning_rate=0.1)
Workers = Callable[..., list[subprocess.Popen[bytes]]]


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0") as cluster:
        yield cluster.scheduler


@pytest.fixture(scope="module")
def workers(scheduler: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """``(count)``: start as many workers as are missing of these, in a directory of their own, and return all."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(count: int, threads: int = 1) -> list[subprocess.Popen[bytes]]:
        begun[:] = [process for process in begun if process.poll() is None]
        begun.extend(
            subprocess.Popen(
                [sys.executable, "-m", "distributed.cli.dask_worker", scheduler.address, "--no-nanny",
                 "--nthreads", str(threads), "--no-dashboard"],
                cwd=tmp_path_factory.mktemp("worker"), env=environment(), stderr=subprocess.DEVNULL,
            )
            for _ in range(count - len(begun))
        )  # fmt: skip
        wait_until(lambda: len(scheduler.workers) == count)
        return begun

    yield begin
    for process in begun:
        process.kill()
        process.wait()


def wait_until(state: Callable[[], object], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not state():
        assert time.monotonic() < end
        time.sleep(0.01)


def busy(scheduler: Any) -> int:
    return sum(bool(worker.processing) for worker in list(scheduler.workers.values()))


def test_a_run_whose_worker_is_killed_is_made_again(
    hardened: Path, tmp_path: Path, scheduler: Any, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is given by a path that leads nowhere from the workers' directories."""
    monkeypatch.chdir(hardened.parent)
    here = attack(small(hardened.name, tmp_path / "here"))
    processes, events = workers(2), []

    def kill() -> None:
        wait_until(lambda: busy(scheduler) == 2)
        processes[0].kill()

    killing = threading.Thread(target=kill)

    def on_progress(event: ProgressEvent) -> None:
        events.append(event.kind)
        if len(events) == 1:
            killing.start()

    asked = small(hardened.name, tmp_path / "there", dask=scheduler.address)
    there = attack(asked, on_progress=on_progress)
    killing.join()
    assert len(scheduler.workers) == 1
    assert sorted(events) == ["run-end"] * 3 + ["run-start"] * 3
    assert [run.spec for run in there.runs] == [run.spec for run in here.runs]
    for one, other in zip(here.runs, there.runs, strict=True):
        assert [point.loss for point in one.evaluations] == pytest.approx([p.loss for p in other.evaluations], rel=1e-5)
    assert (there.device, there.versions, there.notes) == (here.device, here.versions, here.notes)
    assert len(list((tmp_path / "there" / "runs").iterdir())) == 3


def test_ctrl_c_ends_runs_at_their_next_step(hardened: Path, tmp_path: Path, scheduler: Any, workers: Workers) -> None:
    workers(1)
    client = distributed.Client(scheduler.address, set_as_default=False)

    def at_work() -> bool:
        return any(client.run(lambda dask_worker: len(dask_worker.active_threads)).values())

    def press() -> None:
        wait_until(at_work)
        _thread.interrupt_main()

    def on_progress(event: ProgressEvent) -> None:
        threading.Thread(target=press, daemon=True).start()

    endless = {"steps": 20_000, "batch_size": 1, "sequence_length": 8}  # 200 seconds
    with client:
        asked = small(hardened, tmp_path, dask=scheduler.address, retained="none", **endless)
        with pytest.raises(KeyboardInterrupt):
            attack(asked, on_progress=on_progress)
        wait_until(lambda: not at_work(), seconds=100)
    assert not list(scheduler.tasks)
    assert not list(tmp_path.glob("runs/*"))


def test_workers_that_differ_are_refused(
    scheduler: Any, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers(1)
    with connected(scheduler.address) as cluster:
        assert cluster is not None
        with pytest.raises(SpecDefError, match=f"worker tcp://.* has no directory {tmp_path / 'model'}"):
            cluster.require(tmp_path, tmp_path / "model")
    monkeypatch.setattr("specdef_cli.attack.cluster.__version__", "0.0.9")
    with pytest.raises(SpecDefError, match=r"worker tcp://.* has specdef-cli .*, and this machine 0\.0\.9"):
        connected(scheduler.address).__enter__()
    extra = workers(2, threads=2)[-1]
    with refusal("takes 2 tasks at once", f"Start it with `dask worker {scheduler.address} --nthreads 1`."):
        connected(scheduler.address).__enter__()
    extra.kill()
    extra.wait()
    wait_until(lambda: len(scheduler.workers) == 1)


def test_a_run_that_kills_its_workers_is_named(
    scheduler: Any, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "allowed_failures", 1)
    workers(2)
    client = distributed.Client(scheduler.address, set_as_default=False)
    with client, pytest.raises(SpecDefError) as caught, Cluster(scheduler.address, client).pool() as submit:
        submit(lambda *given: os._exit(1), SOME_RUN, None).result()
    assert caught.value.problem.startswith("2 workers died of full fine-tuning η=0.1, the last tcp://")
    with pytest.raises(SpecDefError, match="has no worker"):
        connected(scheduler.address).__enter__()


def test_a_scheduler_that_goes_is_told() -> None:
    scheduler = distributed.LocalCluster(n_workers=0, dashboard_address=":0")
    client = distributed.Client(scheduler.scheduler_address, set_as_default=False)
    cluster = Cluster("tcp://gone:1", client)

    def outlive() -> None:
        with cluster.pool() as submit:
            future = submit(lambda *given: 1, SOME_RUN, None)
            scheduler.close()
            future.result(timeout=60)

    for asked in (outlive, cluster.places):
        with pytest.raises(SpecDefError, match="the Dask scheduler tcp://gone:1 does not answer any more"):
            asked()
    client.close()


def test_no_scheduler(hardened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdef_cli.attack.cluster.CONNECT_WITHIN", 1)
    began = time.monotonic()
    result = call_cli("attack", hardened, "--out", tmp_path / "out", "--dask", "tcp://127.0.0.1:1")
    assert_refused(result, "no Dask scheduler answers at --dask tcp://127.0.0.1:1", "`dask scheduler`", empty=tmp_path)
    assert time.monotonic() - began < 60
    for address in ("", "ftp://host:1"):
        with pytest.raises(SpecDefError, match="no Dask scheduler answers"):
            connected(address).__enter__()


def test_what_dask_cannot_be_given_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SpecDefError, match="as many runs at a time as it has workers"):
        AttackOptions(model="m", out=tmp_path, dask="tcp://a:1", jobs=2)
    monkeypatch.setattr("specdef_cli.attack.run.process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(SpecDefError, match="--dask tcp://a:1 starts runs in other processes, and this is one of 2"):
        attack(AttackOptions(model="m", out=tmp_path, dask="tcp://a:1"))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match="runs on a Dask cluster need distributed"):
        connected("tcp://a:1").__enter__()


def test_a_worker_fetches_a_model_of_the_hub(hardened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(hardened)
    found = Resolved(tmp_path / "elsewhere", "org/name@main", "main", "0123abc")
    asked: list[Any] = []

    def resolve(*given: Any, **more: Any) -> Resolved:
        asked.append((*given, more["revision"]))
        return dataclasses.replace(found, directory=hardened)

    monkeypatch.setattr("specdef_cli.model.opened.resolve", resolve)
    there = dataclasses.replace(opened, found=found).here()
    assert asked == [("org/name", "0123abc")]
    assert there.directory == there.checkpoint.directory == hardened
