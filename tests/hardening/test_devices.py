"""The devices that compute, and that they are ready before threads share them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from accelerate import PartialState

from specdef_cli.hardening.execute import compute_devices


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
