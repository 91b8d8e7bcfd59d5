"""Finished runs on disk: one JSON file each, named by what was run.

A run is a pure function of its specification, so its result can be kept under the specification's hash. To
resume, to add a learning rate or a variant costs the new runs only.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from specdef_cli.attack.run_result import RUN_RECORD, RunResult
from specdef_cli.attack.spec import RunSpec
from specdef_cli.checkpoint.durable import remove_unfinished, write_durably
from specdef_cli.errors import SpecDefError


class RunStore:
    """The directory of finished runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, spec: RunSpec) -> Path:
        """Where the result of ``spec`` is or will be."""
        return self.directory / f"{spec.run_id}.json"

    def load(self, spec: RunSpec) -> RunResult | None:
        """The finished run of ``spec``, or ``None``. A file of another specification or format counts as none."""
        try:
            result = RUN_RECORD.validate_python(json.loads(self.path(spec).read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, SpecDefError):
            return None
        # The names of trainings do not tell runs apart, so what was asked for may be called otherwise.
        return replace(result, spec=spec) if result.spec == spec else None

    def save(self, result: RunResult) -> None:
        """Keep a finished run; atomic, so that a crash leaves either nothing or all of it."""
        record = RUN_RECORD.dump_python(result, mode="json")
        write_durably(self.path(result.spec), json.dumps(record, indent=1, allow_nan=False))

    def remove_unfinished(self) -> None:
        """Remove the files that killed writes have left. The caller must be the only writer here."""
        remove_unfinished(self.directory)
