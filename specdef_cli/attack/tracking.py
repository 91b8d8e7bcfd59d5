"""Runs in an experiment tracker (TensorBoard, wandb, Trackio, MLflow), through the Trainer's own callbacks."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef_cli.attack.spec import RunSpec
from specdef_cli.errors import SpecDefError

if TYPE_CHECKING:
    from transformers import TrainerCallback

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


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


def require_trackers(trackers: tuple[str, ...]) -> None:
    """Refuse trackers that are unknown or not installed."""
    for tracker in trackers:
        if tracker not in TRACKERS:
            raise SpecDefError(f"--report-to {tracker!r} is unknown", f"Choose one of: {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(tracker) is None:
            raise SpecDefError(
                f"--report-to {tracker} needs {tracker}, which is not installed", f"pip install {tracker}"
            )
