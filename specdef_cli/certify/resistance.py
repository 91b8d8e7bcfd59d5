"""What attacks got through, as a certificate tells it: read from an attack report, or measured by the quick suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specdef_cli.attack.results import AttackReport
from specdef_cli.errors import SpecDefError
from specdef_cli.report.document import ReportDocument, read_report, report_document


@dataclass(frozen=True)
class AttackFigure:
    """One attack at its best learning rate.

    Attributes:
        label: What was run.
        knowledge: ``none``, ``construction`` or ``growth``.
        learning_rate: The best of those tried.
        share: Of the progress of the control by the same recipe; ``None`` where the control made none.
        share_of_best: Of the most that any control of the report made, by any recipe.
        verdict: ``stopped``, ``slowed``, ``not slowed`` or ``unknown``.
    """

    label: str
    knowledge: str
    learning_rate: float
    share: float | None
    share_of_best: float | None
    verdict: str


@dataclass(frozen=True)
class Resistance:
    """What was tried, at which budget, and what got through.

    Attributes:
        model: The model that was attacked, as the report names it.
        data: What was trained on.
        budget: In words.
        attacks: Those on the hardened model.
    """

    model: str
    data: str
    budget: str
    attacks: tuple[AttackFigure, ...]

    @property
    def got_through(self) -> tuple[AttackFigure, ...]:
        """Attacks that were not slowed."""
        return tuple(attack for attack in self.attacks if attack.verdict == "not slowed")


def read_resistance(path: Path, checkpoint: str) -> Resistance:
    """The figures of a ``report.json``.

    Args:
        path: The file that ``specdef attack`` wrote.
        checkpoint: Fingerprint of the model that is certified.

    Raises:
        SpecDefError: It is not a report, or not of this model.
    """
    document = _with_runs(path)
    attacked = {run.spec.checkpoint for run in document.runs if run.spec.subject == "model"}
    if attacked != {checkpoint}:
        raise SpecDefError(
            f"{path} is a report on {_public(document.model.name)}, whose weights are others than these",
            "Give the report of an attack on this very directory: `specdef attack` makes one.",
        )
    return _resistance(document)


def quoted_resistance(path: Path) -> Resistance:
    """The figures of a ``report.json``, of whatever model it is.

    Raises:
        SpecDefError: It is not a report, or has no runs.
    """
    return _resistance(_with_runs(path))


def resistance_of(report: AttackReport) -> Resistance:
    """The figures of a report in memory."""
    return _resistance(report_document(report))


def _with_runs(path: Path) -> ReportDocument:
    document = read_report(path)
    if not any(run.spec.subject == "model" for run in document.runs):
        raise SpecDefError(f"{path} is an attack report without runs", "Give a finished report of `specdef attack`.")
    return document


def _public(name: str) -> str:
    """A name without the path of a directory or file of this machine."""
    return Path(name).name if Path(name).expanduser().exists() else name


def _resistance(document: ReportDocument) -> Resistance:
    return Resistance(
        model=_public(document.model.name),
        data=_public(document.data.name),
        budget=document.runs[0].spec.in_words,
        attacks=tuple(
            AttackFigure(
                label=attack.label,
                knowledge=attack.knowledge,
                learning_rate=attack.learning_rate,
                share=attack.share,
                share_of_best=attack.share_of_best,
                verdict=attack.verdict,
            )
            for attack in document.attacks
            if attack.subject == "model"
        ),
    )
