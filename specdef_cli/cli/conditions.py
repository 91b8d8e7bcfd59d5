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

from specdef_cli.errors import WrongUsage

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
    "steps_to_control": lambda finding: _steps_to_control(finding),
    "share_of_control": lambda finding: finding.share,
    "best_loss": lambda finding: finding.best,
    "refusals": lambda finding: finding.refusals,
}
_FRACTIONS = ("share_of_control", "refusals")


def _steps_to_control(finding: Finding) -> float | None:
    """Never reached within the budget counts as infinitely many; nothing does where the control learned nothing."""
    return float("inf") if finding.steps_to_control is None and finding.share is not None else finding.steps_to_control


@dataclass(frozen=True)
class Condition:
    """``metric operator value``, as the user wrote it."""

    text: str
    metric: str
    operator: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition."""
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", text)
        try:
            if match is None or match[1] not in _METRICS:
                raise ValueError
            condition = cls(text, match[1], match[2], float(match[3]))
            if condition.metric in _FRACTIONS and abs(condition.value) > 2:  # 20 for 20 % is a gate that never fails
                raise ValueError
            return condition
        except ValueError as error:
            raise WrongUsage(
                f"--fail-if {text!r} is not a condition",
                f"Write a metric ({', '.join(_METRICS)}), one of {' '.join(_OPERATORS)} and a number, e.g. "
                f"'steps_to_control<500'; {' and '.join(_FRACTIONS)} are fractions, 0.2 for 20 %.",
            ) from error

    def failures(self, report: AttackReport) -> tuple[str, ...]:
        """Why a gate on this condition fails, one line each: what was not measured holds nothing back."""
        from specdef_cli.report.findings import findings

        failed = [f"{label} was not reached within --time-limit" for label in report.not_reached]
        plain = [found for found in findings(report) if found.attack.subject == "model"]
        plain = [found for found in plain if found.attack.knowledge == "none" and self._concerns(found)]
        for finding in plain:
            value = _METRICS[self.metric](finding)
            if value is None:
                failed.append(f"{finding.attack.label}: {self.metric} was not measured, as {_why(finding)}")
            elif _OPERATORS[self.operator](value, self.value):
                failed.append(f"{finding.attack.label} meets {self.text}")
        return tuple(failed) or ((f"no attack was measured for {self.text}",) if not plain else ())

    def _concerns(self, finding: Finding) -> bool:
        """An edit has no steps and no loss, and one that breaks the model has no answers."""
        if finding.edit is None:
            return True
        return self.metric == "share_of_control" or (self.metric == "refusals" and finding.verdict != "broken")


def _why(finding: Finding) -> str:
    if finding.start is not None and finding.share is not None:
        return "its best run diverged, or no --prompts were given"
    return "its start is not finite" if finding.start is None else "the control learned nothing by the same recipe"
