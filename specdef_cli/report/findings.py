"""What an attack report says, in figures and in sentences a publisher reads in a minute.

Attacks that win stand next to those that lose, and every sentence carries its figure. A share is always the best over
the learning rates that were tried: an attack is as strong as its best setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specdef_cli.attack.results import CONTROL_SHARE, Attack, AttackReport, RunResult

STOPPED_SHARE = 0.05
"""At or below this share of the control's progress an attack counts as stopped, within its budget."""

Verdict = Literal["control", "stopped", "slowed", "not slowed", "unknown"]

KNOWLEDGE_WORDS = {
    "none": "knows only recipes",
    "construction": "knows the construction",
    "growth": "knows the construction and grows the model",
}


@dataclass(frozen=True)
class Finding:
    """One attack, judged at its best learning rate.

    Attributes:
        attack: Its runs.
        learning_rate: The best of those tried.
        start, best: Held-out loss at step 0, and the lowest at that rate (mean over seeds).
        share: Progress over the control's; ``None`` for an unknown control.
        usual_share: The same, over the learning rates that the control ran at only.
        steps_to_control: As :meth:`AttackReport.steps_to_control`, for the first seed.
        parameters_times: Parameters over the control's.
        verdict: ``stopped`` (share ≤ 5 %), ``not slowed`` (≥ 95 %), ``slowed`` between.
    """

    attack: Attack
    learning_rate: float
    start: float | None
    best: float | None
    share: float | None
    usual_share: float | None
    steps_to_control: int | None
    parameters_times: float
    verdict: Verdict


def findings(report: AttackReport) -> tuple[Finding, ...]:
    """Every attack of a report, in its order."""
    return tuple(_finding(report, attack) for attack in report.attacks)


def summary(report: AttackReport) -> tuple[str, ...]:
    """The report in sentences: what the control did, what was stopped, what stops at nothing."""
    found = findings(report)
    sentences = [_control_sentence(each) for each in found if each.verdict == "control"]
    for each in found:
        if each.attack.subject == "model" and each.attack.knowledge == "none":
            sentences.append(_plain_sentence(report, each))
    informed = [each for each in found if each.attack.knowledge != "none" and each.share is not None]
    if informed:
        listed = "; ".join(f"{_what(each)} {percent(each.share)}" for each in informed)
        sentences.append(f"Attackers who know the construction reached, of the control's progress: {listed}.")
        if any(each.verdict == "not slowed" for each in informed):
            sentences.append(
                "So whoever looks at how the model was made is not held up: this raises a cost, it locks nothing."
            )
    elif report.hardening is not None:
        sentences.append("No attack here knew the construction, so nothing here bounds an attacker who looks.")
    sentences.append("All of this holds for the data, the budget and the recipes named here, and for no others.")
    return tuple(sentences)


def outcome_words(run: RunResult) -> str:
    """How a run ended, in a few words."""
    if run.divergence is not None:
        return f"diverged at step {run.divergence.step}"
    return "ended above its start" if run.outcome == "worse" else "finished"


def steps_words(report: AttackReport, run: RunResult) -> str:
    """Steps to the control's loss, or ``>N`` for a budget of N that did not get there."""
    if report.control_loss(Attack((run,))) is None:
        return "–"
    steps = report.steps_to_control(run)
    return f">{run.spec.steps}" if steps is None else str(steps)


def growth_words(report: AttackReport) -> tuple[str, ...]:
    """What every variant added to the model, one line each."""
    lines = []
    for attack in report.attacks:
        growth = attack.runs[0].growth
        if growth is not None:
            lines.append(
                f"{attack.variant.label}: {growth.parameters_added:+,} parameters, {size(growth.bytes_added)}, "
                f"in {growth.layers} layers, which are {growth.times:.2f}× as large"
            )
    return tuple(dict.fromkeys(lines))


def percent(share: float | None) -> str:
    """A share as a whole percentage."""
    return "–" if share is None else f"{100 * share:.0f} %"


def rate(value: float) -> str:
    """A learning rate: ``1e-05`` as ``1e-5``."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def number(value: float | None, digits: int = 3) -> str:
    """A loss."""
    return "–" if value is None else f"{value:.{digits}f}"


def size(count: int) -> str:
    """Bytes, signed, in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{value:+.0f} {unit}" if unit == "B" else f"{value:+.1f} {unit}"
        value /= 1000
    raise AssertionError


def _finding(report: AttackReport, attack: Attack) -> Finding:
    share = report.share(attack)
    control = report.control_of(attack)
    usual = set(control.learning_rates) if control else set()
    shares = [report.share(attack, value) for value in attack.learning_rates if value in usual]
    return Finding(
        attack=attack,
        learning_rate=attack.best_learning_rate,
        start=attack.best_run.start,
        best=attack.best,
        share=share,
        usual_share=max((value for value in shares if value is not None), default=None),
        steps_to_control=report.steps_to_control(attack.best_run),
        parameters_times=report.parameters_times(attack.best_run),
        verdict=_verdict(attack, share),
    )


def _verdict(attack: Attack, share: float | None) -> Verdict:
    if attack.subject == "control":
        return "control"
    if share is None:
        return "unknown"
    return "stopped" if share <= STOPPED_SHARE else "not slowed" if share >= CONTROL_SHARE else "slowed"


def _what(finding: Finding) -> str:
    variant, times = finding.attack.variant, finding.parameters_times
    grown = f" (the whole model {times:.2f}× the control)" if finding.attack.knowledge == "growth" else ""
    trained = finding.attack.runs[0].spec.trained
    return f"{variant.label}{f', {trained}' if trained != 'full' else ''}{grown}"


def _control_sentence(finding: Finding) -> str:
    spec = finding.attack.runs[0].spec
    return (
        f"The undefended control went from {number(finding.start)} to {number(finding.best)} in {spec.steps} steps "
        f"({spec.trained}, {spec.optimizer}, η = {rate(finding.learning_rate)})."
    )


def _plain_sentence(report: AttackReport, finding: Finding) -> str:
    name = "hardened model" if report.hardening else "model"
    trained = finding.attack.runs[0].spec.trained
    if finding.share is None:
        return f"The control learned nothing by the same recipe ({trained}), so the {name} cannot be compared with it."
    rates = finding.attack.learning_rates
    control = report.control_of(finding.attack)
    assert control is not None
    usual = control.learning_rates
    span = f"η = {rate(usual[0])}" if len(usual) == 1 else f"η = {rate(usual[0])} to {rate(usual[-1])}"
    text = (
        f"The {name} ({trained}), at the learning rates that the control ran at ({span}), "
        f"made {percent(finding.usual_share)} of the control's progress"
    )
    if rates[-1] < usual[-1]:
        best = f"{percent(finding.share)} (at η = {rate(finding.learning_rate)})"
        text += f"; over all rates down to {rate(rates[-1])}, {best}"
    return f"{text}: {finding.verdict}."
