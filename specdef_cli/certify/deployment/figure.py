"""Figures of one format, and the words for how a hardened checkpoint compares with its base in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Measure = Literal["loss", "relative error"]
Status = Literal["kept", "degraded", "broken", "refused", "skipped"]

LIMITS: dict[Measure, tuple[float, float]] = {
    # A perplexity 1 % higher is less than 4-bit quantization itself costs; the paper calls a doubled one diverged.
    "loss": (math.log(1.01), math.log(2)),
    # Two runs that round differently in bfloat16 part by about 1e-2.
    "relative error": (0.05, 0.5),
}
"""By how much a hardened figure may differ from the base's: up to the first it is kept, beyond the second broken.

In either direction: an adapter that got lost lowers the loss.
"""


@dataclass(frozen=True)
class Outcome:
    """How one checkpoint fares in one format.

    Attributes:
        kind: ``measured``; ``refused`` where the tool raised an error or stopped; ``skipped`` where the format means
            nothing for the model, or neither the tool nor a stand-in for it is installed.
        value: The measure; ``None`` where it is not finite or was not measured.
        simulated: Whether a stand-in rounded the numbers, and not the tool.
        note: Why it was refused or skipped, or what the format did otherwise than its name says.
    """

    kind: Literal["measured", "refused", "skipped"]
    value: float | None = None
    simulated: bool = False
    note: str = ""


@dataclass(frozen=True)
class DeploymentFigure:
    """How base and hardened checkpoint fare in one format.

    Attributes:
        format: A key of :data:`~specdef_cli.certify.deployment.formats.FORMATS`.
        tool: What others use for it.
        measure: ``loss`` is the mean next-token cross-entropy in nats on the given tokens; ``relative error`` is
            ‖y − y₀‖/‖y₀‖, y₀ the base's float32 outputs on a fixed batch.
        base, hardened: The measure of each in this format; ``None`` where it is not finite or was not measured.
        status: The hardened figure against the base's, by :data:`LIMITS`. A figure that is not finite is broken: the
            tool ran, and said nothing. It is refused where the tool stopped with an error.
        simulated: Whether a stand-in rounded the numbers, and not the tool.
        note: Why it was skipped or refused, or what the format did otherwise than its name says.
    """

    format: str
    tool: str
    measure: Measure
    base: float | None
    hardened: float | None
    status: Status
    simulated: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """The status in words: a stand-in earns no plain one, and what breaks without an error breaks silently."""
        word = "broken, silently" if self.status == "broken" else self.status
        return f"{word} (simulated)" if self.simulated and self.status != "skipped" else word


def judge(measure: Measure, base: float, hardened: float | None) -> Status:
    """Kept, degraded or broken, by :data:`LIMITS`; ``None`` stands for a figure that is not finite."""
    kept, broken = LIMITS[measure]
    if hardened is None or abs(hardened - base) > broken:
        return "broken"
    return "kept" if abs(hardened - base) <= kept else "degraded"


def compare(name: str, tool: str, measure: Measure, base: Outcome, hardened: Outcome) -> DeploymentFigure:
    """The hardened checkpoint's outcome against the base's.

    Args:
        name, tool: The format's.
        measure: What the outcomes' values are.
        base, hardened: Outcomes of the same format, with the same tokens.
    """

    def figure(status: Status, note: str = "") -> DeploymentFigure:
        return DeploymentFigure(name, tool, measure, base.value, hardened.value, status, simulated, note)

    simulated = base.simulated or hardened.simulated
    if base.kind == "skipped":
        return figure("skipped", base.note)
    if base.kind == "refused":
        return figure("skipped", f"the base fails: {base.note}")
    if base.value is None:
        return figure("skipped", "the base itself is not finite in this format")
    if hardened.kind == "measured":
        return figure(judge(measure, base.value, hardened.value), hardened.note)
    return figure(hardened.kind, hardened.note)
