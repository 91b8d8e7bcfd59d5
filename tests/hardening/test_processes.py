"""Two processes on the CPU: shards do not depend on how many there are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from specdef_cli.checkpoint.manifest import read_manifest
from tests.commands import TWO_PROCESSES, environment, snapshot, succeed

pytestmark = pytest.mark.slow


SCRIPT = """
import sys
from specdef_cli.cli.app import main
from specdef_cli.model.loading import process_state
print(f"process {process_state().process_index} of {process_state().num_processes}", file=sys.stderr)
main()
"""


def launched(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    home.mkdir(exist_ok=True)
    script = home / "specdef.py"
    script.write_text(SCRIPT)
    process = subprocess.run(
        [*TWO_PROCESSES, str(script), *arguments],
        env=environment(HF_HOME=str(home)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "process 0 of 2" in process.stderr, process.stderr[-3000:]
    assert "process 1 of 2" in process.stderr
    return process


@pytest.mark.parametrize("method", ["factors", "fold"])
def test_two_processes_write_the_same_bytes(method: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--method", method, "--max-shard-size", "20KB", "--quiet"]
    options += ["--top-k", "4"] if method == "factors" else []
    base = tiny_model("llama")
    process = launched("harden", str(base), "--out", str(tmp_path / "two"), *options, home=tmp_path / "home")
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("parameters added") == 1  # one process speaks
    succeed("harden", base, "--out", tmp_path / "one", *options)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert len(read_manifest(tmp_path / "two").shards) > 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["one", "two"]


def test_a_refusal_ends_both_processes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--method", "factors", "--top-k", "33"]
    process = launched("harden", str(tiny_model("llama")), "--out", str(tmp_path / "out"), *options, home=tmp_path)
    assert process.returncode != 0
    assert "top-k 33 is more than the rank" in process.stderr
    assert not (tmp_path / "out").exists()
