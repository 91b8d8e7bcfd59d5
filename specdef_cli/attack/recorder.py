"""The Trainer's callback that writes a run down and ends it once it diverged.

It reads values that the Trainer has computed for its own log and computes none, so that a recorded run costs what the
same run costs by hand.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from specdef_cli.attack.run_result import (
    BATCHES_BEYOND_TWICE,
    BEYOND_TWICE,
    DEAD,
    DIVERGENCE_FACTOR,
    Divergence,
    DivergenceReason,
    EvalPoint,
    TrainPoint,
)
from specdef_cli.attack.search import Lead, is_hopeless
from specdef_cli.attack.spec import RunSpec

BATCHES = 2
"""So many batches in a row beyond twice the first one's loss are no chance."""

ATTACK, RETAINED = "attack", "retained"
"""What the data sets that are evaluated are called in the Trainer's metrics."""

CONSTANT = "constant"
"""The metric that says whether all outputs were the same."""


EventKind = Literal["run-start", "step", "run-end", "run-reused"]


@dataclass(frozen=True)
class ProgressEvent:
    """Something happened that a progress bar wants to show."""

    kind: EventKind
    done: int
    runs: int  # known of so far; a search adds to them
    label: str
    step: int
    steps: int
    loss: float | None = None  # the training loss of the last step, where there is a finite one
    diverged: bool = False  # only at the end of a run


ProgressHook = Callable[[ProgressEvent], None]


class Recorder(TrainerCallback):
    """Curves of one run.

    Args:
        lead: What the search that this run belongs to has found: the run ends once it cannot get further, and is not
            evaluated at step 0 where that is known. ``None`` for a run that is made in full.
    """

    def __init__(
        self,
        on_step: Callable[[int, float | None], None],
        stop_at_divergence: bool = True,
        lead: Lead | None = None,
    ) -> None:
        self.train: list[TrainPoint] = []
        self.evaluations: list[EvalPoint] = [lead.start] if lead is not None and lead.start is not None else []
        self.divergence: Divergence | None = None
        self.stopped: int | None = None
        self._lead = lead
        self._stop_at_divergence = stop_at_divergence
        self._ended = False
        self._on_step = on_step
        self._began = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or self._ended:
            return
        loss, grad_norm = finite(logs["loss"]), finite(logs.get("grad_norm"))
        self.train.append(TrainPoint(state.global_step, loss, grad_norm))
        if loss is None:
            self._diverged(state, control, "training loss is not finite")
        elif self._lead is not None and self._batches_beyond_twice():
            self._diverged(state, control, BATCHES_BEYOND_TWICE)
        self._on_step(state.global_step, loss)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not metrics:
            return
        if f"eval_{RETAINED}_loss" in metrics:
            # The Trainer evaluates the data sets one after the other, the attack's first.
            retained = finite(metrics[f"eval_{RETAINED}_loss"])
            self.evaluations[-1] = replace(self.evaluations[-1], retained=retained)
            return
        if self._ended:
            return
        dead = bool(metrics.get(f"eval_{ATTACK}_{CONSTANT}")) and state.global_step > 0
        # What says the same of every input has learned nothing, also where its loss is below a bad start.
        loss = None if dead else finite(metrics[f"eval_{ATTACK}_loss"])
        self.evaluations.append(EvalPoint(state.global_step, loss, time.perf_counter() - self._began))
        start = self.evaluations[0].loss
        if loss is None:
            self._diverged(state, control, DEAD if dead else "held-out loss is not finite")
        elif start is not None and loss > DIVERGENCE_FACTOR * start:
            self._diverged(state, control, BEYOND_TWICE)
        elif self._lead is not None and is_hopeless(self.evaluations, state.max_steps, self._lead.progress):
            self.stopped = state.global_step
            self._end(control)

    def _batches_beyond_twice(self) -> bool:
        first, last = self.train[0].loss, self.train[-BATCHES:]
        return first is not None and all(
            point.loss is not None and point.loss > DIVERGENCE_FACTOR * first for point in last
        )

    def _diverged(self, state: TrainerState, control: TrainerControl, reason: DivergenceReason) -> None:
        ends = self._stop_at_divergence or reason != BEYOND_TWICE
        if self.divergence is None or ends:
            self.divergence = Divergence(state.global_step, reason)
        if ends:
            self._end(control)

    def _end(self, control: TrainerControl) -> None:
        self._ended = True
        control.should_training_stop = True
        control.should_evaluate = False


def finite(value: float | None) -> float | None:
    """``value`` as a float, or ``None`` if it is NaN, infinite or missing."""
    return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Tracking:
    """Where runs are reported to as they go; ``directory`` has TensorBoard's files, a directory for each run."""

    trackers: tuple[str, ...] = ()
    directory: Path = Path("logs")

    def arguments(self, spec: RunSpec) -> dict[str, Any]:
        """What ``TrainingArguments`` are given."""
        name = f"{spec.label} · η={spec.learning_rate:g} · seed {spec.seed}" if self.trackers else None
        return {"report_to": [other for other in self.trackers if other != "tensorboard"] or "none", "run_name": name}

    def callbacks(self, spec: RunSpec) -> list[TrainerCallback]:
        """TensorBoard's, which by itself would write where the Trainer does, and that is a scratch directory."""
        if "tensorboard" not in self.trackers:
            return []
        from transformers.integrations import TensorBoardCallback

        callback = TensorBoardCallback()
        callback.logging_dir = str(self.directory / spec.run_id)
        return [callback]

    def finish(self) -> None:
        """End the run in trackers that keep one open for the whole process; the next run would be added to it."""
        for tracker in self.trackers:
            getattr(sys.modules.get(tracker), "finish", lambda: None)()


NOWHERE = Tracking()
