"""The plan of an attack before anything of it is run: which runs, and how long they take by two measured steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Subset

from specdef_cli.attack.data import AttackData
from specdef_cli.attack.optimizers.table import OPTIMIZERS
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.plan import Series, expected_runs, in_order
from specdef_cli.attack.run_result import RunResult
from specdef_cli.attack.spec import RunSpec

SHORTENED = 0.6
"""Mean time of a run in a search, which ends what cannot become its best, relative to a full run."""

SECOND_ORDER_TIMES = 3
"""How many times as long a step takes that differentiates the gradient once more."""

FORWARD_SHARE = 1 / 3
"""Of a training step's time, what the forward pass takes, which is all of an evaluation."""


PROMPT_TOKENS = 4000
"""Tokens that an edited model reads and writes to be measured, about."""


@dataclass(frozen=True)
class Speed:
    """Seconds to load a model and set a run up (``load``), and for each token that is trained on (``token``)."""

    load: float
    token: float

    def run(self, spec: RunSpec, held_out: int) -> float:
        """Seconds of a run whose evaluations take ``held_out`` sequences each."""
        if spec.is_edit:
            return len(spec.variant.strengths) * (self.load + self.token * FORWARD_SHARE * PROMPT_TOKENS)
        times = SECOND_ORDER_TIMES if OPTIMIZERS.choose(spec.optimizer).second_order else 1
        evaluated = FORWARD_SHARE * held_out * (spec.steps // spec.eval_every + 1)
        return self.load + self.token * spec.sequence_length * (times * spec.steps * spec.batch_size + evaluated)


def measure_speed(first: RunSpec, data: AttackData, train: Callable[[RunSpec, AttackData], RunResult]) -> Speed:
    """Train the control for two steps, each followed by an evaluation; the first pair warms caches up."""
    count = min(first.batch_size, len(data.held_out))
    few = replace(data, held_out=Subset(data.held_out, range(count)), retained=None)  # type: ignore[arg-type]
    began = time.perf_counter()
    result = train(replace(first, steps=2, eval_every=1, warmup_steps=0, eval_tasks=()), few)
    load = time.perf_counter() - began - result.seconds
    return Speed(max(load, 0.0), speed_of(result, count).token)


def speed_of(finished: RunResult, held_out: int) -> Speed:
    """What the last steps of a run with evaluations of ``held_out`` sequences tell; nothing of loading."""
    before, last = finished.evaluations[-2:]
    trained = (last.step - before.step) * finished.spec.batch_size
    tokens = finished.spec.sequence_length * (trained + FORWARD_SHARE * held_out)
    return Speed(0.0, (last.seconds - before.seconds) / tokens)


@dataclass(frozen=True)
class PlannedAttack:
    """One series of a plan.

    Attributes:
        learning_rates: Those to begin with.
        runs: How many there will be; of a search, about.
        finished: How many of those to begin with are there already.
        seconds: What the missing runs take, about.
    """

    label: str
    learning_rates: tuple[float, ...]
    runs: int
    finished: int
    search: bool
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """A plan in the order in which it is run; ``seconds`` is what is missing of it, ``budget`` a run in words."""

    model: str
    control: str
    data: str
    budget: str
    attacks: tuple[PlannedAttack, ...]
    assumed: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    time_limit: float | None

    @property
    def runs(self) -> str:
        """How many runs there are, in words: ``34``, or ``about 45`` with a search among them."""
        count = sum(attack.runs for attack in self.attacks)
        return f"about {count}" if any(attack.search for attack in self.attacks) else str(count)


def foresee(
    plan: Sequence[Series], options: AttackOptions, speed: Speed, held_out: int, load: Callable[[RunSpec], object]
) -> tuple[PlannedAttack, ...]:
    """What each series of a plan takes; ``load`` finds a finished run, or ``None``."""
    attacks = []
    for series in in_order(plan):
        grid = series.runs(series.grid, series.seeds[:1] if series.search else series.seeds)
        finished = sum(load(spec) is not None for spec in grid)
        missing = max(expected_runs(series) - finished, 0) * (SHORTENED if series.hurried else 1.0)
        seconds = missing * speed.run(series.first, held_out) / options.jobs
        attacks.append(
            PlannedAttack(series.first.label, series.grid, expected_runs(series), finished, series.search, seconds)
        )
    return tuple(attacks)
