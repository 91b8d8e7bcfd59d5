"""Progress of an attack's runs, as a bar or as lines of a log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from specdef_cli.cli.output import Bar

if TYPE_CHECKING:
    from specdef_cli.attack.trainer import ProgressEvent


class RunProgress:
    """Shows the events of an attack. Runs that were there already count neither as done nor as to be done: the time
    that remains follows from steps that were really made.
    """

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._reused = 0
        self._began: dict[str, float] = {}

    def show(self, event: ProgressEvent) -> None:
        """Show one event."""
        self._reused += event.kind == "run-reused"
        done, total = event.done - self._reused, event.runs - self._reused
        if event.kind == "run-start":
            self._began[event.label] = time.monotonic()
            self._bar.reach(done, total, f"{event.label}  loading, evaluation at step 0")
        elif event.kind == "step":
            self._bar.reach(done + 0.99 * event.step / event.steps, total, f"{event.label}  {event.step}/{event.steps}")
        else:
            self._bar.reach(done, total, event.label)
            self._bar.log(f"{event.done} of about {event.runs}: {event.label}: {self._outcome(event)}")

    def _outcome(self, event: ProgressEvent) -> str:
        if event.kind == "run-reused":
            return "found finished"
        seconds = time.monotonic() - self._began.pop(event.label, time.monotonic())
        loss = f"held-out loss {event.loss:.3f}" if event.loss is not None else "no finite loss"
        if event.loss is None and not event.diverged:  # nothing was trained
            return f"edited, {seconds:.0f} s"
        return f"{loss}{', diverged' if event.diverged else ''}, {seconds:.0f} s"
