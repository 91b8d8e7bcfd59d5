"""What attacks found, as certificate and model card tell it: read from the report of ``specdef attack``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.results import same_start
from specdef_cli.checkpoint.files import write_durably
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.card import HEADING as CARD_HEADING
from specdef_cli.model.opened import open_base, open_model
from specdef_cli.report import cell, number, percent, rate
from specdef_cli.report.document import ReportDocument, read_report

HEADING = "### Attacks"


@dataclass(frozen=True)
class AttackFigure:
    """One attack at its best learning rate."""

    label: str
    """What was run."""
    knowledge: str
    """``none``, ``construction`` or ``growth``."""
    learning_rate: float
    """The best of those tried."""
    share: float | None
    """Of the progress of the control by the same recipe; ``None`` where the control made none."""
    share_of_best: float | None
    """Of the most that any control of the report made, by any recipe."""
    verdict: str
    """``stopped``, ``slowed``, ``not slowed`` or ``unknown``; of an edit, also ``broken``."""
    refusals: float | None = None
    """Share of unwanted prompts that the model refuses afterwards; ``None``: not measured."""
    kl: float | None = None
    """KL divergence (nats) on harmless prompts from the model before the attack; ``None``: not measured."""


@dataclass(frozen=True)
class Resistance:
    """What was tried, at which budget, and what got through."""

    model: str
    """The model that was attacked, as the report names it."""
    data: str
    """What was trained on."""
    budget: str
    """In words."""
    attacks: tuple[AttackFigure, ...]
    """Those on the hardened model."""

    @property
    def got_through(self) -> tuple[AttackFigure, ...]:
        """Attacks that were not slowed."""
        return tuple(attack for attack in self.attacks if attack.verdict == "not slowed")


def read_resistance(path: Path, checkpoint: str | None = None, base: str | None = None) -> Resistance:
    """The figures of a ``report.json``.

    Args:
        checkpoint: Fingerprint of the model that it must be of; ``None`` for any.
        base: Fingerprint of the model that its control must be, or compute the same as; ``None`` for any.
    """
    document = read_report(path)
    attacked = {run.spec.checkpoint for run in document.runs if run.spec.subject == "model"}
    if not attacked:
        raise SpecDefError(f"{path} is an attack report without runs", "Give a finished report of `specdef attack`.")
    if checkpoint is not None and attacked != {checkpoint}:
        raise SpecDefError(
            f"{path} is a report on {_public(document.model.name)}, which has other weights",
            "Give the report of an attack on this very directory: `specdef attack` makes one.",
        )
    controls = {run.spec.checkpoint for run in document.runs if run.spec.subject == "control"}
    if base is not None and controls != {base} and not _starts_as_its_control(document):
        raise SpecDefError(
            f"{path} compares with {_public(document.control.name)}, which starts at another loss than the model",
            "Give the report of an attack whose --control is the base.",
        )
    return Resistance(
        model=_public(document.model.name),
        data=_public(document.data.name),
        budget=document.runs[0].spec.in_words,
        attacks=tuple(
            AttackFigure(**{field.name: getattr(attack, field.name) for field in fields(AttackFigure)})
            for attack in document.attacks
            if attack.subject == "model"
        ),
    )


def _starts_as_its_control(document: ReportDocument) -> bool:
    """Whether an attack starts at a control's loss, as hardening keeps the function: a copy has another fingerprint."""
    attacked, controls = (
        [run.loss.start for run in document.runs if run.spec.subject == subject] for subject in ("model", "control")
    )
    return any(same_start(start, control) for start in attacked for control in controls)


def _public(name: str) -> str:
    """Strip the path from the name of a directory or file, which may have gone since; a Hub id stays."""
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@.*)?", name) and not Path(name).exists()
    return name if on_hub else Path(name).name


def attack_table(attacks: Sequence[AttackFigure]) -> list[str]:
    """One row for each attack, those first that made the most progress, in Markdown."""
    asked = any(attack.kl is not None for attack in attacks)
    headings = ["attack", "the attacker knows", "best η", "of its own control", "of the best control", ""]
    rows = [[*headings, "KL, harmless prompts", "refusals"], ["---"] * 8]
    for attack in sorted(attacks, key=lambda each: each.share_of_best or 0.0, reverse=True):
        shares = percent(attack.share), percent(attack.share_of_best)
        answers = number(attack.kl, 2), percent(attack.refusals)
        rows.append(
            [cell(attack.label), attack.knowledge, rate(attack.learning_rate), *shares, attack.verdict, *answers]
        )
    return [f"| {' | '.join(row if asked else row[:6])} |" for row in rows]


def attack_section(resistance: Resistance) -> str:
    """The section: budget, table, and what got through."""
    return "\n".join(
        (
            HEADING,
            "",
            f"Measured on these very files: {resistance.budget}; {resistance.data}. Every attack at the best of the "
            "learning rates tried. Its progress is a share of the same recipe's on the base (own control), and of the "
            "most that any recipe made there (best control).",
            "",
            *attack_table(resistance.attacks),
            "",
            *got_through(resistance),
        )
    )


def got_through(resistance: Resistance) -> list[str]:
    """Name the attacks that were not slowed."""
    names = "; ".join(cell(attack.label) for attack in resistance.got_through)
    through = (
        f"Got through (at least 95 % of the control's progress): {names}." if names else "None of them got through."
    )
    return [f"{through} Nothing is claimed of attacks, budgets and data that are not listed here."]


def with_section(card: str, section: str) -> str:
    """Replace the section with the same heading in a hardened directory's card, or append it."""
    base, mark, parts = _parts(card)
    places = _places(parts, section)
    if places:
        parts[places[0]] = section
    else:
        parts.append(section)
    return base + mark + "\n" + "\n\n".join(part.strip("\n") for part in parts) + "\n"


def section_like(card: str, section: str) -> str | None:
    """The card's section with the same heading; ``None`` where it has none."""
    _, _, parts = _parts(card)
    places = _places(parts, section)
    return parts[places[0]].strip("\n") if places else None


def _parts(card: str) -> tuple[str, str, list[str]]:
    """Split a card: the base's part, our heading, and our sections."""
    base, mark, ours = card.rpartition(f"\n{CARD_HEADING}\n")
    return base, mark, re.split(r"^(?=### )", ours, flags=re.MULTILINE)


def _places(parts: Sequence[str], section: str) -> list[int]:
    heading = section.splitlines()[0]
    return [number for number, part in enumerate(parts) if part.splitlines()[:1] == [heading]]


def attacks_on_card(options: AttackOptions, report: Path) -> None:
    """Write what an attack report says into the card of the hardened directory that was attacked."""
    hardened = open_model(options, hardened=True)
    base = None
    if options.control is not None:
        try:
            base = open_base(hardened, None, "--control", token=options.token).fingerprint
        except SpecDefError:  # it is gone, and losses tell what the control was
            base = ""
    card = hardened.directory / "README.md"
    section = attack_section(read_resistance(report, hardened.fingerprint, base))
    write_durably(card, with_section(card.read_text(encoding="utf-8", errors="replace"), section))
