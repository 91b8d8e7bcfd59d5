"""Run the command line, as a process of its own or in this one, and check what a refusal leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import specdef_cli
from specdef_cli.errors import SpecDefError

REPOSITORY = Path(specdef_cli.__file__).parents[1]
TINY_LLAMA = REPOSITORY / "examples/tiny_llama/model"
# `accelerate launch --cpu --num_processes 2` starts one process only; torchrun starts two.
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@dataclass(frozen=True)
class Result:
    """What a command said, and its exit code."""

    code: int
    stdout: str
    stderr: str


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: offline, one thread, the package on the path."""
    # A terminal of 80 columns would wrap what tests look for; without colours, no escape sequences stand in between.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SPECDEF_"))}
    return {
        **inherited,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "CUDA_VISIBLE_DEVICES": "",
        "NO_COLOR": "1",
        "COLUMNS": "300",
        **changes,
    }


def command(*arguments: str | Path) -> list[str]:
    """``specdef ARGUMENTS`` as a list for subprocess."""
    return [sys.executable, "-m", "specdef_cli", *map(str, arguments)]


def run_cli(*arguments: str | Path, cwd: Path | None = None, **changes: str) -> Result:
    """Run ``python -m specdef_cli`` in a process of its own; keywords in capitals set environment variables."""
    return _run(command(*arguments), environment(**changes), cwd)


def _run(arguments: Sequence[str | Path], env: Mapping[str, str], cwd: Path | None = None, given: str = "") -> Result:
    done = subprocess.run(arguments, env=env, cwd=cwd, input=given, capture_output=True, text=True, timeout=500)
    return Result(done.returncode, done.stdout, done.stderr)


def run_two_processes(*arguments: str | Path, home: Path, **changes: str) -> Result:
    """``specdef ARGUMENTS`` in two processes that know of each other; a script of its own is put into ``home``."""
    script = home / "specdef.py"
    script.write_text(_LAUNCHED)
    result = _run([*TWO_PROCESSES, script, *arguments], environment(**{"HF_HOME": str(home), **changes}))
    for number in (0, 1):
        assert f"process {number} of 2" in result.stderr, result.stderr[-3000:]
    return result


_LAUNCHED = """
import sys
from specdef_cli.cli.app import main
from specdef_cli.model.loading import process_state
print(f"process {process_state().process_index} of {process_state().num_processes}", file=sys.stderr)
main()
"""


def run_program(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None, given: str = ""
) -> dict[str, Any]:
    """Run a Python program on this input; it must succeed, and the JSON that it prints last is returned."""
    result = _run([sys.executable, *arguments], env, cwd, given)
    assert result.code == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def run_light(*lines: Sequence[str], cwd: Path | None = None) -> list[tuple[int, str, set[str]]]:
    """Exit code, stderr and imported packages of several commands, each a fork of one process that imported nothing."""
    done = _run([sys.executable, "-c", _FORKS, json.dumps(lines)], environment(), cwd)
    assert done.code == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(lines)
    return [(code, said, set(modules)) for code, said, modules in found]


_FORKS = """
import contextlib, io, json, os, runpy, sys
import specdef_cli.cli.app  # as every command does
for line in json.loads(sys.argv[1]):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    sys.argv, code, said, shown = ["specdef", *line], 0, io.StringIO(), sys.stdout
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            runpy.run_module("specdef_cli", run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
    modules = sorted({name.split(".")[0] for name in sys.modules})
    print(json.dumps([code, said.getvalue(), modules]), file=shown, flush=True)
    os._exit(0)
"""


def run_main(*arguments: str | Path, width: int = 300) -> int:
    """Run the same ``main`` in this process, which has imported torch already, and return its exit code."""
    from specdef_cli.cli.app import main

    typed = ["specdef", *map(str, arguments)]
    with patch.object(sys, "argv", typed), patch.dict(os.environ, {"COLUMNS": str(width)}):
        try:
            main()
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def call_cli(*arguments: str | Path, width: int = 300) -> Result:
    """``run_main``, and what was said; a traceback shows up in ``stderr``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_main(*arguments, width=width)
    return Result(code, out.getvalue(), err.getvalue())


def succeed(*arguments: str | Path) -> Result:
    """Run it like ``call_cli``; it must end well."""
    result = call_cli(*arguments)
    assert result.code == 0, (arguments[0], result.stderr)
    return result


Die = Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]


def dying() -> Iterator[Die]:
    """Has runs die, and says how each ended; the process that they are forked from imports everything once."""
    program = REPOSITORY / "tests" / "hardening" / "kill_points.py"
    process = subprocess.Popen(
        [sys.executable, program], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        print(json.dumps(cases), file=stdin, flush=True)
        return json.loads(stdout.readline())

    with process:
        yield run
        stdin.close()


def death(arguments: Sequence[str], out: Path, target: str | None, call: int, number: int) -> dict[str, Any]:
    """A run for ``Die``: a command that gets a signal before the ``call``-th call of ``target``."""
    return {"arguments": [*arguments, str(out)], "target": target, "call": call, "signal": number, "delay": None}


@contextlib.contextmanager
def refusal(*words: str) -> Iterator[None]:
    """A ``SpecDefError`` of one line and a hint, which name these words between them."""
    with pytest.raises(SpecDefError) as raised:
        yield
    assert "\n" not in raised.value.problem
    assert raised.value.hint
    for word in words:
        assert word in str(raised.value), (word, str(raised.value))


def assert_refused(result: Result, *words: str, empty: Path | None = None, code: int = 1) -> None:
    """One line of what is wrong and one hint, which name these words; no traceback, and nothing left in ``empty``.

    The exit code is 2 where no file and nothing on the Hub could make the command line right.
    """
    assert "Traceback" not in result.stderr, result.stderr
    assert result.code == code, (result.code, result.stdout, result.stderr)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.stderr
    assert result.stderr.rstrip().splitlines()[-2:] == lines, result.stderr
    for word in words:
        assert word in "\n".join(lines), (word, lines)
    if empty is not None:
        assert sorted(path.name for path in empty.iterdir()) == []


def snapshot(directory: Path) -> Mapping[str, str]:
    """sha256 of every file in a directory, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
