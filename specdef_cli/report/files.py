"""The four files of a report, each replaced whole, and the curves (``curves.png``)."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from specdef_cli.attack.results import Attack, AttackReport
from specdef_cli.checkpoint.files import write_durably
from specdef_cli.model.loading import process_state
from specdef_cli.report import full_name, rate
from specdef_cli.report.document import report_json
from specdef_cli.report.html import report_html

_PALETTES = {"none": "Blues", "construction": "Reds", "growth": "Oranges"}
_MARKERS, _GREYS = "osD^", ("black", "dimgray", "darkgray", "black")  # for MAX_CURVES of a kind

FAILED = ("diverged", "worse")
"""How runs end that are crossed out."""

MAX_CURVES = 4
"""Attacks of one kind (control, and by knowledge) that are drawn: the strongest. More could not be told apart."""


def curves_png(report: AttackReport) -> bytes:
    """The plot as PNG bytes.

    Left: held-out loss over steps, each attack at its best learning rate. Right: best held-out loss over the learning
    rate, logarithmic, so that an attack which only wins at an unusual rate shows. Blue: attackers who know only
    recipes; red: who know the construction; orange: who also grow the model; grey: the control.
    """
    # The object interface: pyplot would keep global state and may look for a display.
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    drawn = _strongest(report)
    for attack, style in zip(drawn, _styles(drawn), strict=True):
        points = [point for point in attack.best_run.evaluations if point.loss is not None]
        left.plot(
            [point.step for point in points],
            [point.loss for point in points],
            label=f"{full_name(attack)} (η = {rate(attack.best_learning_rate)})",
            **style,
        )
        frontier = [(value, attack.best_at(value)) for value in attack.learning_rates]
        known = [(value, loss) for value, loss in frontier if loss is not None]
        right.plot([value for value, _ in known], [loss for _, loss in known], **style)
        failed = [(value, loss) for value, loss in known if any(run.outcome in FAILED for run in attack.at(value))]
        right.plot([value for value, _ in failed], [loss for _, loss in failed], "x", color="black", ms=9, zorder=5)
    start = next((run.start for run in report.runs if run.start is not None), None)
    for axes in (left, right):
        if start is not None:
            axes.axhline(start, color="gray", lw=1, ls=":", zorder=0)
        _tidy(axes)
    title = "The strongest attacks of each kind, each at its best learning rate"
    left.set(title=title, xlabel="optimizer step", ylabel="held-out loss (nats)")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(
        title="Best loss over learning rates (×: diverged or worse)",
        xlabel="learning rate η",
        ylabel="best held-out loss (nats)",
        xscale="log",
    )
    right.xaxis.set_major_locator(LogLocator(numticks=15))
    right.xaxis.set_minor_formatter(NullFormatter())
    if drawn:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _kind(attack: Attack) -> str:
    return "control" if attack.subject == "control" else attack.spec.variant.knowledge


def _strongest(report: AttackReport) -> tuple[Attack, ...]:
    """Of each kind the attacks that ended lowest, in the order of the report; edits have no curve."""
    kinds: dict[str, list[Attack]] = {}
    trained = [attack for attack in report.attacks if attack.edit is None]
    for attack in sorted(trained, key=lambda attack: math.inf if attack.best is None else attack.best):
        kinds.setdefault(_kind(attack), []).append(attack)
    return tuple(attack for attack in trained if attack in kinds[_kind(attack)][:MAX_CURVES])


def _styles(attacks: tuple[Attack, ...]) -> list[dict[str, object]]:
    """Hue by what the attacker knows, shade and marker by which of those it is."""
    counts = Counter[str]()
    styles: list[dict[str, object]] = []
    for attack in attacks:
        kind, position = _kind(attack), counts[_kind(attack)]
        counts[kind] += 1
        style: dict[str, object] = {"marker": _MARKERS[position], "ls": "-", "ms": 4.5}
        if kind == "control":  # under the rest, wide, because the strongest attacks run along it
            style |= {"color": _GREYS[position], "lw": 7, "alpha": 0.3}
        else:
            style |= {"color": colormaps[_PALETTES[kind]](0.85 - 0.17 * position), "lw": 1.6}
        styles.append(style)
    return styles


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10.5)


CURVE_COLUMNS = (
    "run", "label", "subject", "variant", "trained", "optimizer", "learning_rate", "seed",
    "step", "train_loss", "grad_norm", "eval_loss", "retained_loss", "seconds",
)  # fmt: skip


def curves_csv(report: AttackReport) -> str:
    """The text of ``curves.csv``: one row for each step of each run that has a value; step 0 is before the first
    update.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CURVE_COLUMNS)
    for run in report.runs:
        spec = run.spec
        train = {point.step: point for point in run.train}
        evaluations = {point.step: point for point in run.evaluations}
        for step in sorted(train.keys() | evaluations.keys()):
            trained, evaluated = train.get(step), evaluations.get(step)
            writer.writerow(
                [
                    spec.run_id, spec.label, spec.subject, spec.variant, spec.training.label, spec.optimizer,
                    spec.learning_rate, spec.seed, step, trained and trained.loss, trained and trained.grad_norm,
                    evaluated and evaluated.loss, evaluated and evaluated.retained,
                    evaluated and round(evaluated.seconds, 3),
                ]
            )  # fmt: skip
    return text.getvalue()


def write_report(report: AttackReport, out: str | Path) -> tuple[Path, ...]:
    """Write ``report.html``, ``report.json``, ``curves.csv`` and ``curves.png`` into ``out``.

    Only the main process of an ``accelerate launch`` writes; the others return the same paths.
    """
    paths = tuple(Path(out) / name for name in ("report.html", "report.json", "curves.csv", "curves.png"))
    if process_state().is_main_process:
        image = curves_png(report)
        contents: tuple[str | bytes, ...] = (
            report_html(report, image),
            report_json(report),
            curves_csv(report),
            image,
        )
        for path, content in zip(paths, contents, strict=True):
            write_durably(path, content)
    return paths
