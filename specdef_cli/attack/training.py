"""What an attack trains: all parameters, some of them, or adapters, and where on a hardened layer those are put."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from specdef_cli.errors import SpecDefError

Method = Literal["full", "lora", "dora", "ia3", "prompt"]
Placement = Literal["linears", "inflated", "compensation", "around"]

ADAPTERS: dict[Method, str] = {"lora": "LoRA", "dora": "DoRA", "ia3": "IA³", "prompt": "prompt tuning"}
_PLACES: dict[Placement, str] = {
    "inflated": "inflated factors",
    "compensation": "compensations",
    "around": "whole pairs",
}


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        method: ``full`` trains the model's own parameters; the others are PEFT's adapters.
        parameters: Globs of parameter names; where given, only these train. For ``full`` alone.
        targets: Modules that get adapters, by the end of their name as PEFT takes them. Empty means every linear, or
            what PEFT takes by default for this architecture where ``peft_default`` is set.
        peft_default: See ``targets``: for Llama, query and value projections.
        placement: What of the ``targets`` that are hardened layers gets the adapter: one of the factors, or the pair
            as a whole, in parallel to it. An ordinary layer gets it itself, so that a control can be trained alike.
        rank, alpha: As PEFT takes them. Of LoRA and DoRA alone; α defaults to twice the rank.
        name: What to call it in a table; by default it is put together from the rest. Two trainings that differ in
            their names alone are the same one.
    """

    method: Method = "full"
    parameters: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    peft_default: bool = False
    placement: Placement = "linears"
    rank: int | None = None
    alpha: float | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise SpecDefError(f"recipe {self.method!r} is unknown", f"Choose one of: {', '.join(get_args(Method))}.")
        if self.placement not in get_args(Placement):
            raise SpecDefError(
                f"placement {self.placement!r} is unknown", f"Choose one of: {', '.join(get_args(Placement))}."
            )
        if self.parameters and self.method != "full":
            raise SpecDefError(
                f"{self.parameters[0]} selects among the model's own parameters, and {ADAPTERS[self.method]} trains "
                "none of them",
                "Use the recipe full for parameters, or choose adapters by their targets.",
            )
        if self.rank is not None and self.rank < 1:
            raise SpecDefError(f"rank {self.rank} is not positive", "Give 1 or more.")

    @property
    def label(self) -> str:
        """In words for a table: ``full``, ``LoRA all-linear``, ``full on *.norm.*``."""
        if self.name:
            return self.name
        if self.method == "full":
            return f"full on {','.join(self.parameters)}" if self.parameters else "full"
        if self.method == "prompt":
            return ADAPTERS[self.method]
        if self.placement != "linears":
            return f"{ADAPTERS[self.method]} on {_PLACES[self.placement]}"
        return f"{ADAPTERS[self.method]} {','.join(self.targets) or ('default' if self.peft_default else 'all-linear')}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return dataclasses.asdict(self) | {"parameters": list(self.parameters), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Training:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: A key is unknown.
        """
        lists: dict[str, Any] = {key: tuple(data[key]) for key in ("parameters", "targets") if key in data}
        return cls(**{**data, **lists})


def adapters(method: Method, rank: int = 16, alpha: float | None = None, **where: Any) -> Training:
    """Adapters of a method, with the rank where it has one."""
    ranked: dict[str, Any] = {"rank": rank, "alpha": alpha or 2.0 * rank} if method in ("lora", "dora") else {}
    return Training(method, **ranked, **where)
