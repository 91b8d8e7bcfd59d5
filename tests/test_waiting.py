"""Ctrl-C ends a wait, whichever thread the system gives the signal to."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future

import pytest

from specdef_cli.process import first_completed

_WAITING = """
import signal, threading, time
from concurrent.futures import Future
from specdef_cli.process import first_completed

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores

def interrupt():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    threading.Event().wait()

threading.Thread(target=interrupt, daemon=True).start()
try:
    first_completed({Future()})
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals to threads")
def test_a_signal_that_another_thread_gets_ends_the_wait() -> None:
    done = subprocess.run([sys.executable, "-c", _WAITING], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "interrupted\n"


def test_what_is_done_and_what_is_not() -> None:
    ready: Future[int] = Future()
    open_ones: tuple[Future[int], Future[int]] = (Future(), Future())
    ready.set_result(1)
    assert first_completed([ready, *open_ones]) == ({ready}, set(open_ones))
    assert first_completed(list[Future[int]]()) == (set(), set())
