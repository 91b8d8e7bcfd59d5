"""Tiny checkpoints, made once for all tests. Their builders and the command runner are modules next to this one."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading

# Before huggingface_hub is imported, which reads both once. Nobody's own cache is written to: two suites on a machine
# harden the same tiny models, and what one remembers of their bases would be read by the other.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="specdef-tests-")
# A shell that runs the suite in the background has its Ctrl-C ignored, and so would every process that tests interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from specdef_cli.process import collect_less_garbage
from tests.commands import dying

collect_less_garbage()  # as every command does

# A busy machine is no failure.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A change is judged by examples that do not change; on a developer's machine they are new every time.
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from family, dtype and shard size to a directory that must not be changed."""
    from tests.tiny_models import write_model

    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def build(family: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "50GB") -> Path:
        name = f"{family}-{str(dtype).removeprefix('torch.')}-{max_shard_size}"
        if name not in made:
            made[name] = write_model(family, root / name, dtype=dtype, max_shard_size=max_shard_size)
        return made[name]

    return build


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Path:
    """A tiny Llama in float32, in one file."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty paragraphs of forty words that the tiny models know."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{(7 * row + word) % 90 + 3}" for word in range(40)) for row in range(40)))
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directory of a case of ``tiny_families.CASES``, written when it is first asked for; not to be written to."""
    from tests.tiny_families import write_case

    root = tmp_path_factory.mktemp("families")

    class Written(dict[str, Path]):
        def __missing__(self, case: str) -> Path:
            self[case] = write_case(case, root / case)
            return self[case]

    return Written()


die = pytest.fixture(scope="session")(dying)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """The directory that the output would lie in, and that must stay empty."""
    directory = tmp_path / "outside"
    directory.mkdir()
    return directory


@pytest.fixture
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For certificates that are not about the function: starting a process takes most of their time."""
    from specdef_cli.certify import function

    monkeypatch.setattr(function, "_fresh_process", lambda *_: (True, ""))
