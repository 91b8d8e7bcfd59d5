"""Checks of what a command names that need no heavy import: a wrong path is told in a moment."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from specdef_cli.errors import SpecDefError, WrongUsage

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text", ".md", ".parquet", ".arrow")
REPORT_NAME = "report.json"
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes that may stand behind these; `datasets` unpacks them."""

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def require_data(dataset: str | None) -> None:
    """Refuse a data set that is a path to nothing."""
    if dataset is None:
        return
    path = Path(dataset).expanduser()
    like_a_file = path.suffix.lower() in (*FILE_SUFFIXES, *COMPRESSIONS)
    if not path.exists() and (like_a_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset)):
        raise SpecDefError(f"no data file {path} found", "Check the path, or give a Hub id.")


def require_report(path: Path) -> Path:
    """The file of an attack report.

    Args:
        path: A ``report.json``, or the directory that it is in.
    """
    file = path / REPORT_NAME if path.is_dir() else path
    if not file.is_file():
        raise SpecDefError(f"no attack report {file} found", "Give the report.json that `specdef attack` wrote.")
    return file


def require_trackers(trackers: tuple[str, ...]) -> None:
    """Refuse trackers that are unknown or not installed."""
    for tracker in trackers:
        if tracker not in TRACKERS:
            raise WrongUsage(f"--report-to {tracker!r} is unknown", f"Choose one of: {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(tracker) is None:
            raise SpecDefError(
                f"--report-to {tracker} needs {tracker}, which is not installed", f"pip install {tracker}"
            )
