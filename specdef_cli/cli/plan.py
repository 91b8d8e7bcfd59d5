"""The plan of an attack as the terminal shows it, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

    from specdef_cli.attack import Forecast


def plan_screen(forecast: Forecast) -> Group:
    """One screen: what is trained on what, the runs in their order, and how long they take."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from specdef_cli.parse import in_words

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
    said += [f"assumed: {text}" for text in forecast.assumed] + [f"note: {text}" for text in forecast.notes]
    return Group(facts, Padding(rows, (1, 0), expand=False), Text("\n".join(said)))
