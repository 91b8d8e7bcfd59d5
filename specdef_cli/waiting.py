"""Waiting for threads and processes in a way that Ctrl-C ends."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

LONGEST_SLEEP = 0.5
"""Seconds. The system may hand a signal to any thread, and Python acts on it in the main thread, once that wakes up."""

Result = TypeVar("Result")


def first_completed(futures: Iterable[Future[Result]]) -> tuple[set[Future[Result]], set[Future[Result]]]:
    """Return once one of some futures is done: those that are, and the others.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, at most :data:`LONGEST_SLEEP` ago.
    """
    waited_for = set(futures)
    while True:
        done, others = wait(waited_for, timeout=LONGEST_SLEEP, return_when=FIRST_COMPLETED)
        if done or not others:
            return done, others
