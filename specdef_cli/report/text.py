"""A report in the terminal: one line an attack, or one a run; the summary, and the lines that the command ends with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from specdef_cli.attack.one_run import UTILITY_LIMIT
from specdef_cli.attack.results import CONTROL_SHARE, AttackReport
from specdef_cli.report import (
    Finding,
    attack_cells,
    edit_words,
    findings,
    growth_words,
    number,
    of_edits,
    percent,
    run_cells,
)

ATTACKS = {
    "best η": "best η", "after": "loss", "of its control": "of its\ncontrol", "of the best control": "of best\ncontrol",
    "steps to control": "steps", "verdict": "verdict",
}  # fmt: skip
"""From the headings of the page to those of the terminal, which has 80 columns."""

RUNS = {
    "η": "η", "start": "start", "best": "best", "final": "final", "steps to control": "steps",
    "gradient norm, step 1": "|g|", "parameters": "params", "outcome": "outcome",
}  # fmt: skip


def attacks_table(report: AttackReport) -> Table:
    """One line for each attack at its best learning rate, in 80 columns."""
    found = [finding for finding in findings(report) if finding.edit is None]
    asked = {"refusals": "refusals"} if any(finding.refusals is not None for finding in found) else {}
    headings = {**ATTACKS, **asked}
    table = _table(_caption(report), "attack", headings.values())
    previous = None
    for finding in found:
        group = (finding.subject, finding.knowledge)
        if previous not in (None, group):
            table.add_section()
        previous = group
        cells = attack_cells(finding)
        _add(table, [finding.label, *(cells[key] for key in headings)], finding.verdict == "not slowed")
    return table


def edits_table(report: AttackReport) -> Table | None:
    """One line for each edit at its best strength; ``None`` where the model was not edited."""
    found = of_edits(findings(report))
    if not found:
        return None
    caption = "left: of the direction between the two kinds of prompts. KL: of the next token, on harmless prompts."
    asked = ["refusals"] if any(finding.refusals is not None for finding in found) else []
    headings = ("strength", "left", "KL", "of its\ncontrol", *asked, "verdict")
    table = _table(caption, "edit, nothing trained", headings)
    for finding in found:
        edit = finding.edit
        assert edit is not None
        name, strength = finding.label, f"{edit.strength:g}"
        cells = [name, strength, percent(edit.left), number(edit.kl), percent(finding.share)]
        cells += [percent(finding.refusals)] if asked else []
        _add(table, [*cells, finding.verdict], finding.verdict == "not slowed")
    return table


def runs_table(report: AttackReport) -> Table:
    """One line for each run; the best of each attack is bold."""
    caption = _caption(report, " |g|: gradient norm at step 1. params: model parameters over the control's.")
    table = _table(caption, "run", RUNS.values())
    for attack in report.attacks:
        for run in attack.runs:
            cells = run_cells(attack, run)
            seed = f" · seed {run.spec.seed}" if len(attack.at(run.spec.learning_rate)) > 1 else ""
            strongest = run.spec.learning_rate == attack.best_learning_rate
            _add(table, [cells["run"] + seed, *(cells[key] for key in RUNS)], strongest)
        table.add_section()
    return table


def _caption(report: AttackReport, more: str = "") -> str:
    share = f"until {percent(CONTROL_SHARE)} of the control's best progress is made."
    return "\n".join([f"loss: held-out, the lowest. steps: {share}{more}", *growth_words(report)])


def _table(caption: str, first: str, headings: Iterable[str]) -> Table:
    """Make a table whose cells are :class:`Text`: nothing in a name is markup."""
    table = Table(caption=Text(caption), caption_justify="left", pad_edge=False)
    table.add_column(first)
    for heading in headings:
        words = heading in ("verdict", "outcome")
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "outcome")
    return table


def _add(table: Table, cells: Iterable[str], bold: bool) -> None:
    table.add_row(*(Text(cell, style="bold" if bold else "") for cell in cells))


KNOWN_TO_GET_THROUGH = {"hira": "HiRA", "ia3": "IA³", "adapter": "adapters"}
"""Ordinary recipes that no construction slows; a report without them says so."""

MAX_NAMED = 5
"""Attacks that a sentence names; more are counted."""


def _sorted_out(found: Sequence[Finding]) -> tuple[list[Finding], ...]:
    """Attacks on the model: trained by those who know only recipes, by others, and edits."""
    attacks = [finding for finding in found if finding.verdict != "control"]
    trained = [finding for finding in attacks if finding.edit is None]
    plain = [finding for finding in trained if finding.knowledge == "none"]
    return plain, [finding for finding in trained if finding.knowledge != "none"], list(of_edits(attacks))


def verdict_line(found: Sequence[Finding]) -> str:
    """The report in one line: how many recipes it holds against, which it does not slow, and what undoes it."""
    plain, informed, edits = _sorted_out([finding for finding in found if finding.verdict != "unknown"])
    parts = []
    if plain:
        held = sum(finding.verdict == "stopped" for finding in plain)
        parts.append(f"Holds against {held} of {len(plain)} recipes tried")
    shown = {"not slowed": "not slowed", "slowed": "only slowed", "not settled": "rate not bracketed"}
    for verdict, words in shown.items():
        names = [finding.attack.spec.name for finding in plain if finding.verdict == verdict]
        if names:
            parts.append(f"{words}: {_listed(names, ', ')}")
    undone = [finding.attack.spec.variant.label for finding in informed if finding.verdict == "not slowed"]
    if undone:
        parts.append(f"undone: {_listed(undone, ', ')}")
    elif not informed and plain:
        parts.append("no attack that knows the construction was tried")
    if edits:
        edited = ", ".join(f"{each.attack.spec.variant.label} {each.verdict}" for each in edits)
        parts.append(f"{'edits' if parts else 'Edits'}: {edited}")
    return "; ".join(parts or ["The control learned nothing, so there is nothing to compare"]) + "."


def summary(report: AttackReport) -> tuple[str, ...]:
    """The verdict, the lines that the command ends with, and what was measured besides."""
    found = findings(report)
    plain, informed, edits = _sorted_out(found)
    return (
        *([verdict_line(found)] if plain or informed or edits else []),
        *closing(report),
        *_utility_sentence([*plain, *informed]),
        "All of this holds for the data, the budget and the recipes named here, and for no others.",
    )


def closing(report: AttackReport, page: Path | None = None) -> tuple[str, ...]:
    """What was done, how far ordinary fine-tuning gets, what gets through, how it is undone, and where the page is."""
    plain, informed, edits = _sorted_out(findings(report))
    lines = [f"Done: {_done(report)}"]
    lines += [f"Ordinary fine-tuning: {_ordinary(plain)}", f"Gets through: {_through(plain)}"] if plain else []
    if informed or report.hardening is not None:
        lines.append(f"Undone: {_undone(informed)}")
    lines += [f"Edited: {_edit_sentence(finding)}" for finding in edits]
    return (*lines, *([f"Report: {page}"] if page is not None else []))


def _done(report: AttackReport) -> str:
    trained = [run for run in report.runs if not run.spec.is_edit]
    hardened = f" (method {report.hardening.method})" if report.hardening is not None else ""
    if not trained:
        return f"{report.model}{hardened} and its base {report.control} were edited; nothing was trained."
    steps = {run.spec.steps for run in trained}
    runs = f"{len(trained)} run{'s' * (len(trained) > 1)} of {max(steps)} steps"
    if all(run.spec.subject == "control" for run in trained):  # the time limit came first
        return f"{runs} fine-tuned the base {report.control} alone; {report.model}{hardened} was not attacked."
    return (
        f"{runs} fine-tuned {report.model}{hardened} and its base {report.control}. "
        "Each attack is judged at its best learning rate."
    )


def _ordinary(plain: Sequence[Finding]) -> str:
    known = sorted((each for each in plain if each.share is not None), key=lambda each: each.share or 0.0)
    unknown = [finding.attack.spec.trained for finding in plain if finding.share is None]
    text = f"{_shares(known)} of its progress on the base." if known else ""
    if unknown:
        text += f" {_listed(unknown)} learned nothing on the base, so there is nothing to compare."
    return text.strip()


def _through(plain: Sequence[Finding]) -> str:
    through = [finding for finding in plain if finding.verdict == "not slowed"]
    unsettled = [finding for finding in plain if finding.verdict == "not settled"]
    tried = {finding.attack.spec.training.method for finding in plain}
    missing = [name for method, name in KNOWN_TO_GET_THROUGH.items() if method not in tried]
    limit = f"at least {percent(CONTROL_SHARE)}"
    which = "those that can be compared" if any(finding.share is None for finding in plain) else "these recipes"
    text = f"{_shares(through)} ({limit} counts)." if through else f"none of {which} ({limit} would count)."
    if unsettled:
        names = _listed([finding.attack.spec.name for finding in unsettled])
        text += f" Not settled, as the learning rates do not bracket the best one: {names}."
    if missing and not through:
        text += f" {_listed(missing)} were not tried and usually get through: --suite quick tries them."
    return text


def _undone(informed: Sequence[Finding]) -> str:
    known = sorted((each for each in informed if each.share is not None), key=lambda each: -(each.share or 0.0))
    if not known:
        why = "what undoes it was not measured" if informed else "no attack here knew the construction"
        return f"{why}, so nothing here bounds an attacker who does."
    names = []
    for finding in known:
        variant = finding.attack.spec.variant
        first = f"{variant.label} first" if variant.choice.informed is not None else variant.label
        names.append(f"{first}, {finding.attack.spec.trained} reaches {percent(finding.share)}")
    text = f"{'; '.join(names[:MAX_NAMED])}."
    if known[0].verdict == "not slowed":
        text += " Hardening does not stop people who know about it."
    return text


def _shares(found: Sequence[Finding]) -> str:
    names = [f"{finding.attack.spec.name} reaches {percent(finding.share)}" for finding in found]
    return _listed(names)


def _listed(names: Sequence[str], last: str = " and ") -> str:
    """Each name once, the first :data:`MAX_NAMED` of them."""
    shown = list(dict.fromkeys(names))
    if len(shown) > MAX_NAMED:
        shown, last = [*shown[:MAX_NAMED], f"{len(shown) - MAX_NAMED} more"], " and "
    return last.join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _edit_sentence(finding: Finding) -> str:
    """Describe an edit of the model and of its control, with an answer of a model that it broke."""
    attack, control = finding.attack, finding.attack.control
    text = f"{attack.spec.name}, the model has {edit_words(finding)}"
    if control is not None and control.edit is not None:
        text += f"; the base has {percent(control.edit.left)} and {number(control.edit.kl, 2)}"
    text += f" ({finding.verdict})."
    if finding.verdict == "broken" and attack.behaviour is not None and attack.behaviour.answers:
        text += f" It answers “{attack.behaviour.answers[0][1][:60]}”."
    return text


def _utility_sentence(found: Sequence[Finding]) -> list[str]:
    measured = [finding for finding in found if finding.useful_share is not None]
    if not measured:
        return []
    strongest = max(measured, key=lambda finding: finding.useful_share or 0)
    return [
        f"With perplexity on retained text within {percent(UTILITY_LIMIT)} of the start's, the strongest attack "
        f"({strongest.attack.spec.name}) makes {percent(strongest.useful_share)} of the control's progress, "
        f"and the control itself {percent(strongest.control_useful_share)}."
    ]
