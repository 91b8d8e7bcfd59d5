"""What was tried against each kind of fault, and what held: a pytest plugin that ends a run with the README's table.

The table is counted from the outcomes of the tests named here, in the run that ends; nothing in it is written by hand.
A test that was skipped was not tried. ``make test-all`` and ``make faults`` use it.
"""

from __future__ import annotations

from collections import Counter

import pytest

# Fault → beginnings of the ids of the tests that try it, below tests/.
FAULTS: dict[str, tuple[str, ...]] = {
    "kill -9 in harden, then --resume": (
        "hardening/test_interruptions.py::test_killed",
        "hardening/test_interruptions.py::test_a_run_that_dies",
    ),
    "kill -9 in attack, then the same command": ("faults/test_attack_interruptions.py::test_killed",),
    "kill -9 and Ctrl-C with attack --jobs 2": ("faults/test_attack_interruptions.py::test_no_worker",),
    "Ctrl-C": (
        "hardening/test_interruptions.py::test_interrupted",
        "faults/test_attack_interruptions.py::test_interrupted",
    ),
    "disk full": (
        "faults/test_disk.py",
        "hardening/test_refusals.py::test_a_full_disk",
        "hardening/test_refusals.py::test_a_disk_too_small",
        "checkpoint/test_stream.py::test_a_full_disk",
    ),
    "read error in the middle": (
        "checkpoint/test_stream.py::test_a_read_error",
        "checkpoint/test_reader.py::test_a_disk_that_fails",
        "checkpoint/test_reader.py::test_a_file_that_shrinks",
    ),
    "two runs to one --out": (
        "checkpoint/test_output.py::test_a_second_run",
        "faults/test_attack_interruptions.py::test_a_second_attack",
        "faults/test_attack_interruptions.py::test_what_another",
    ),
    "broken checkpoint given to harden": (
        "hardening/test_refusals.py::test_input",
        "hardening/test_refusals.py::test_layers",
        "hardening/test_refusals.py::test_weights_of_low_rank",
        "checkpoint/test_reader.py::test_a_",
        "checkpoint/test_reader.py::test_an_",
        "checkpoint/test_reader.py::test_config_json",
    ),
    "bad option given to harden": ("hardening/test_refusals.py::test_options",),
    "broken checkpoint given to attack": (
        "faults/test_attack_inputs.py::test_a_broken_base",
        "faults/test_attack_inputs.py::test_a_damaged",
        "faults/test_attack_inputs.py::test_config_changes",
    ),
    "tokenizer that does not fit": ("faults/test_attack_inputs.py::test_a_tokenizer",),
    "data that cannot be trained on": (
        "faults/test_attack_inputs.py::test_data",
        "faults/test_attack_inputs.py::test_a_sequence",
    ),
    "broken input given to certify": (
        "faults/test_attack_inputs.py::test_a_report",
        "faults/test_attack_inputs.py::test_weights",
        "certify/test_certify.py::test_refusals",
    ),
    "broken input given to collapse or inspect": (
        "hardening/test_refusals.py::test_collapse",
        "hardening/test_refusals.py::test_inspect",
    ),
    "hardened already, output taken or in the input": (
        "hardening/test_refusals.py::test_what_is_hardened",
        "hardening/test_refusals.py::test_an_output",
        "faults/test_attack_inputs.py::test_an_output",
    ),
    "directories spoiled at random": (
        "hardening/test_fuzz.py",
        "faults/test_attack_inputs.py::test_no_traceback",
        "faults/test_attack_inputs.py::test_many_more",
        "faults/test_attack_inputs.py::test_spoiled",
    ),
    "pickles, and code of the checkpoint": (
        "faults/test_trust.py::test_no_pickle",
        "faults/test_trust.py::test_code",
        "checkpoint/test_reader.py::test_pickles",
    ),
    "tokens written down": ("faults/test_trust.py::test_no_token",),
    "markup in names": ("faults/test_trust.py::test_names", "report/test_report.py::test_files"),
    "links that leave the checkpoint": (
        "checkpoint/test_reader.py::test_a_link",
        "checkpoint/test_reader.py::test_a_snapshot",
    ),
    "Hub: gated, absent, broken off, offline": (
        "checkpoint/test_resolve.py",
        "checkpoint/test_arriving.py",
        "checkpoint/test_downloads.py",
    ),
}


class Outcomes:
    """Counts what becomes of every test, by fault, and prints the table at the end."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.held: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that ran, or that failed before it could."""
        if report.when == "call" or report.failed:
            for fault in faults_of(report.nodeid):
                self.tried[fault] += not report.skipped
                self.held[fault] += report.passed

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table in Markdown."""
        rows = [f"| {fault} | {self.tried[fault]} | {self.held[fault]} |" for fault in FAULTS]
        terminalreporter.write_line("\n".join(["", "| fault | tests | held |", "|---|---|---|", *rows, ""]))


def pytest_configure(config: pytest.Config) -> None:
    """Count from the start of the run."""
    config.pluginmanager.register(Outcomes())


def faults_of(identifier: str) -> list[str]:
    """The faults that a test tries."""
    name = identifier.removeprefix("tests/")
    return [fault for fault, beginnings in FAULTS.items() if name.startswith(beginnings)]
