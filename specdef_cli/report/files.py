"""The files of a report, each replaced whole: page, data, and curves as a table and as a picture.

The page is ``template.html`` beside this file. Nothing in it is loaded from elsewhere, and jinja2 escapes what
comes from the user (paths, names, globs).
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from specdef_cli.attack.results import Attack, AttackReport
from specdef_cli.checkpoint.files import write_durably
from specdef_cli.model.loading import process_state
from specdef_cli.report import (
    KNOWLEDGE_WORDS,
    Finding,
    attack_cells,
    findings,
    growth_words,
    number,
    of_edits,
    percent,
    rate,
    run_cells,
    spelling,
)
from specdef_cli.report.document import DEFINITIONS, report_json
from specdef_cli.report.text import summary, verdict_line

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
            label=f"{attack.label} (η = {rate(attack.best_learning_rate)})",
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
    """The attacks of each kind that ended lowest, in the report's order; edits have no curve."""
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


WORDS = ("the attacker", "verdict", "outcome")
"""Headings of columns whose cells are text and not figures."""

ATTACKS = ("the attacker", "best η", "loss before", "after", "of its control", "of the best control")
COSTS = (
    "with utility kept", "control, with utility kept", "diverges", "steps to control", "time to control", "parameters",
    "operations",
)  # fmt: skip


class Row(NamedTuple):
    """A row of a table: cells by heading, classes that the style sheet knows, and how the command line spells it."""

    cells: dict[str, str]
    emphasis: str = ""
    title: str = ""


def report_html(report: AttackReport, image: bytes) -> str:
    """The page, with the curves."""
    found = findings(report)
    trained = tuple(finding for finding in found if finding.edit is None)
    environment = Environment(
        loader=PackageLoader("specdef_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    attacks, costs = [], []
    for finding in trained:
        named, flags = {"attack": finding.label}, spelling(finding.attack)
        cells = attack_cells(finding)
        usual = {"of its control": _share(finding), "at its control’s η": percent(finding.usual_share)}
        shown = {**named, **{key: cells[key] for key in ATTACKS}, **usual, "verdict": finding.verdict}
        attacks.append(Row(shown, "best" if finding.verdict == "not slowed" else "", flags))
        costs.append(Row({**named, **{key: cells[key] for key in COSTS}}, title=flags))
    return environment.get_template("template.html").render(
        verdict=verdict_line(found),
        # The longest bar first; an attack whose control learned nothing has none.
        bars=sorted(
            (each for each in trained if each.share is not None and each.verdict != "control"),
            key=lambda each: -(each.share or 0.0),
        ),
        spelling=spelling,
        percent=percent,
        knowledge=KNOWLEDGE_WORDS,
        words=WORDS,
        summary=summary(report)[1:],
        report=report,
        found=found,
        today=date.today().isoformat(),
        fingerprints={run.spec.subject: run.spec.checkpoint for run in report.runs},
        definitions=DEFINITIONS,
        curves=base64.b64encode(image).decode("ascii"),
        attacks=attacks,
        costs=costs,
        accuracy=_accuracy_rows(found),
        edits=_edit_rows(found),
        behaviour=_behaviour_rows(found),
        runs=_run_rows(report),
        growth=growth_words(report),
    )


def _accuracy_rows(found: Sequence[Finding]) -> list[Row]:
    """Accuracy on tasks, of each attack's run at its best learning rate; none where none was measured."""
    tasks = sorted({task for finding in found for task in finding.attack.best_run.accuracy})
    measured = [(finding.label, finding.attack.best_run.accuracy) for finding in found if tasks]
    return [Row({"attack": label, **{task: number(each.get(task)) for task in tasks}}) for label, each in measured]


def _edit_rows(found: Sequence[Finding]) -> list[Row]:
    """Every strength of every edit; the best one of each stands out."""
    return [
        Row(
            {
                "edit": finding.label,
                "strength": f"{edit.strength:g}",
                "of the direction left": percent(edit.left),
                "KL, harmless prompts": number(edit.kl),
                "of its control": percent(finding.share) if edit == finding.edit else "",
                "verdict": finding.verdict if edit == finding.edit else "broken" if edit.broken else "",
            },
            " ".join(["first"] * (place == 0) + ["best"] * (edit == finding.edit)),
        )
        for finding in of_edits(found)
        for place, edit in enumerate(finding.attack.best_run.edits)
    ]


def _behaviour_rows(found: Sequence[Finding]) -> list[Row]:
    """Refusals after every attack that was followed by questions; none where no prompts were given."""
    return [
        Row(
            {
                "attack": finding.label,
                "refused before": percent(finding.refusals_before),
                "refused after": percent(finding.refusals),
                "KL, harmless prompts": number(finding.kl),
            }
        )
        for finding in found
        if finding.attack.behaviour is not None and finding.attack.behaviour.refusals is not None
    ]


def _share(finding: Finding) -> str:
    if finding.share_range is None or finding.share_range[0] == finding.share_range[1]:
        return percent(finding.share)
    least, most = finding.share_range
    return f"{percent(finding.share)} ({100 * least:.0f} to {100 * most:.0f})"


def _run_rows(report: AttackReport) -> list[Row]:
    rows = []
    for attack in report.attacks:
        for position, run in enumerate(attack.runs):
            classes = ["first"] * (position == 0) + ["best"] * (run.spec.learning_rate == attack.best_learning_rate)
            rows.append(Row(run_cells(attack, run), " ".join(classes)))
    return rows


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
