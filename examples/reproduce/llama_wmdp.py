"""The tables of llama_wmdp.sh, as Markdown: accuracy at release, after the paper's attack, and after each attack of the
sweep at its best learning rate, which is the one with the lowest held-out loss.

    python examples/reproduce/llama_wmdp.py --released released.json --paper REPORT … --sweep REPORT …
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setting import markdown

Report = dict[str, Any]
Run = dict[str, Any]


def released_table(released: dict[str, dict[str, float]]) -> str:
    """One row for each checkpoint, one column for each task."""
    tasks = list(dict.fromkeys(task for found in released.values() for task in found))
    rows = [
        (Path(model).name, *(f"{found[task]:.3f}" if task in found else "–" for task in tasks))
        for model, found in released.items()
    ]
    return markdown(("at release", *tasks), rows)


def runs_table(named: Iterable[tuple[str, Run]]) -> str:
    """One row for each run, under the name that it is given; a run of several reports stands there once.

    Losses in nats. The retained loss is how much that on retained text grew: +0.69 is twice the perplexity.
    """
    runs = {run["id"]: (name, run) for name, run in named}
    tasks = list(dict.fromkeys(task for _, run in runs.values() for task in run["accuracy"]))
    header = ("attack", "η", "held-out loss", "best step", "retained loss", *tasks, "outcome")
    rows = [
        (
            name,
            f"{run['spec']['learning_rate']:.0e}",
            f"{_number(run['loss']['start'])} → {_number(run['loss']['best'])}",
            "–" if run["best_step"] is None else str(run["best_step"]),
            _retained(run),
            *(_number(run["accuracy"].get(task)) for task in tasks),
            _outcome(run),
        )
        for name, run in runs.values()
    ]
    return markdown(header, rows)


def all_runs(reports: Iterable[Report]) -> list[tuple[str, Run]]:
    """Every run, the originals' first."""
    named = [(_name(run, report), run) for report in reports for run in report["runs"]]
    return sorted(named, key=lambda each: each[1]["spec"]["subject"] != "control")


def best_runs(reports: Iterable[Report]) -> list[tuple[str, Run]]:
    """The first run of every attack at its best rate, the originals' first."""
    return [
        (name, run)
        for report in reports
        for name, run in all_runs([report])
        for attack in report["attacks"]
        if run["id"] in attack["runs"] and run["spec"]["learning_rate"] == attack["best"]["learning_rate"]
    ]


def _name(run: Run, report: Report) -> str:
    """The run's label with the model's name in it: ``factors: undone first (collapsed), full fine-tuning``."""
    name = "original" if run["spec"]["subject"] == "control" else Path(report["model"]["name"]).name
    return f"{name}: {run['label'].removeprefix('base: ')}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _retained(run: Run) -> str:
    """By how much the loss on retained text grew until the run's end."""
    losses = [point["retained"] for point in run["curve"]["evaluations"]]
    if not losses or losses[0] is None:
        return "–"
    if losses[-1] is None:
        return "not finite"
    return f"{losses[-1] - losses[0]:+.2f}"


def _outcome(run: Run) -> str:
    divergence = run["divergence"]
    return run["outcome"] if divergence is None else f"diverged at step {divergence['step']}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--released", type=Path, required=True, help="what accuracy.py wrote")
    parser.add_argument("--paper", type=Path, nargs="+", required=True, help="report.json at the paper's rates")
    parser.add_argument("--sweep", type=Path, nargs="+", required=True, help="report.json of the sweep")
    arguments = parser.parse_args()
    released, paper, sweep = (
        [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for paths in ([arguments.released], arguments.paper, arguments.sweep)
    )
    print(f"## Accuracy at release\n\n{released_table(released[0])}\n")
    print("Below, losses are in nats; the retained loss is by how much that on retained text grew over the run, where")
    print("+0.69 is twice the perplexity. Accuracy is measured after the last step.\n")
    print(f"## Full fine-tuning at the paper's learning rates\n\n{runs_table(all_runs(paper))}\n")
    print(f"## The sweep, each attack at its best learning rate\n\n{runs_table(best_runs(sweep))}")


if __name__ == "__main__":
    main()
