"""What was tried against each kind of fault, and what held: a pytest plugin that ends a run with a table of it.

A test says itself where it counts: ``@pytest.mark.fault("disk full")``. Only what is given to a command is marked. A
test that tries many inputs in a loop says how many, ``inputs=12``; if it fails, none of them counts as held. What was
skipped was not tried. ``make test-all`` and ``make faults`` use this plugin.
"""

from __future__ import annotations

from collections import Counter
from typing import cast

import pytest

FAULTS = (
    "kill -9 in harden, then --resume",
    "kill -9 in attack, then the same command",
    "kill -9 and Ctrl-C with attack --jobs 2",
    "Ctrl-C",
    "disk full",
    "two runs to one --out",
    "broken checkpoint given to harden",
    "bad option given to harden",
    "broken checkpoint given to attack",
    "tokenizer that does not fit",
    "data that cannot be trained on",
    "models fed as they were trained",
    "broken input given to certify",
    "broken input given to collapse or inspect",
    "hardened already, output taken or in the input",
    "directories spoiled at random",
    "which files are the model, and what becomes of the others",
    "directories that are something else",
    "models that cannot be run on one kind of input",
    "loaded in another dtype than stored",
    "layers that cannot be replaced",
    "labels and tokenizers of other shapes",
    "hints, followed",
    "odd directories, configs and names, given to every command",
    "odd command lines",
    "what newer commands are given",
    "odd environments",
    "output that cannot be written or shown",
    "secrets",
    "pickles, and code of the checkpoint",
    "markup in names",
    "Hub: gated, absent, broken off, offline",
)
"""The rows, in the order in which they are printed."""

PROPERTY = "fault"


class Outcomes:
    """Counts what becomes of every test, by fault, and prints the table at the end."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.held: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that ran, or that failed before it could."""
        if report.when == "call" or report.failed:
            for name, value in report.user_properties:
                if name == PROPERTY and not report.skipped:
                    fault, inputs = cast("tuple[str, int]", value)
                    self.tried[fault] += inputs
                    self.held[fault] += inputs * report.passed

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table in Markdown."""
        rows = [(fault, self.tried[fault], self.held[fault]) for fault in FAULTS]
        rows.append(("together", self.tried.total(), self.held.total()))
        lines = [f"| {fault} | {tried} | {held} |" for fault, tried, held in rows]
        terminalreporter.write_line("\n".join(["", "| fault | inputs | held |", "|---|---|---|", *lines, ""]))


def pytest_configure(config: pytest.Config) -> None:
    """Count from the start of the run."""
    config.pluginmanager.register(Outcomes())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Write the mark of every test into its reports, where another process can read it.

    Raises:
        pytest.UsageError: A mark names a fault that is no row of the table.
    """
    for item in items:
        for mark in item.iter_markers("fault"):
            (fault,) = mark.args
            if fault not in FAULTS:
                raise pytest.UsageError(
                    f"{item.nodeid} is marked with {fault!r}, which is no row of tests/faults/table.py"
                )
            item.user_properties.append((PROPERTY, (fault, mark.kwargs.get("inputs", 1))))
