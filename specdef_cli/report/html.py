"""``report.html``: one file to read and to send on; nothing in it is loaded from elsewhere.

Everything that comes from the user (paths, names, globs) is escaped. The frame is ``template.html`` beside this file.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from specdef_cli.attack.results import CONTROL_SHARE, DIVERGENCE_FACTOR, UTILITY_LIMIT, AttackReport
from specdef_cli.report.findings import (
    KNOWLEDGE_WORDS,
    STOPPED_SHARE,
    Finding,
    Verdict,
    findings,
    growth_words,
    number,
    outcome_words,
    percent,
    rate,
    steps_words,
    summary,
)
from specdef_cli.report.matrix import CoverageMatrix, coverage_matrix
from specdef_cli.report.plot import growth_png

MOST_LISTED = 12
"""Attacks that are listed under a verdict at the head of the page; the tables below have them all."""


def report_html(report: AttackReport, image: bytes) -> str:
    """The page.

    Args:
        report: What to show.
        image: The plot, PNG.
    """
    found = findings(report)
    template = Template((files("specdef_cli.report") / "template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Fine-tuning attacks on {report.model}"),
        summary="".join(f"<p>{escape(sentence)}</p>" for sentence in summary(report)),
        stopped=_list(_lines(found, "stopped")),
        slowed=_list(_lines(found, "slowed")),
        not_slowed=_list(_lines(found, "not slowed")),
        curves=_figure("Held-out loss over steps and over learning rates", image),
        matrix=_matrix(coverage_matrix(found)),
        growth_figure=_figure("Progress over the size of the attacked model", growth_png(found)),
        attacks="".join(_attack_row(each) for each in found),
        runs="".join(_run_rows(report)),
        definitions=escape(_definitions()),
        accuracy=_accuracy(found),
        growth=_list(growth_words(report)),
        setting="".join(f"<li>{escape(line)}</li>" for line in _setting(report)),
        notes="".join(f"<li>{escape(note)}</li>" for note in report.notes) or "<li>none</li>",
        versions=escape(", ".join(f"{name} {version}" for name, version in report.versions.items())),
    )


def _figure(alternative: str, image: bytes | None) -> str:
    if image is None:
        return ""
    return f'<img alt="{alternative}" src="data:image/png;base64,{base64.b64encode(image).decode("ascii")}">'


def _matrix(matrix: CoverageMatrix | None) -> str:
    """The heat map as a table: what does not yield is white, what yields all is red."""
    if matrix is None:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in matrix.columns)
    rows = []
    for row in matrix.rows:
        cells = []
        for column in matrix.columns:
            finding = matrix.cells.get((row, column))
            share = finding.share if finding else None
            if finding is None or share is None:
                cells.append("<td>–</td>")
                continue
            heat = f"rgba(200, 40, 30, {0.75 * min(max(share, 0.0), 1.0):.2f})"
            where = f"<small>η = {rate(finding.learning_rate)}</small>"
            cells.append(f'<td style="background: {heat}">{percent(share)}<br>{where}</td>')
        rows.append(f"<tr><td>{escape(row)}</td>{''.join(cells)}</tr>")
    return (
        "<h2>Coverage: what is trained × optimizer</h2>"
        "<p>Attackers who know only recipes; share of the control's progress at the best learning rate.</p>"
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _accuracy(found: Sequence[Finding]) -> str:
    """Accuracy on tasks, of each attack's run at its best learning rate; nothing where none was measured."""
    tasks = sorted({task for each in found for task in each.attack.best_run.accuracy})
    if not tasks:
        return ""
    head = "".join(f"<th>{escape(task)}</th>" for task in tasks)
    rows = "".join(
        _row([each.attack.label, *(number(each.attack.best_run.accuracy.get(task)) for task in tasks)], words=set())
        for each in found
    )
    return (
        "<h2>Accuracy after the last step</h2>"
        f'<div class="wide"><table><thead><tr><th>attack</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else "<p>nothing</p>"


def _lines(found: Sequence[Finding], verdict: Verdict) -> list[str]:
    """The attacks of one verdict, the strongest first, each with its share of the control's progress."""
    attacks = sorted((each for each in found if each.verdict == verdict), key=lambda each: -(each.share or 0))
    lines = []
    for each in attacks[:MOST_LISTED]:
        attack = each.attack
        what = ", ".join(part for part in (attack.variant.label, attack.training.label, attack.optimizer) if part)
        lines.append(f"{percent(each.share)}: {what}")
    more = len(attacks) - len(lines)
    return [*lines, *([f"and {more} more, below"] if more > 0 else [])]


def _definitions() -> str:
    return (
        f"Loss: held-out, nats. Steps to control: until {CONTROL_SHARE:.0%} of the control's best progress is made; "
        ">N where N steps did not get there. "
        f"Stopped: at most {STOPPED_SHARE:.0%} of the control's progress at the best learning rate tried; "
        f"not slowed: at least {CONTROL_SHARE:.0%}. "
        "Diverged: a loss or gradient that is not finite, "
        f"or a held-out loss beyond {DIVERGENCE_FACTOR:g} times the start. "
        f"Utility kept: perplexity on retained text at most {UTILITY_LIMIT:.0%} above the start's. "
        "Parameters: of the model that was trained, without adapters, over the control's. Operations: of one optimizer "
        "step, estimated from the parameters. In brackets: the worst and the best seed."
    )


def _setting(report: AttackReport) -> list[str]:
    lines = [f"Model: {report.model}", f"Control: {report.control}"]
    if report.hardening is not None:
        hard = report.hardening
        details = [f"largest α = {hard.alpha:g}"]
        details += [f"k = {hard.top_k}"] if hard.top_k is not None else []
        details += [f"{hard.gauge} gauge"] if hard.gauge is not None else []
        unit = "pairs" if hard.method == "fold" else "layers"
        lines.append(f"Hardening: {hard.method}, {', '.join(details)}, {hard.layers} {unit}")
    lines.append(
        f"Data: {report.data.name}; {report.data.train_sequences} sequences to train on, "
        f"{report.data.held_out_sequences} held out"
    )
    lines += [f"Assumed. {sentence}" for sentence in report.assumed]
    lines.append(f"Device: {report.device}; {sum(run.seconds for run in report.runs):.0f} s of training and evaluation")
    return lines


def _attack_row(finding: Finding) -> str:
    cells = [
        finding.attack.label,
        "–" if finding.verdict == "control" else KNOWLEDGE_WORDS[finding.attack.knowledge],
        rate(finding.learning_rate),
        number(finding.start),
        number(finding.best),
        _share(finding),
        percent(finding.useful_share),
        "–" if finding.divergent_rate is None else f"≥ {rate(finding.divergent_rate)}",
        "–" if finding.seconds_to_control is None else f"{finding.seconds_to_control:.1f} s",
        f"{finding.parameters_times:.2f}×",
        f"{finding.flops_times:.2f}×",
        finding.verdict,
    ]
    return _row(cells, words={1, 11})


def _share(finding: Finding) -> str:
    if finding.share_range is None or finding.share_range[0] == finding.share_range[1]:
        return percent(finding.share)
    least, most = finding.share_range
    return f"{percent(finding.share)} ({100 * least:.0f} to {100 * most:.0f})"


def _run_rows(report: AttackReport) -> Iterable[str]:
    for attack in report.attacks:
        for position, run in enumerate(attack.runs):
            cells = [
                run.spec.label,
                rate(run.spec.learning_rate),
                str(run.spec.seed),
                number(run.start),
                number(run.best),
                number(run.final),
                steps_words(report, run),
                "–" if run.first_grad_norm is None else f"{run.first_grad_norm:.3g}",
                f"{report.parameters_times(run):.2f}×",
                f"{run.trainable_parameters:,}",
                outcome_words(run),
            ]
            classes = ["first"] * (position == 0) + ["best"] * (run.spec.learning_rate == attack.best_learning_rate)
            yield _row(cells, words={10}, classes=classes)


def _row(cells: list[str], *, words: set[int], classes: Iterable[str] = ()) -> str:
    body = "".join(
        f'<td class="words">{escape(cell)}</td>' if number in words else f"<td>{escape(cell)}</td>"
        for number, cell in enumerate(cells)
    )
    names = " ".join(classes)
    return f'<tr class="{names}">{body}</tr>' if names else f"<tr>{body}</tr>"
