"""``python -m tests.faults``: what was tried against each kind of fault, and what held, as a Markdown table.

The table is counted from the outcomes of the tests named here, run now; nothing in it is written by hand. A test that
was skipped was not tried. ``--all`` adds the slow ones.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

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
    """A pytest plugin that counts what became of every test, by fault."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.held: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests of the table.

        Raises:
            pytest.UsageError: A name in the table is no test's: the row would be empty, or claim too little.
        """
        names = [item.nodeid.removeprefix("tests/") for item in items]
        for beginning in (beginning for beginnings in FAULTS.values() for beginning in beginnings):
            if not any(name.startswith(beginning) for name in names):
                raise pytest.UsageError(f"no test's name begins with {beginning}")
        named = [item for item in items if faults_of(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(named)])
        items[:] = named

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test that ran, or that failed before it could."""
        if report.when == "call" or report.failed:
            for fault in faults_of(report.nodeid):
                self.tried[fault] += not report.skipped
                self.held[fault] += report.passed


def faults_of(identifier: str) -> list[str]:
    """The faults that a test tries."""
    name = identifier.removeprefix("tests/")
    return [fault for fault, beginnings in FAULTS.items() if name.startswith(beginnings)]


def table(outcomes: Outcomes) -> str:
    """The table in Markdown."""
    rows = [f"| {fault} | {outcomes.tried[fault]} | {outcomes.held[fault]} |" for fault in FAULTS]
    return "\n".join(["| fault | tests | held |", "|---|---|---|", *rows])


def main(arguments: list[str]) -> int:
    """Run the tests and print the table; pytest's own exit code."""
    outcomes = Outcomes()
    files = sorted({beginning.split("::")[0] for beginnings in FAULTS.values() for beginning in beginnings})
    selected = [] if "--all" in arguments else ["-m", "not slow"]
    code = pytest.main([*(str(TESTS / file) for file in files), *selected, "-q"], plugins=[outcomes])
    print(table(outcomes))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
