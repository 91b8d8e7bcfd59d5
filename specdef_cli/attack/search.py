"""The learning-rate frontier: which rates to try next, until the best one is bracketed.

An attack is as strong as its best learning rate, and hardening moves that rate by orders of magnitude (with Adam, α
acts as a hidden factor of it). So a search walks down a grid of decades that reaches below η₀/α, goes on upwards until
runs diverge and downwards until nothing moves any more, and then halves the steps around the best rate. Everything
here is a pure function of the runs so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from specdef_cli.attack.one_run import NOISE, EvalPoint, RunResult

FINEST_STEP = 3.5
"""Neighbours of the best rate end within this factor of it: half a decade, in one-digit numbers."""

UNCHANGED_RATES = 2
"""The walk down ends after this many consecutive rates that change nothing, as an update shrinks with its rate. One is
not enough: between a rate that diverges and one that learns, a run can end where it started."""

LARGEST_RATE, SMALLEST_RATE = 1e9, 1e-30

DECADE = 10


def next_rates(grid: Sequence[float], runs: Mapping[float, RunResult]) -> tuple[float, ...]:
    """The rates to run next; empty once the best rate is bracketed, or where no rate can change anything."""
    if any(map(_without_gradient, runs.values())):
        return ()
    unchanged = 0
    for position, rate in enumerate(grid):
        if unchanged == UNCHANGED_RATES:
            break
        if rate not in runs:  # as many at once as could end the walk
            return tuple(rate for rate in grid[position : position + UNCHANGED_RATES - unchanged] if rate not in runs)
        unchanged = 0 if _moved(runs[rate]) else unchanged + 1
    tried = sorted(runs, reverse=True)
    return _upwards(tried, runs) or _downwards(tried, runs) or _between(tried, runs)


def is_refinement(rates: Sequence[float], runs: Mapping[float, RunResult]) -> bool:
    """Whether the best decade is known, and what is left is to halve steps of one."""
    return bool(rates) and all(_halves_a_decade(rate, runs) for rate in rates)


def _halves_a_decade(rate: float, runs: Mapping[float, RunResult]) -> bool:
    above, below = [tried for tried in runs if tried > rate], [tried for tried in runs if tried < rate]
    return bool(above and below) and not _a_decade_between(min(above), max(below))


def best_rate(runs: Mapping[float, RunResult]) -> float:
    """The rate with the lowest held-out loss; the largest of equals."""
    return min(runs, key=lambda rate: (runs[rate].best is None, runs[rate].best or 0.0, -rate))


# Where nothing was learned, the model stood still at the largest rate, or was disturbed even at the smallest: this
# parameter's scale is far off, so the steps are larger.
_STRIDE, _LONG_STRIDE = DECADE, DECADE**2


def _upwards(tried: Sequence[float], runs: Mapping[float, RunResult]) -> tuple[float, ...]:
    """Continue from the largest rate, while it is the best or moves nothing."""
    best, largest = best_rate(runs), tried[0]
    learned = runs[best].learned
    if largest >= LARGEST_RATE or not (best == largest if learned else not _disturbed(runs[largest])):
        return ()
    return (_rounded(largest * (_STRIDE if learned else _LONG_STRIDE)),)


def _downwards(tried: Sequence[float], runs: Mapping[float, RunResult]) -> tuple[float, ...]:
    """Continue from the smallest rate, while it is the best, still disturbs, or alone moves nothing."""
    best, smallest = best_rate(runs), tried[-1]
    learned, disturbed = runs[best].learned, _disturbed(runs[smallest])
    unclear = best == smallest if learned else any(_disturbed(runs[rate]) for rate in tried[-UNCHANGED_RATES:])
    if smallest <= SMALLEST_RATE or not (disturbed or unclear):
        return ()
    return (_rounded(smallest / (_LONG_STRIDE if disturbed and not learned else _STRIDE)),)


def _between(tried: Sequence[float], runs: Mapping[float, RunResult]) -> tuple[float, ...]:
    """Halve the steps around the best rate and, if it learned next to nothing, below rates that disturb.

    What is left to train on a hardened model may be a few numbers, and those have a window of about a decade, which the
    large steps miss.
    """
    best = best_rate(runs)
    gained, learned = bool(runs[best].progress), runs[best].learned

    def promising(larger: float, smaller: float) -> bool:
        beside_the_best = gained and best in (larger, smaller)
        return beside_the_best or (not learned and _disturbed(runs[larger]) and not _disturbed(runs[smaller]))

    steps = [
        (larger, smaller)
        for larger, smaller in pairwise(tried)
        if larger / smaller > FINEST_STEP and promising(larger, smaller)
    ]
    # A decade that was left out may hold the best rate, and then no other step is halved.
    wide = [step for step in steps if _a_decade_between(*step)]
    return tuple(_rounded(math.sqrt(larger * smaller)) for larger, smaller in wide or steps)


def _a_decade_between(larger: float, smaller: float) -> bool:
    """Whether two neighbours are more than a decade apart, whose digits are rounded."""
    return larger / smaller > 2 * DECADE


def _moved(run: RunResult) -> bool:
    """Whether the rate was large enough to change the model, for better or worse."""
    return _disturbed(run) or run.learned


def _disturbed(run: RunResult) -> bool:
    """Whether the model was ever worse than at the start."""
    start = run.start
    if run.divergence is not None or start is None:
        return True
    return any(point.loss is None or point.loss > start + NOISE * abs(start) for point in run.evaluations)


def _without_gradient(run: RunResult) -> bool:
    """Whether a network was dead from its first step on, as after a quantizer that broke it."""
    return bool(run.train) and all(point.grad_norm == 0 for point in run.train)


def _rounded(rate: float) -> float:
    return float(f"{rate:.0e}")


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
    """What a search knows before one of its runs."""

    progress: float = 0.0  # of its best run so far (nats): what has to be beaten
    start: EvalPoint | None = None
    """The evaluation at step 0, which is the same at every learning rate; ``None`` before the first run."""

    @classmethod
    def of(cls, runs: Iterable[RunResult]) -> Lead:
        """Sum up the finished runs of one attack."""
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
    """
    if not control.learned:
        return False  # a control that learned nothing has the curve of any model that does not
    ours, theirs = ([(point.step, point.loss) for point in tried.evaluations] for tried in (run, control))
    return len(ours) == len(theirs) and all(
        step == other and loss is not None and expected is not None and abs(loss - expected) <= SAME * abs(expected)
        for (step, loss), (other, expected) in zip(ours, theirs, strict=True)
    )
