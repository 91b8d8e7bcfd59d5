"""Pictures for the README and the pages, from docs/tables and from reports: ``make pictures`` writes docs/assets/*.svg.

    python docs/generators/pictures.py [NAME=report.json …]

Each is drawn twice, for light and for dark pages. Nothing is measured here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from specdef_cli.report.document import ReportDocument, read_report

TABLES = Path(__file__).parents[1] / "tables"
ASSETS = Path(__file__).parents[1] / "assets"
METHODS = ("fold", "scale", "factors")
NAMES = {
    "LoRA default": "LoRA on queries and values",
    "the last half of the layers": "last half of the layers",
    "equalised, full fine-tuning": "channels equalised, full fine-tuning",
}
"""What people say, where a table's own name is another."""

UNDONE = re.compile(r"(undone first) \(\w+\)")
"""One row: each method has an attack of its own that undoes it."""


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of page: text, lines, one colour a method, one a curve, and one a verdict."""

    ink: str
    line: str
    methods: tuple[str, ...]
    curves: tuple[str, ...]
    verdicts: dict[str, str]


THEMES = {
    "light": Theme(
        "#1f2933", "#d5dbe1", ("#0b6e99", "#e08e0b", "#8a8f98"), ("#0b6e99", "#2a9d6f", "#c2412d"),
        {"kept": "#bfe3c6", "degraded": "#f6e3a1", "broken": "#f3b7ad", "refused": "#dfe3e8", "skipped": "#ffffff"},
    ),
    "dark": Theme(
        "#e4e7eb", "#3e4c59", ("#4cb8e0", "#f0b445", "#9aa5b1"), ("#4cb8e0", "#58c795", "#f0806c"),
        {"kept": "#235c33", "degraded": "#6b5a16", "broken": "#7a2e22", "refused": "#3e4c59", "skipped": "#1f2933"},
    ),
}  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    """The cells of the first Markdown table of a text, its head first."""
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    if table is None:
        raise ValueError("there is no table")
    lines = table[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def resistance_rows(text: str) -> tuple[list[str], list[tuple[str, list[str | None]]]]:
    """Methods, and the share of its control's progress that each attack still makes, the strongest attack first.

    Args:
        text: A table of ``specdef compare --markdown`` whose columns end in the methods' names.
    """
    head, *body = rows_of(text)
    columns = {method: head.index(name) for name in head for method in METHODS if name.endswith(f"-{method}")}
    methods = [method for method in METHODS if method in columns]
    found: dict[str, list[str | None]] = {}
    for row in body:
        name = UNDONE.sub(r"\1", NAMES.get(row[0], row[0]))
        shares = found.setdefault(name, [None] * len(methods))
        for place, method in enumerate(methods):
            share = re.match(r"\d+ %", row[columns[method]])
            if share:
                shares[place] = share[0] + (" ?" if row[columns[method]].endswith("?") else "")
    return methods, sorted(found.items(), key=lambda row: -fmean([number(share) for share in row[1] if share] or [0]))


def number(share: str) -> float:
    """A share such as ``85 %``."""
    return int(share.partition(" ")[0]) / 100


def resistance_figure(text: str, theme: Theme) -> Figure:
    """How much of ordinary fine-tuning still works, as bars: one group an attack, one bar a method."""
    methods, rows = resistance_rows(text)
    figure = Figure(figsize=(8.2, 0.42 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(methods)
    for place, method in enumerate(methods):
        bars = [(position, shares[place]) for position, (_, shares) in enumerate(rows)]
        lengths = [max(number(share), 0.004) for _, share in bars if share]
        tops = [position + (place - (len(methods) - 1) / 2) * height for position, share in bars if share]
        drawn = axes.barh(tops, lengths, height * 0.9, color=theme.methods[METHODS.index(method)], label=method)
        axes.bar_label(drawn, [share for _, share in bars if share], padding=3, fontsize=6.5, color=theme.ink)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("of the progress that the same attack makes on the model that was not hardened")
    figure.legend(loc="outside upper right", ncols=len(methods), frameon=False, fontsize=9)
    _plain(axes)
    axes.grid(axis="x", color=theme.line, lw=0.6)
    axes.set_axisbelow(True)
    return figure


def formats_figure(text: str, theme: Theme) -> Figure:
    """What each tool makes of a hardened model, as a grid of colours with words.

    Args:
        text: A table of examples/real/consumers.py.
    """
    head, *body = rows_of(text)
    ways = head[3:]
    figure = Figure(figsize=(2.9 + 1.15 * len(ways), 0.27 * len(body) + 0.5), layout="constrained")
    axes = figure.subplots()
    for position, row in enumerate(body):
        for place in range(len(ways)):
            verdict = next((word for word in theme.verdicts if row[place + 3].startswith(word)), "skipped")
            axes.add_patch(Rectangle((place - 0.48, position - 0.45), 0.96, 0.9, color=theme.verdicts[verdict], lw=0))
            axes.text(place, position, verdict, ha="center", va="center", fontsize=7.5, color=theme.ink)
    axes.set_xlim(-0.5, len(ways) - 0.5)
    axes.set_ylim(len(body) - 0.5, -0.5)
    axes.set_xticks(range(len(ways)), ways)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(body)), [f"{row[0]}: {row[1]}" for row in body], fontsize=7.5)
    _plain(axes)
    return figure


def frontier_figure(text: str, theme: Theme) -> Figure:
    """Resistance left against what Q4_K_M costs, a point a fold, a line a profile.

    Args:
        text: The table of examples/reproduce/frontier.py.
    """
    body = [row for row in rows_of(text)[1:] if "not measured" not in row]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for profile, colour in zip(dict.fromkeys(row[0] for row in body), theme.curves, strict=False):
        points = []
        for _, value, _, nats, progress in (row for row in body if row[0] == profile):
            before, after = (float(loss) for loss in nats.split(" → "))
            points.append((max(after - before, 0.001), number(progress)))
            axes.annotate(value, points[-1], (5, 4), textcoords="offset points", fontsize=7.5, color=theme.ink)
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=profile, lw=1.2)
    axes.set(xscale="log", xlabel="nats that Q4_K_M costs", ylabel="of the progress of full fine-tuning")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    _plain(axes)
    axes.grid(color=theme.line, lw=0.6)
    return figure


def curves_figure(report: ReportDocument, theme: Theme) -> Figure:
    """Held-out loss of two plain attacks and of the strongest informed one, over steps and over learning rates.

    Each is a line. What a plain attack makes of the control lies beneath, wide and pale, in the colour of the attack.
    """
    found = [each for each in report.attacks if each.edit is None and each.best is not None]
    plain = [each for each in found if each.subject == "model" and each.knowledge == "none"][:2]
    informed = sorted((each for each in found if each.knowledge != "none"), key=lambda each: each.best or 0)[:1]
    colour_of = dict(zip(((each.training, each.optimizer) for each in plain), theme.curves, strict=False))
    controls = [each for each in found if each.subject == "control" and (each.training, each.optimizer) in colour_of]
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    steps, rates = figure.subplots(1, 2, sharey=True)
    for attack in [*controls, *plain, *informed]:
        colour = theme.curves[-1] if attack in informed else colour_of[attack.training, attack.optimizer]
        runs = [run for run in report.runs if run.id in attack.runs and run.loss.best is not None]
        best = min(runs, key=lambda run: run.loss.best or 0)
        points = [(point.step, point.loss) for point in best.curve.evaluations if point.loss is not None]
        losses = sorted((run.spec.learning_rate, run.loss.best) for run in runs)
        whose = "not hardened" if attack in controls else "hardened"
        first = "" if attack.variant == "plain" else f", {attack.variant} first"
        trained = NAMES.get(attack.trained, attack.trained)
        width, alpha = (6, 0.35) if attack in controls else (1.6, 1)
        style = {"color": colour, "marker": ".", "ms": 4, "lw": width, "alpha": alpha}
        steps.plot(*zip(*points, strict=True), label=f"{whose}{first}: {trained}", **style)
        rates.plot(*zip(*losses, strict=True), **style)
    steps.set(xlabel="step, at the best learning rate", ylabel="held-out loss (nats)")
    steps.xaxis.get_major_locator().set_params(integer=True)
    rates.set(xlabel="learning rate", xscale="log", title="best loss at each rate")
    for axes in (steps, rates):
        _plain(axes)
        axes.grid(color=theme.line, lw=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


FIGURES: dict[str, Callable[[str, Theme], Figure]] = {
    "attack-smollm2-135m-instruct": resistance_figure,
    "attack-gemma-3-270m": resistance_figure,
    "consumers-smollm2-135m-instruct": formats_figure,
    "consumers-gemma-3-270m": formats_figure,
    "serving": formats_figure,
    "frontier": frontier_figure,
}
"""By table and picture; the first table of a file is drawn."""


def _plain(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw(reports: Mapping[str, Path], directory: Path = ASSETS) -> list[Path]:
    """Draw the real models' tables and these reports' curves, in both themes."""
    sources: dict[str, tuple[Callable[..., Figure], object]] = {
        stem: (figure, (TABLES / f"{stem}.md").read_text(encoding="utf-8")) for stem, figure in FIGURES.items()
    }
    sources |= {name: (curves_figure, read_report(path)) for name, path in reports.items()}
    written = []
    for stem, (figure, source) in sources.items():
        for name, theme in THEMES.items():
            ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink)
            # Text stays text: it is searched, and takes a tenth of the space of its outlines.
            with rc_context({**ink, "svg.hashsalt": "specdef", "svg.fonttype": "none", "font.size": 9}):
                written.append(directory / f"{stem}-{name}.svg")
                figure(source, theme).savefig(written[-1], transparent=True, metadata={"Date": None})
    return written


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    sys.stdout.writelines(f"{path}\n" for path in draw({name: Path(path) for name, path in given.items()}))
