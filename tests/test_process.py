"""The process of a command: other libraries' noise, a wait that Ctrl-C ends, and garbage that is freed."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from specdef_cli.attack import queue
from specdef_cli.model.loading import new_objects_only
from specdef_cli.process import NOISY, first_completed, quiet_engines, start_worker
from tests.commands import environment, run_program


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """Loggers as they are found, and as they are left."""
    before = {name: logging.getLogger(name).level for name in NOISY}
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_it_is_heard_where_it_was_asked_for() -> None:
    quiet_engines({"SPECDEF_DEBUG": "1"})
    assert all(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in NOISY)


def test_it_is_silent_otherwise_and_nothing_else_is() -> None:
    others = [logging.getLogger(name) for name in ("transformers", "py.warnings")]
    before = [logger.level for logger in others]
    quiet_engines({})
    assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in (*NOISY, "torchao.kernel"))
    assert all(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in NOISY)
    assert [logger.level for logger in others] == before


def test_a_worker_is_quiet_before_anything_heavy_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that the pool starts is resolved in the worker; the module of that function imports torch."""
    monkeypatch.delenv("SPECDEF_DEBUG", raising=False)
    seen = []
    monkeypatch.setattr(
        queue, "_claim_device", lambda *got: seen.append((got, logging.getLogger("torchao").level)), raising=True
    )
    start_worker(queue._CLAIM, "places", 2)
    assert seen == [(("places", 2), logging.ERROR)]


def test_importing_the_package_changes_nothing_of_the_process() -> None:
    code = (
        "import gc, json, logging, os, sys, warnings\n"
        "def state(): return [list(warnings.filters), dict(os.environ), gc.get_threshold(),"
        f" [logging.getLogger(name).level for name in {NOISY!r}], sys.excepthook is sys.__excepthook__]\n"
        "before = state()\n"
        "import specdef_cli, specdef_cli.process, specdef_cli.attack\n"
        "import specdef_cli.attack.options, specdef_cli.cli.attack, specdef_cli.__main__\n"
        "assert state() == before\n"
        "print(json.dumps(dict.fromkeys({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules))))"
    )
    assert run_program("-c", code, env=environment()) == {}


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
    print('{"interrupted": true}')
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals to threads")
def test_a_signal_that_another_thread_gets_ends_the_wait() -> None:
    assert run_program("-c", _WAITING, env=environment()) == {"interrupted": True}


def test_what_is_done_and_what_is_not() -> None:
    ready: Future[int] = Future()
    open_ones: tuple[Future[int], Future[int]] = (Future(), Future())
    ready.set_result(1)
    assert first_completed([ready, *open_ones]) == ({ready}, set(open_ones))
    assert first_completed(list[Future[int]]()) == (set(), set())


class _Circle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.self = self


def test_garbage_from_inside_is_freed_and_older_objects_only_afterwards() -> None:
    circle = _Circle()
    older = weakref.ref(circle)
    with new_objects_only():
        assert not any(found is circle for found in gc.get_objects())
        del circle
        inside = weakref.ref(_Circle())
        gc.collect()
        assert inside() is None
        assert older() is not None
    gc.collect()
    assert older() is None
