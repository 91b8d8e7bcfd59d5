"""The variants of an attack: what is done to the loaded model before it is trained, as a table.

A row is all that the rest of the package knows of a variant: what it is called, which function makes it, what the
attacker has to know, which models it works on, and in which reports it belongs. The function changes the model in place
and keeps what it computes, but for edits, which are an attack by themselves and are not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Final, Literal

from specdef_cli.attack.table import Factor, Table, checked_factor, parse_number
from specdef_cli.checkpoint.changes import Change

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


Knowledge = Literal["none", "construction", "growth"]
Scope = Literal["factored", "folded", "scaled", "any"]

INFORMED: Final = "informed"
"""In a suite: the variants that belong in every report on the model at hand."""


@dataclass(frozen=True)
class VariantChoice:
    """A row of the table."""

    name: str
    function: str | None
    """``package.module:name`` of a function that changes a model in place; ``None`` for the model as it is. It takes
    ``factor`` and ``seed`` by keyword where the row says so. Of an edit, a function of the model, the direction to take
    out, and how much of it."""
    knowledge: Knowledge
    """What the attacker must know: ``none`` (only recipes), the ``construction``, or the construction plus memory for a
    larger model (``growth``)."""
    label: str  # a few words for a table; {factor:g} stands for the factor
    help: str
    needs: Scope = "any"
    """What a model must have for it: factors, folded pairs, scaled modules, or nothing in particular."""
    factor: Factor | None = None  # the number it takes; None where it takes none
    random: bool = False  # whether it draws initial values, and so takes the run's seed
    trains_inflated: bool = False
    """Whether it trains what hardening inflated: its best learning rate may lie far below the usual."""
    swept: tuple[float, ...] = ()  # of an edit: how much of the direction is taken out, where no factor says so
    informed: Scope | None = None
    """On which models it belongs in every report, as it undoes how they were made; ``None``: on none."""

    @property
    def edits(self) -> bool:
        """Whether it changes what the model computes, and nothing is trained afterwards."""
        return bool(self.swept)

    def load(self) -> Callable[..., None]:
        assert self.function is not None
        return resolve_name(self.function)


_HERE = "specdef_cli.attack.variants"
_STRENGTH = Factor("strength", 1.0, whole=False)
_STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)

VARIANTS: Table[VariantChoice] = Table(
    "variant",
    "specdef.attack_variants",
    VariantChoice,
    (
        VariantChoice("plain", None, "none", "", "The model as it was published.", trains_inflated=True),
        VariantChoice(
            "collapse", f"{_HERE}.factored:collapse", "construction", "collapsed",
            "Multiply the factors of every layer: back to the original layer.",
            needs="factored", informed="factored",
        ),
        VariantChoice(
            "unscale", f"{_HERE}.scales:unscale", "construction", "unscaled",
            "Multiply every scale vector into its weight: back to the original module.",
            needs="scaled", informed="scaled",
        ),
        VariantChoice(
            "rebalance", f"{_HERE}.scales:rebalance", "construction", "rebalanced",
            "Equalize both sides of every symmetric pair: undoes a fold.",
            informed="folded",
        ),
        VariantChoice(
            "equalise", f"{_HERE}.scales:equalise", "none", "equalised",
            "Merge norm gains into their readers, equalise up and down, value and output: as converters do.",
            trains_inflated=True,
        ),
        VariantChoice(
            "channel-rates", f"{_HERE}.scales:scale_rates", "construction", "a rate for each channel",
            "A learning rate for every row and column, in proportion to its size.",
        ),
        VariantChoice(
            "freeze-compensation", f"{_HERE}.factored:freeze_compensation", "construction", "compensation frozen",
            "Freeze the compensation of every pair of factors.",
            needs="factored",
        ),
        VariantChoice(
            "width", f"{_HERE}.factored:widen", "growth", "width {factor:g}×",
            "Freeze what was rescaled and set a fresh parallel path beside it; on a fold, beside every block.",
            factor=Factor("growth", 2.0, above=1.0, whole=False), random=True,
        ),
        VariantChoice(
            "depth", f"{_HERE}.factored:deepen", "growth", "depth {factor:g}",
            "Split inflated factors into several (the paper's Theorem 8); on a fold, fresh blocks in between.",
            factor=Factor("number of factors", 2, above=1.0), random=True, trains_inflated=True,
        ),
        VariantChoice(
            "inject", f"{_HERE}.factored:inject", "growth", "layer injected",
            "Freeze every pair of factors and put a trainable identity layer after it.",
            needs="factored",
        ),
        VariantChoice(
            "abliterate", f"{_HERE}.edits:ablate", "none", "abliterated",
            "Take the direction between two kinds of prompts out of all that writes to the residual stream.",
            factor=_STRENGTH, swept=_STRENGTHS,
        ),
        VariantChoice(
            "abliterate-rows", f"{_HERE}.edits:ablate_rows", "none", "abliterated by rows",
            "The same with the norms of rows kept, by a difference of low rank, as common tools do.",
            factor=_STRENGTH, swept=_STRENGTHS,
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A variant as it is asked for: ``collapse``, ``width:2``."""

    kind: str = "plain"
    factor: float | None = None
    """The number it takes; its default where none is given, and of an edit none, for all of them."""

    def __post_init__(self) -> None:
        choice = VARIANTS.choose(self.kind)
        if choice.edits and self.factor is None:
            return
        object.__setattr__(self, "factor", checked_factor(f"variant {self.kind}", choice.factor, self.factor))

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read a variant: ``collapse``, ``width:2``, ``width:1.5x``; ``width`` takes the default factor."""
        kind, colon, number = text.partition(":")
        VARIANTS.choose(kind)
        return cls(kind, parse_number(kind, number) if colon else None)

    def __str__(self) -> str:
        return self.kind if self.factor is None else f"{self.kind}:{self.factor}"

    @property
    def choice(self) -> VariantChoice:
        return VARIANTS[self.kind]

    @property
    def knowledge(self) -> Knowledge:
        return self.choice.knowledge

    @property
    def label(self) -> str:
        label = self.choice.label.format(factor=self.factor)
        return label if self.factor is None or not self.choice.edits else f"{label} at {self.factor:g}"

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of an edit, in the order in which they are tried."""
        return self.choice.swept if self.factor is None else (self.factor,)

    def applies_to(self, constructions: Collection[Change]) -> bool:
        """Whether a model with these constructions has what the variant works on."""
        return _within(self.choice.needs, constructions)

    def apply(self, model: PreTrainedModel, seed: int) -> None:
        if self.choice.function is None:
            return
        arguments: dict[str, Any] = {} if self.factor is None else {"factor": self.factor}
        if self.choice.random:
            arguments["seed"] = seed
        self.choice.load()(model, **arguments)

    def edit(self, model: PreTrainedModel, direction: Tensor, strength: float) -> None:
        """Take a direction out of ``model`` in place, by an edit."""
        self.choice.load()(model, direction, strength)


def informed_variants(constructions: Collection[Change], *, surely_folded: bool = False) -> tuple[Variant, ...]:
    """The variants that belong in every report on a model with these constructions."""
    undoing = tuple(
        Variant(name)
        for name, choice in VARIANTS.items()
        if choice.informed is not None and _within(choice.informed, constructions)
    )
    return tuple(variant for variant in undoing if variant.choice.informed == "folded") if surely_folded else undoing


def _within(scope: Scope, constructions: Collection[Change]) -> bool:
    return scope == "any" or scope in constructions
