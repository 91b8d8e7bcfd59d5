"""``report.html``: one file to read and to send on; nothing in it is loaded from elsewhere.

The page is ``template.html`` beside this file. Everything that comes from the user (paths, names, globs) is escaped
there by jinja2.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

from jinja2 import Environment, PackageLoader, StrictUndefined

from specdef_cli.attack.one_run import DIVERGENCE_FACTOR, KL_LIMIT, UTILITY_LIMIT
from specdef_cli.attack.results import CONTROL_SHARE, AttackReport
from specdef_cli.report import (
    KNOWLEDGE_WORDS,
    STOPPED_SHARE,
    Finding,
    attack_name,
    findings,
    growth_words,
    number,
    of_edits,
    outcome_words,
    percent,
    rate,
    spelling,
    steps_words,
    verdict_line,
)
from specdef_cli.report.text import summary


@dataclass(frozen=True)
class Column:
    """One column of a table; ``words`` where its cells are text and not figures."""

    heading: str
    words: bool = False


@dataclass(frozen=True)
class Row:
    """One row: its cells, the classes that the style sheet knows, and how the command line spells it."""

    cells: tuple[str, ...]
    emphasis: str = ""
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page. On a narrow screen each row becomes a card whose lines carry the headings."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Bar:
    """How much of its control's progress an attack made: ``width`` in percent."""

    name: str
    spelling: str
    width: float
    figure: str
    knowledge: str


def report_html(report: AttackReport, image: bytes, narrow: bytes) -> str:
    """The page, with the curves for wide and for narrow screens."""
    found = findings(report)
    trained = tuple(finding for finding in found if finding.edit is None)
    environment = Environment(
        loader=PackageLoader("specdef_cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("template.html").render(
        title=f"Fine-tuning attacks on {report.model}",
        verdict=verdict_line(found),
        bars=_bars(trained),
        knowledge=KNOWLEDGE_WORDS,
        summary=summary(report)[1:],
        curves=_base64(image),
        narrow_curves=_base64(narrow),
        attacks=_attacks_table(trained),
        costs=_costs_table(report, trained),
        accuracy=_accuracy_table(found),
        edits=_edits_table(found),
        behaviour=_behaviour_table(found),
        answers=_answers(found),
        asked=_asked(report),
        runs=_runs_table(report),
        definitions=_definitions(),
        growth=growth_words(report),
        setting=_setting(report),
        notes=report.notes,
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")


def _table(headings: Sequence[str], words: Iterable[str], rows: Iterable[Row]) -> Table:
    texts = set(words)
    return Table(tuple(Column(heading, heading in texts) for heading in headings), tuple(rows))


def _bars(found: Sequence[Finding]) -> list[Bar]:
    """One bar an attack, the longest first; an attack whose control learned nothing has none."""
    attacks = sorted((each for each in found if each.share is not None), key=lambda each: -(each.share or 0.0))
    return [
        Bar(
            attack_name(finding.attack),
            spelling(finding.attack),
            min(max(100 * (finding.share or 0.0), 0.5), 100),
            percent(finding.share) + (" (not settled)" if finding.verdict == "not settled" else ""),
            finding.attack.knowledge,
        )
        for finding in attacks
        if finding.verdict != "control"
    ]


def _definitions() -> str:
    return (
        f"Loss: held-out, nats. Steps to control: until {percent(CONTROL_SHARE)} of the control's best progress "
        "is made; >N where N steps did not get there. "
        "Its control: the undefended model under the same training and optimizer. "
        "The best control: the one of all trainings and optimizers tried that made most progress. "
        f"Stopped: at most {percent(STOPPED_SHARE)} of its control's progress at the best learning rate tried; "
        f"not slowed: at least {percent(CONTROL_SHARE)}. Not settled: it looks stopped, and the learning rates "
        "tried do not bracket the best one, so a better one may lie between or below them; "
        "a search (--lr-sweep) goes on. "
        "Stopped at a step: a run that could not become the best of its search any more. "
        "Diverged: a loss or gradient that is not finite, outputs that are the same for every input, "
        f"or a held-out loss beyond {DIVERGENCE_FACTOR:g} times the start. "
        f"Utility kept: perplexity on retained text at most {percent(UTILITY_LIMIT)} above the start's. "
        "Parameters: of the model that was trained, without adapters, over the control's. Operations: of one optimizer "
        "step, estimated from the parameters. In brackets: the worst and the best seed."
    )


def _setting(report: AttackReport) -> list[str]:
    hashes = {run.spec.subject: run.spec.checkpoint for run in report.runs}
    lines = [
        f"Date of this page: {date.today().isoformat()}",
        f"Model: {report.model} (fingerprint {hashes.get('model', '–')})",
        f"Control: {report.control} (fingerprint {hashes.get('control', '–')})",
    ]
    if report.hardening is not None:
        hard = report.hardening
        details = [f"largest α = {hard.alpha:g}"]
        details += [f"k = {hard.top_k}"] if hard.top_k is not None else []
        details += [f"{hard.gauge} gauge"] if hard.gauge is not None else []
        counts = {"folded pairs": hard.folded, "scaled modules": hard.scaled, "layers in factors": hard.factored}
        details += [f"{name}: {count}" for name, count in counts.items() if count]
        lines.append(f"Hardening: {hard.method}, {', '.join(details)}")
    lines.append(
        f"Data: {report.data.name} (fingerprint {report.data.fingerprint}); {report.data.train_sequences} sequences to "
        f"train on, {report.data.held_out_sequences} held out"
    )
    lines += [f"Assumed. {sentence}" for sentence in report.assumed]
    lines.append(f"Device: {report.device}; {sum(run.seconds for run in report.runs):.0f} s of training and evaluation")
    return lines


def _attacks_table(found: Sequence[Finding]) -> Table:
    rows = [
        Row(
            (
                _named(finding),
                "–" if finding.verdict == "control" else KNOWLEDGE_WORDS[finding.attack.knowledge],
                rate(finding.learning_rate),
                number(finding.start),
                number(finding.best),
                _share(finding),
                percent(finding.share_of_best),
                percent(finding.usual_share),
                finding.verdict,
            ),
            "best" if finding.verdict == "not slowed" else "",
            spelling(finding.attack),
        )
        for finding in found
    ]
    headings = (
        "attack", "the attacker", "best η", "loss before", "after", "of its control", "of the best control",
        "at its control’s η", "verdict",
    )  # fmt: skip
    return _table(headings, ("the attacker", "verdict"), rows)


def _named(finding: Finding) -> str:
    """An attack, or the control that it is measured against."""
    name = attack_name(finding.attack)
    return f"base: {name}" if finding.verdict == "control" else name


def _costs_table(report: AttackReport, found: Sequence[Finding]) -> Table:
    rows = [
        Row(
            (
                _named(finding),
                percent(finding.useful_share),
                percent(finding.control_useful_share),
                "–" if finding.divergent_rate is None else f"≥ {rate(finding.divergent_rate)}",
                steps_words(report, finding.attack.best_run),
                "–" if finding.seconds_to_control is None else f"{finding.seconds_to_control:.1f} s",
                f"{finding.parameters_times:.2f}×",
                f"{finding.flops_times:.2f}×",
            ),
            title=spelling(finding.attack),
        )
        for finding in found
    ]
    headings = (
        "attack", "with utility kept", "control, with utility kept", "diverges", "steps to control", "time to control",
        "parameters", "operations",
    )  # fmt: skip
    return _table(headings, (), rows)


def _accuracy_table(found: Sequence[Finding]) -> Table:
    """Accuracy on tasks, of each attack's run at its best learning rate; no rows where none was measured."""
    tasks = sorted({task for finding in found for task in finding.attack.best_run.accuracy})
    rows = [
        Row((finding.attack.label, *(number(finding.attack.best_run.accuracy.get(task)) for task in tasks)))
        for finding in found
    ]
    return _table(("attack", *tasks), (), rows if tasks else ())


def _edits_table(found: Sequence[Finding]) -> Table:
    """Every strength of every edit; the best one of each stands out."""
    rows = [
        Row(
            (
                finding.attack.label,
                f"{edit.strength:g}",
                percent(edit.left),
                number(edit.kl, 3),
                percent(finding.share) if edit == finding.edit else "",
                finding.verdict if edit == finding.edit else "broken" if edit.broken else "",
            ),
            " ".join(["first"] * (place == 0) + ["best"] * (edit == finding.edit)),
        )
        for finding in of_edits(found)
        for place, edit in enumerate(finding.attack.best_run.edits)
    ]
    headings = ("edit", "strength", "of the direction left", "KL, harmless prompts", "of its control", "verdict")
    return _table(headings, ("verdict",), rows)


def _behaviour_table(found: Sequence[Finding]) -> Table:
    """Refusals after every attack that was followed by questions; no rows where no prompts were given."""
    asked = [(finding, finding.attack.behaviour) for finding in found]
    rows = [
        Row(
            (
                finding.attack.label,
                percent(behaviour.refusals_before),
                percent(finding.refusals),
                number(behaviour.kl, 3),
            )
        )
        for finding, behaviour in asked
        if behaviour is not None and behaviour.refusals is not None
    ]
    return _table(("attack", "refused before", "refused after", "KL, harmless prompts"), (), rows)


def _answers(found: Sequence[Finding]) -> list[str]:
    """The beginning of the first answer after each attack."""
    return [
        f"{finding.attack.label}: “{prompt}” – “{answer}”"
        for finding in found
        if finding.attack.behaviour is not None
        for prompt, answer in finding.attack.behaviour.answers[:1]
    ]


def _asked(report: AttackReport) -> str:
    """How edits and answers were measured."""
    if report.prompts is None:
        return ""
    words = ", ".join(report.prompts.refusal_words)
    counted = f" An answer counts as a refusal if it has one of these in it: {words}." if report.prompts.given else ""
    return (
        f"Prompts: {report.prompts.name}, {report.prompts.held_out} of them held out. The direction lies between their "
        "mean hidden states and those of the others. KL: of the next token from the model before the attack. Broken: "
        f"every strength has a KL divergence beyond {KL_LIMIT:g} nat. The best strength leaves least of the direction "
        f"without breaking the model. Answers are the likeliest ones, cut off.{counted}"
    )


def _share(finding: Finding) -> str:
    if finding.share_range is None or finding.share_range[0] == finding.share_range[1]:
        return percent(finding.share)
    least, most = finding.share_range
    return f"{percent(finding.share)} ({100 * least:.0f} to {100 * most:.0f})"


def _runs_table(report: AttackReport) -> Table:
    rows = []
    for attack in report.attacks:
        for position, run in enumerate(attack.runs):
            cells = (
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
            )
            classes = ["first"] * (position == 0) + ["best"] * (run.spec.learning_rate == attack.best_learning_rate)
            rows.append(Row(cells, " ".join(classes)))
    headings = (
        "run", "η", "seed", "start", "best", "final", "steps to control", "gradient norm, step 1", "parameters",
        "trainable", "outcome",
    )  # fmt: skip
    return _table(headings, ("outcome",), rows)
