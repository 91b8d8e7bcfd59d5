"""Runs of the command line that die, forked from one process that has imported everything: ``python kill_points.py``.

Every line of stdin is a JSON list of runs, ``{"arguments": [...], "target": "module.function" or null, "call": n,
"signal": s, "delay": seconds or null}``. A run gets the signal just before the n-th call of the target, or after the
delay. On stdout goes a line with a JSON list of their wait statuses and what they wrote to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from typing import Any

import torch

import specdef_cli.hardening.run
import specdef_cli.hardening.verify  # noqa: F401
from tests.commands import run_main

torch.set_num_threads(1)


def strike(target: str, call: int, number: int) -> None:
    """Have this process send itself a signal before the ``call``-th call of ``target``."""
    module_name, _, name = target.rpartition(".")
    module = importlib.import_module(module_name)
    function, lock, count = getattr(module, name), threading.Lock(), 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        with lock:
            count += 1
            if count == call:
                os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    setattr(module, name, counted)


def run(case: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stderr.fileno(), 2)
            os.dup2(stderr.fileno(), 1)
            code = 99
            try:
                if case["target"]:
                    strike(case["target"], case["call"], case["signal"])
                code = run_main(*case["arguments"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        if case["delay"] is not None:
            time.sleep(case["delay"])
            os.kill(child, case["signal"])
        _, status = os.waitpid(child, 0)
        stderr.seek(0)
        return {
            "killed": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "said": stderr.read().decode(),
        }


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        cases = json.loads(line)
        for case in cases:
            if case["target"]:
                importlib.import_module(case["target"].rpartition(".")[0])  # here, and not again in every fork
        print(json.dumps([run(case) for case in cases]), flush=True)
