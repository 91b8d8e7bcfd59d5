"""The plan of an attack as the terminal shows it, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

    from specdef_cli.attack import Forecast


def plan_screen(forecast: Forecast) -> Group:
    """One screen: what is trained on what, how often, how long it takes, and what would cost less."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from specdef_cli.durations import in_words

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
    for _ in range(3):
        rows.add_column(overflow="fold")
    verdict = [attack for attack in forecast.attacks if attack.first_verdict]
    for attack in forecast.attacks:
        if verdict and len(verdict) < len(forecast.attacks) and attack is forecast.attacks[len(verdict)]:
            rows.add_row(Text("  then", style="italic"), "", "")
        runs = f"{'about ' if attack.search else ''}{_runs(attack.runs)}"
        runs += f", {attack.finished} done" if attack.finished else ""
        rows.add_row(Text(attack.label), runs, "" if attack.seconds is None else in_words(attack.seconds))
    said = [_runs(forecast.runs)]
    if forecast.seconds is not None and forecast.verdict_seconds is not None:
        said[0] += f", about {in_words(forecast.seconds)} on this machine"
        said[0] += f"; a first verdict after about {in_words(forecast.verdict_seconds)}."
    if forecast.time_limit is not None:
        said.append(
            f"Stops after {in_words(forecast.time_limit)}; what is not reached by then is listed in the report."
        )
    if forecast.cheaper:
        said.append(f"Cheaper: {forecast.cheaper}")
    said += [f"assumed: {text}" for text in forecast.assumed] + [f"note: {text}" for text in forecast.notes]
    return Group(facts, Padding(rows, (1, 0), expand=False), Text("\n".join(said)))


def _runs(count: int | str) -> str:
    return f"{count} {'run' if str(count) == '1' else 'runs'}"
