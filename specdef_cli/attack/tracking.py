"""Runs in an experiment tracker (TensorBoard, wandb, Trackio, MLflow), through the Trainer's own callbacks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdef_cli.attack.spec import RunSpec
from specdef_cli.errors import SpecDefError

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")

_TENSORBOARD_DIRECTORY = "TENSORBOARD_LOGGING_DIR"
"""Where the Trainer's callback takes its directory from."""


@dataclass(frozen=True)
class Tracking:
    """Where runs are reported to as they go.

    Attributes:
        trackers: Names of :data:`TRACKERS`; none by default.
        directory: Where TensorBoard's files go, a directory for each run.
    """

    trackers: tuple[str, ...] = ()
    directory: Path = Path("logs")

    def arguments(self, spec: RunSpec) -> dict[str, Any]:
        """What ``TrainingArguments`` are given."""
        name = f"{spec.label} · η={spec.learning_rate:g} · seed {spec.seed}"
        return {"report_to": list(self.trackers) or "none", "run_name": name if self.trackers else None}

    @contextmanager
    def run(self, spec: RunSpec) -> Iterator[None]:
        """While this lasts, what the Trainer reports is of this run, and afterwards of no run."""
        before = os.environ.get(_TENSORBOARD_DIRECTORY)
        if "tensorboard" in self.trackers:
            os.environ[_TENSORBOARD_DIRECTORY] = str(self.directory / spec.run_id)
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(_TENSORBOARD_DIRECTORY, None)
            else:
                os.environ[_TENSORBOARD_DIRECTORY] = before
            for tracker in self.trackers:
                # Those with a `finish` keep a run open for the whole process; the next one would be added to it.
                finish = getattr(sys.modules.get(tracker), "finish", None)
                if finish is not None:
                    finish()


NOWHERE = Tracking()


def require_trackers(trackers: tuple[str, ...]) -> None:
    """Refuse trackers that are unknown or not installed.

    Raises:
        SpecDefError: naming the first.
    """
    for tracker in trackers:
        if tracker not in TRACKERS:
            raise SpecDefError(f"--report-to {tracker!r} is unknown", f"Choose one of: {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(tracker) is None:
            raise SpecDefError(
                f"--report-to {tracker} needs {tracker}, which is not installed", f"pip install {tracker}"
            )
