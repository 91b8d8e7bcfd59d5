"""Runs of a search that cannot become its best any more, and searches whose end is known: what makes a search cheap.

Every rule is a pure function of curves. What they save and what they miss was measured on complete searches, which
``--thorough`` makes: see docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from specdef_cli.attack.run_result import EvalPoint, RunResult

POWER = 2
"""From half of its steps on, a run's progress grows with this power of the steps at most. Adapters whose product starts
at zero begin with the square; what trains the weights themselves begins with the first power and slows down."""

SLACK = 1e-2
"""So much more than that may still come, as a share of the loss at the start: near the start, chance decides."""

STILL = 1e-4
"""A held-out loss that stayed within this share of the start by half of the steps belongs to a model that stands still.
"""

SAME = 1e-3
"""Held-out losses that agree to this share are the same."""


@dataclass(frozen=True)
class Lead:
    """What a search knows before a run of it.

    Attributes:
        progress: Of its best run so far (nats): what has to be beaten.
        start: The evaluation at step 0, which is the same at every learning rate; ``None`` before the first run.
    """

    progress: float = 0.0
    start: EvalPoint | None = None

    @classmethod
    def of(cls, runs: Iterable[RunResult]) -> Lead:
        """What finished runs of one attack tell."""
        finished = [run for run in runs if run.evaluations]
        if not finished:
            return cls()
        start = replace(finished[0].evaluations[0], seconds=0.0)
        return cls(max(run.progress or 0.0 for run in finished), start)


def is_hopeless(evaluations: Sequence[EvalPoint], steps: int, to_beat: float) -> bool:
    """Whether a run will not get further than the best one so far, judged from half of its steps on.

    It will not if it stands still, if it is above its start by more than :data:`SLACK`, or if what it has gained, grown
    with :data:`POWER` until the last step and :data:`SLACK` added, is less than ``to_beat``.

    Args:
        evaluations: Of the run so far, the one at step 0 first.
        steps: What it would make.
        to_beat: Progress of the best run so far (nats).
    """
    start, last = evaluations[0].loss, evaluations[-1]
    if start is None or last.loss is None or not steps / 2 <= last.step < steps:
        return False
    gained = start - last.loss
    slack = SLACK * abs(start)
    if abs(gained) < STILL * abs(start) or gained < -slack:
        return True
    expected = gained * (steps / last.step) ** POWER if gained > 0 else gained
    return expected + slack < to_beat


def trains_as_control(run: RunResult, control: RunResult) -> bool:
    """Whether a run has the curve of its control at the same rate, so that no rate has to be searched: what is trained
    does not see the hardening.

    Args:
        run: On the hardened model, at the control's best rate.
        control: The control's best run.
    """
    if not control.learned:
        return False  # a control that learned nothing has the curve of any model that does not
    ours, theirs = ([(point.step, point.loss) for point in tried.evaluations] for tried in (run, control))
    return len(ours) == len(theirs) and all(
        step == other and loss is not None and expected is not None and abs(loss - expected) <= SAME * abs(expected)
        for (step, loss), (other, expected) in zip(ours, theirs, strict=True)
    )
