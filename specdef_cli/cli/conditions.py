"""Conditions such as ``steps_to_control<500``, so that a release pipeline can fail on what an attack found.

A condition is held against every attack on the model that knows nothing of the construction. Attacks that know it
always get through, so a condition on them would always be met.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specdef_cli.errors import SpecDefError

if TYPE_CHECKING:
    from specdef_cli.attack.results import AttackReport
    from specdef_cli.report.findings import Finding

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_METRICS: dict[str, Callable[[Finding], float | None]] = {
    # Never reached within the budget counts as infinitely many steps.
    "steps_to_control": lambda finding: float("inf") if finding.steps_to_control is None else finding.steps_to_control,
    "share_of_control": lambda finding: finding.share,
    "best_loss": lambda finding: finding.best,
    "refusals": lambda finding: finding.refusals,
}


@dataclass(frozen=True)
class Condition:
    """``metric operator value``, as the user wrote it."""

    text: str
    metric: str
    operator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition.

        Raises:
            SpecDefError: It is not one.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", text)
        try:
            if match is None or match[1] not in _METRICS:
                raise ValueError
            return cls(text, match[1], match[2], float(match[3]))
        except ValueError as error:
            raise SpecDefError(
                f"--fail-if {text!r} is not a condition",
                f"Write e.g. 'steps_to_control<500'; metrics: {', '.join(_METRICS)}.",
            ) from error

    def met_by(self, report: AttackReport) -> tuple[Finding, ...]:
        """The attacks without knowledge of the construction that meet the condition."""
        from specdef_cli.report.findings import findings

        met = []
        for finding in findings(report):
            if finding.attack.subject != "model" or finding.attack.knowledge != "none":
                continue
            value = _METRICS[self.metric](finding)
            if value is not None and _OPERATORS[self.operator](value, self.value):
                met.append(finding)
        return tuple(met)
