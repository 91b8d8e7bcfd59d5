"""What ``specdef attack`` shows besides its report: the tables of ``--list``, the plan, and the progress of runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.options import load_suite, suite_names
from specdef_cli.attack.table import Factor
from specdef_cli.attack.trainings import TRAININGS
from specdef_cli.attack.variants import VARIANTS
from specdef_cli.cli.output import Bar
from specdef_cli.option import in_words

if TYPE_CHECKING:
    from specdef_cli import AttackReport, Forecast
    from specdef_cli.attack.trainer import ProgressEvent


Listing = dict[str, list[dict[str, str]]]
"""Tables of the values that options accept: spelling and usual number (``name``), and meaning (``help``)."""

_HEADINGS = {
    "variants": "--variant: what is done to the model first",
    "trainings": "--training: what is trained: NAME, NAME:SIZE or NAME@NAMES",
    "optimizers": "--optimizer",
    "suites": "--suite",
}


def attack_listing() -> Listing:
    """Everything that ``attack`` can run."""

    def entry(name: str, number: Factor | None, help: str) -> dict[str, str]:
        return {"name": name if number is None else f"{name}:{number.default:g}", "help": help}

    return {
        "variants": [entry(row.name, row.factor, row.help) for row in VARIANTS.values()],
        "trainings": [entry(row.name, row.size, row.help) for row in TRAININGS.values()],
        "optimizers": [entry(row.name, None, row.help) for row in OPTIMIZERS.values()],
        "suites": [entry(name, None, load_suite(name).description) for name in suite_names()],
    }


def listing_tables(listing: Listing) -> Iterable[Table | str]:
    """The listing as the terminal shows it."""
    for key, entries in listing.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for entry in entries:
            table.add_row(Text(f"  {entry['name']}"), Text(entry["help"]))
        yield _HEADINGS[key]
        yield table
        yield ""


def plan_screen(forecast: Forecast) -> Group:
    """One screen: what is trained on what, the runs in their order, and how long they take."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("model", forecast.model),
        ("control", forecast.control),
        ("data", forecast.data),
        ("a run", forecast.budget),
    ):
        facts.add_row(name, Text(value))
    rows = Table.grid(padding=(0, 2))
    for _ in range(4):
        rows.add_column(overflow="fold")
    for attack in forecast.attacks:
        runs = f"{'about ' if attack.search else ''}{attack.runs} {'run' if attack.runs == 1 else 'runs'}"
        runs += f", {attack.finished} done" if attack.finished else ""
        first, last = (f"{rate:g}" for rate in (attack.learning_rates[0], attack.learning_rates[-1]))
        rates = f"{'from ' if attack.search else ''}η = {first}" + ("" if first == last else f" to {last}")
        rows.add_row(Text(attack.label), runs, rates, in_words(attack.seconds))
    said = [f"{forecast.runs} {'run' if forecast.runs == '1' else 'runs'}, about {in_words(forecast.seconds)} here."]
    if forecast.time_limit is not None:
        said.append(f"Stops after {in_words(forecast.time_limit)}; the report lists what was not reached.")
    return Group(facts, Padding(rows, (1, 0), expand=False), Text("\n".join([*said, *remarks(forecast)])))


def remarks(about: Forecast | AttackReport) -> list[str]:
    """What was assumed, and what a reader should know."""
    return [f"assumed: {text}" for text in about.assumed] + [f"note: {text}" for text in about.notes]


class RunProgress:
    """Shows the events of an attack. Runs that were there already count neither as done nor as to be done: the time
    that remains follows from steps that were really made.
    """

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._reused = 0
        self._began: dict[str, float] = {}

    def show(self, event: ProgressEvent) -> None:
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
