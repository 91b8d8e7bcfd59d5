"""The learning-rate search on made-up landscapes whose best rate is known, and the schedule that it drives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdef_cli.attack.one_run import Divergence, EvalPoint, RunResult, RunSpec, TrainPoint
from specdef_cli.attack.plan import Series
from specdef_cli.attack.queue import run_all
from specdef_cli.attack.search import best_rate, is_refinement, next_rates
from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.variants import Variant
from specdef_cli.errors import SpecDefError

SPEC = RunSpec(
    subject="model", checkpoint="c", data="d", task="causal-lm", variant=Variant(), training=Training(),
    optimizer="adamw", learning_rate=1e-2, schedule="constant", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0,
    steps=10, batch_size=1, sequence_length=8, eval_every=10, seed=0, dtype="float32",
)  # fmt: skip
GRID = (1e-2, 1e-3, 1e-4, 1e-5)


def result(spec: RunSpec, best_at: float, width: float = 1.0, edge: float = math.inf) -> RunResult:
    """A loss of 3 that falls by at most 1, a parabola in log η around ``best_at``; diverges above ``edge``."""
    away = math.log10(spec.learning_rate / best_at) / width
    gain = max(0.0, 1 - away**2 / 4)
    diverged = spec.learning_rate > edge
    # Far above its best rate a run ends above its start, far below it stands still.
    final = 3 - gain if gain or away < 0 else 3.5
    return RunResult(
        spec=spec,
        train=(),
        evaluations=(EvalPoint(0, 3.0, 0.0), EvalPoint(10, 9.0 if diverged else final, 1.0)),
        divergence=Divergence(3, "held-out loss is beyond twice the start") if diverged else None,
        parameters=1, trainable_parameters=1, seconds=1.0,
    )  # fmt: skip


def through(run: RunResult, *losses: float) -> RunResult:
    """The run with other held-out losses after its start, the last one at its end."""
    points = (EvalPoint(5 * number, loss, 0.5 * number) for number, loss in enumerate(losses, start=3 - len(losses)))
    return replace(run, evaluations=(run.evaluations[0], *points))


def search(landscape: Callable[[RunSpec], RunResult], grid: tuple[float, ...] = GRID) -> dict[float, RunResult]:
    runs: dict[float, RunResult] = {}
    for _ in range(60):
        rates = next_rates(grid, runs)
        if not rates:
            return runs
        assert not set(rates) & set(runs)
        runs |= {rate: landscape(replace(SPEC, learning_rate=rate)) for rate in rates}
    raise AssertionError("the search does not end")


def away(found: float, best: float) -> float:
    """The factor between two rates, however small or large they are; 1 where they are the same."""
    return max(found / best, best / found)


def test_a_network_without_a_gradient_is_tried_at_the_first_rates_alone() -> None:
    """What a quantizer has broken may be dead from the start; one that a step has killed had a gradient before it."""

    def dies(norms: tuple[float, ...]) -> Callable[[RunSpec], RunResult]:
        train = tuple(TrainPoint(step, 3.0, norm) for step, norm in enumerate(norms, start=1))
        return lambda spec: replace(result(spec, 1e-40, edge=1e-40), train=train)

    assert sorted(search(dies((0.0, 0.0, 0.0)))) == [1e-3, 1e-2]
    assert min(search(dies((0.5, 0.0, 0.0)))) < 1e-29


@given(st.floats(-18, 4), st.floats(0.55, 2.0))
def test_the_best_rate_is_bracketed_within_half_a_decade(exponent: float, width: float) -> None:
    """Wherever the optimum lies: on a grid that goes down to 1e-12, above it or below."""
    best = 10**exponent
    runs = search(lambda spec: result(spec, best, width), decades(-12))
    assert away(best_rate(runs), best) < 2.5
    rates = sorted(runs)
    found = best_rate(runs)
    if runs[found].progress:
        assert rates[0] < found < rates[-1]


@given(st.floats(-17, -3.5))
def test_no_decade_is_left_out_before_steps_are_halved(exponent: float) -> None:
    """Large strides pass over a decade; where nothing is halved, the best decade is known all the same."""
    best = 10**exponent
    runs: dict[float, RunResult] = {}
    while (rates := next_rates((1e-3,), runs)) and not is_refinement(rates, runs):
        runs |= {rate: result(replace(SPEC, learning_rate=rate), best, edge=3 * best) for rate in rates}
    assert away(best_rate(runs), best) < 4


def decades(lowest: int) -> tuple[float, ...]:
    """A grid from 1e-2 down."""
    return tuple(float(f"1e{exponent}") for exponent in range(-2, lowest - 1, -1))


def test_it_goes_up_until_a_run_diverges_and_down_until_it_gets_worse() -> None:
    upwards = search(lambda spec: result(spec, 3e-1, edge=1.0))
    assert max(upwards) == 1.0
    assert best_rate(upwards) == 0.3
    assert min(search(lambda spec: result(spec, 3e-8))) < 3e-8


# Best rate, width of its window, grid, and the losses after the start of rates that go another way.
Otherwise = Callable[[float], tuple[float, ...]]
LANDSCAPES: dict[str, tuple[float, float, tuple[float, ...], Otherwise]] = {
    "below the grid": (3e-8, 1.0, GRID, lambda rate: ()),
    # Embeddings scaled by 2^40 stand still at every usual rate.
    "far above, where nothing moves": (1e7, 1.0, GRID, lambda rate: ()),
    # One rate may have ended where it began by chance.
    "beyond a rate that moves nothing": (1e-7, 0.4, decades(-8), lambda rate: (3.0,) if rate == 1e-5 else ()),
    "below rates that disturb and come back": (1e-5, 1.0, GRID, lambda rate: (4.0, 3.0) if rate > 1e-4 else ()),
    # Measured: 2.146 at the start, 2.145 after 30 steps at 1e-9, 2.18 at 1e-8, 2.12 at 1e-10.
    "beyond one that ends where it began": (1e-10, 0.4, decades(-9), lambda rate: (3.0,) if rate == 1e-9 else ()),
    # Measured with Muon: 2.146 → 2.144 at 1e-16, disturbed on the way, and 2.133 at 3e-16; diverged at 1e-14.
    "beside one that gains next to nothing": (
        3e-6, 0.3, (1e-2, 1e-4, 1e-6), lambda rate: (3.1, 2.999) if rate == 1e-6 else ()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LANDSCAPES)
def test_the_best_rate_is_found(case: str) -> None:
    best, width, grid, otherwise = LANDSCAPES[case]

    def landscape(spec: RunSpec) -> RunResult:
        losses = otherwise(spec.learning_rate)
        return through(result(spec, best, width), *losses) if losses else result(spec, best, width)

    assert best_rate(search(landscape, grid)) == best


def test_below_two_rates_that_move_nothing_no_other_is_tried() -> None:
    """The grid of a model with α = 10⁹, for a weight that hardening has not touched."""
    runs = search(lambda spec: result(spec, 1e-3), decades(-12))
    assert best_rate(runs) == 1e-3
    still = [rate for rate, run in runs.items() if not run.progress]
    assert max(still) == 1e-5, "the parabola's foot"
    assert min(runs) == 1e-6, "1e-5 and 1e-6 were the first two that stood still"


def test_a_model_that_is_disturbed_at_the_smallest_rate_has_more_to_learn_below_it() -> None:
    """What trains freely is found at 1e-3, and what was inflated far below."""

    def landscape(spec: RunSpec) -> RunResult:
        if spec.learning_rate > 1e-6:
            free = result(spec, 1e-3, width=0.5)
            return through(free, 3.1, 3 - 0.1 * (free.progress or 0.0))
        return result(spec, 1e-9)

    assert best_rate(search(landscape)) == 1e-9


def test_it_gives_up_where_the_smallest_stands_still_and_the_largest_breaks() -> None:
    def landscape(spec: RunSpec) -> RunResult:
        run = result(spec, 1e-3, edge=1e-3)
        return replace(run, evaluations=(EvalPoint(0, 3.0, 0.0), EvalPoint(10, 9.0 if run.divergence else 3.0, 1.0)))

    assert set(search(landscape)) == {*GRID[:3], 3e-3}, "and looks once between what breaks and what stands still"


def test_a_narrow_window_far_below_is_found_between_large_steps() -> None:
    """Nothing learns at 1e-11, which disturbs, nor at 1e-13, which stands still."""
    runs = search(lambda spec: result(spec, 1e-12, width=0.4))
    assert {1e-11, 1e-13} <= set(runs)
    assert not any(runs[rate].progress for rate in (1e-11, 1e-13))
    assert best_rate(runs) == 1e-12
    assert {3e-12, 3e-13} <= set(runs), "bracketed as every other best rate"


def make_series(label: str, *, search: bool = True, seeds: tuple[int, ...] = (0,), optional: bool = False) -> Series:
    return Series(replace(SPEC, training=Training(name=label, where=(label,))), GRID, search, seeds, optional)


def run_plan(plan: list[Series], execute: Any, **options: Any) -> tuple[Any, dict[RunSpec, RunResult]]:
    kept: dict[RunSpec, RunResult] = options.pop("kept", {})
    outcome = run_all(plan, execute, load=kept.get, save=lambda run: kept.update({run.spec: run}), **options)
    return outcome, kept


def test_seeds_beyond_the_first_run_at_the_best_rate_only() -> None:
    outcome, _ = run_plan([make_series("a", seeds=(0, 1, 2))], lambda spec, *_: result(spec, 1e-4))
    rates: dict[int, set[float]] = {}
    for run in outcome.runs:
        rates.setdefault(run.spec.seed, set()).add(run.spec.learning_rate)
    assert rates[1] == rates[2] == {1e-4}
    assert len(rates[0]) == 6
    fixed, _ = run_plan([make_series("a", search=False, seeds=(0, 1))], lambda spec, *_: result(spec, 1e-4))
    assert len(fixed.runs) == 8


def test_what_is_kept_is_not_run_again_and_the_order_is_the_plans() -> None:
    calls: list[RunSpec] = []

    def execute(spec: RunSpec, *_: Any) -> RunResult:
        calls.append(spec)
        return result(spec, 1e-4)

    plan = [make_series("b"), make_series("a")]
    events: list[Any] = []
    outcome, kept = run_plan(plan, execute)
    count = len(calls)
    again, _ = run_plan(plan, execute, kept=kept, on_progress=events.append)
    assert len(calls) == count
    assert again == outcome
    assert {event.kind for event in events} == {"run-reused"}
    labels = [run.spec.training.name for run in outcome.runs]
    assert labels == sorted(labels, reverse=True)


def test_a_series_without_anything_to_train_is_left_out_if_it_may_be() -> None:
    def execute(spec: RunSpec, *_: Any) -> RunResult:
        if spec.training.name == "biases":
            raise NotApplicable("there are no biases", "Train something else.")
        return result(spec, 1e-4)

    outcome, _ = run_plan([make_series("biases", optional=True), make_series("a")], execute)
    assert {run.spec.training.name for run in outcome.runs} == {"a"}
    assert outcome.left_out == (("biases", "there are no biases"),)
    with pytest.raises(SpecDefError):
        run_plan([make_series("biases"), make_series("a")], execute)
