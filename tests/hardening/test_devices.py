"""The devices that compute: ready before threads share them, no tensor left on the CPU, the results the CPU's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.hardening.execute import compute_devices
from tests.commands import REPOSITORY, environment, run_program
from tests.hardening.on_another_device import HARDENED, NUMERICAL


def test_solvers_are_loaded_on_every_accelerator_before_threads_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that are not there: a first use by two threads at once fails in torch."""
    used: list[tuple[torch.device, bool]] = []

    def eye(size: int, *, device: torch.device) -> torch.device:
        return device

    def qr(where: Any) -> None:
        used.append((where, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "eye", eye)
    monkeypatch.setattr(torch.linalg, "qr", qr)
    devices = compute_devices(None, PartialState())
    assert devices == (torch.device("cuda", 0), torch.device("cuda", 1))
    assert used == [(device, True) for device in devices]


def test_nothing_is_loaded_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: pytest.fail("the CPU needs no loading"))
    assert compute_devices("cpu", PartialState()) == (torch.device("cpu"),)


PROGRAM = Path(__file__).with_name("on_another_device.py")


@pytest.fixture(scope="module")
def distances() -> dict[str, float]:
    return run_program(PROGRAM, REPOSITORY / "examples/tiny_llama/model", env=environment())


@pytest.mark.parametrize("name", [*NUMERICAL, *HARDENED, *(f"optimizer {name}" for name in OPTIMIZERS)])
def test_another_device_computes_what_the_cpu_computes(name: str, distances: dict[str, float]) -> None:
    assert distances[name] == 0
