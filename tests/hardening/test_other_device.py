"""No tensor is left on the CPU where another device computes, and the results are the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdef_cli.attack.optimizers import OPTIMIZERS
from tests.commands import REPOSITORY, environment, run_program
from tests.hardening.on_another_device import HARDENED, NUMERICAL

PROGRAM = Path(__file__).with_name("on_another_device.py")


@pytest.fixture(scope="module")
def distances() -> dict[str, float]:
    return run_program(PROGRAM, REPOSITORY / "examples/tiny_llama/model", env=environment())


@pytest.mark.parametrize("name", [*NUMERICAL, *HARDENED, *(f"optimizer {name}" for name in OPTIMIZERS)])
def test_another_device_computes_what_the_cpu_computes(name: str, distances: dict[str, float]) -> None:
    assert distances[name] == 0
