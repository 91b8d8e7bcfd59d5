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
from specdef_cli.attack.queue import Deadline, run_all
from specdef_cli.attack.results import AttackReport, DataSummary
from specdef_cli.attack.search import Lead, best_rate, is_hopeless, is_refinement, next_rates, trains_as_control
from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.trainings import Training
from specdef_cli.errors import SpecDefError
from specdef_cli.report import findings
from tests.runs import spec

SPEC = spec(subject="model", learning_rate=1e-2, steps=10, eval_every=10)
CONTROL = replace(SPEC, subject="control")
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


def test_it_goes_up_until_a_run_diverges() -> None:
    upwards = search(lambda spec: result(spec, 3e-1, edge=1.0))
    assert max(upwards) == 1.0
    assert best_rate(upwards) == 0.3


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


# --- runs that a search ends early, and searches that need not be made -----------------------------------------------


def curve(*losses: float | None, steps: int = 30) -> list[EvalPoint]:
    """Evaluations at equal distances, the last one after ``steps``."""
    return [EvalPoint(steps * place // (len(losses) - 1), loss, 0.0) for place, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "steps", "to_beat", "hopeless"),
    [
        ((3.0, 2.9), 15, 0.4, False),  # 0.1 may become 0.4, its square
        ((3.0, 2.9), 15, 0.5, True),
        ((3.0, 3.0), 15, 0.0, True),  # stands still
        ((3.0, 2.999), 15, 0.0, False),  # does not, and so little may come and go
        ((3.0, 3.02), 15, 0.0, False),
        ((3.0, 3.04), 15, 0.0, True),  # above its start by more than chance
        ((3.0, None), 15, 0.0, False),  # diverged, which is said otherwise
        ((None, 2.9), 15, 0.0, False),
        ((3.0, 9.0), 14, 1.0, False),  # before half time, and at the end
        ((3.0, 9.0), 30, 1.0, False),
        ((3.0, 2.8), 20, 0.45, False),  # later there is less to come
        ((3.0, 2.8), 27, 0.45, True),
    ],
)
def test_a_run_of_30_steps_is_hopeless_from_half_time_on(
    losses: tuple[float | None, ...], steps: int, to_beat: float, hopeless: bool
) -> None:
    assert is_hopeless(curve(*losses, steps=steps), 30, to_beat) is hopeless
    assert not is_hopeless([EvalPoint(0, 3.0, 0.0)], 30, to_beat)


def run_of(spec: RunSpec, *losses: float | None) -> RunResult:
    return replace(result(spec, 1e-3), evaluations=tuple(curve(*losses, steps=spec.steps)), divergence=None)


@pytest.mark.parametrize(
    ("losses", "control", "same"),
    [
        ((3.0, 2.5, 2.0), (3.0, 2.5, 2.0), True),
        ((3.0, 2.501, 2.0015), (3.0, 2.5, 2.0), True),
        ((3.0, 2.51, 2.0), (3.0, 2.5, 2.0), False),
        ((3.0, 2.5), (3.0, 2.5, 2.0), False),  # ended earlier
        ((3.0, 2.5, None), (3.0, 2.5, 2.0), False),
        ((3.3, 2.5, 2.0), (3.0, 2.5, 2.0), False),
        ((3.0, 3.0, 2.999), (3.0, 3.0, 2.999), False),  # a control that learned nothing shows nothing
    ],
)
def test_the_control_s_curve(losses: tuple[float | None, ...], control: tuple[float, ...], same: bool) -> None:
    assert trains_as_control(run_of(SPEC, *losses), run_of(CONTROL, *control)) is same


Made = list[tuple[RunSpec, Lead | None]]


def recorder(landscape: Callable[[RunSpec], RunResult]) -> tuple[Made, Callable[..., RunResult]]:
    """The runs that were made, with what each had to beat, and what makes them."""
    made: Made = []

    def execute(spec: RunSpec, _: Any, lead: Lead | None) -> RunResult:
        made.append((spec, lead))
        return landscape(spec)

    return made, execute


def plan_with_control(best: dict[str, float], **options: Any) -> tuple[Any, list[RunSpec]]:
    """A control and an attack on parabolas with these best rates."""
    made, execute = recorder(lambda spec: result(spec, best[spec.subject]))
    attack = make_series("a")
    control = replace(attack, first=attack.first.control("c"), grid=(1e-3,))
    outcome, _ = run_plan([control, attack], execute, **options)
    return outcome, [spec for spec, _ in made]


def test_what_trains_as_its_control_is_run_at_the_control_s_best_rate_alone() -> None:
    outcome, made = plan_with_control({"control": 1e-4, "model": 1e-4})
    assert [spec.learning_rate for spec in made if spec.subject == "model"] == [1e-4]
    assert made[-1].subject == "model", "after its control"
    assert len(outcome.runs) == len(made)


@pytest.mark.parametrize("best", [1e-6, 3e-2])
def test_anything_else_is_searched(best: float) -> None:
    _, made = plan_with_control({"control": 1e-4, "model": best})
    rates = [spec.learning_rate for spec in made if spec.subject == "model"]
    assert rates[0] == 1e-4
    assert best in rates
    assert min(rates) < best < max(rates)


@pytest.mark.parametrize("changes", [{"thorough": True}, {"stop_at_divergence": False}, {"warmup_steps": 9}])
def test_a_thorough_search_and_one_that_may_come_back_take_over_nothing(changes: dict[str, Any]) -> None:
    attack = make_series("a")
    attack = (
        replace(attack, **changes) if "thorough" in changes else replace(attack, first=replace(attack.first, **changes))
    )
    made, execute = recorder(lambda spec: result(spec, 1e-4))
    outcome, _ = run_plan([replace(attack, first=attack.first.control("c")), attack], execute)
    assert len(outcome.runs) == 12, "six each"
    assert {lead for _, lead in made} == {None}


@pytest.mark.parametrize("follows", [True, False])
def test_a_plan_in_haste_that_is_given_again_makes_no_further_run(follows: bool) -> None:
    """The control is best between two decades, and was compared with at the best one before that was known."""
    made, execute = recorder(lambda spec: result(spec, 4e-4 if follows or spec.subject == "control" else 1e-8))
    attack = make_series("a")
    plan = [replace(attack, first=attack.first.control("c")), attack]
    first, kept = run_plan(plan, execute, deadline=Deadline(1e9))
    best = {run.spec.subject: run.spec.learning_rate for run in sorted(first.runs, key=lambda run: -(run.best or 9.0))}
    assert best["control"] == 3e-4
    count = len(made)
    again, _ = run_plan(plan, execute, kept=kept, deadline=Deadline(1e9))
    assert (len(made), again) == (count, first)


def test_runs_have_to_beat_what_was_finished_when_they_were_chosen() -> None:
    made, execute = recorder(lambda spec: result(spec, 1e-4))
    run_plan([make_series("a", seeds=(0, 1))], execute)
    asked = {(spec.learning_rate, spec.seed): lead for spec, lead in made}
    start = EvalPoint(0, 3.0, 0.0)
    first = [asked[rate, 0] for rate in GRID]
    assert first == [Lead(), Lead(), Lead(0.75, start), Lead(0.75, start)], "two at a time"
    assert asked[1e-4, 1] is None, "another seed at the best rate is made in full"
    assert asked[3e-4, 0] == Lead(1.0, start)


def test_a_shortened_run_serves_searches_alone() -> None:
    spec = replace(make_series("a").first, learning_rate=1e-2)
    beyond = Divergence(3, "training loss is beyond twice the start")
    for shortened in (replace(result(spec, 1e-4), stopped=5), replace(result(spec, 1e-4), divergence=beyond)):
        for search in (True, False):
            made, execute = recorder(lambda spec: result(spec, 1e-4))
            run_plan([make_series("a", search=search)], execute, kept={spec: shortened})
            assert (spec in [run for run, _ in made]) is not search


def ended_early(run: RunResult, lead: Lead | None) -> RunResult:
    """The run as a search would have it: with an evaluation at half time, and nothing after it where it is hopeless."""
    start, final = (point.loss or 0.0 for point in (run.evaluations[0], run.evaluations[-1]))
    half = EvalPoint(run.spec.steps // 2, start - (start - final) / 2, 0.5)
    if lead is not None and is_hopeless((run.evaluations[0], half), run.spec.steps, lead.progress):
        return replace(run, evaluations=(run.evaluations[0], half), stopped=half.step)
    return replace(run, evaluations=(run.evaluations[0], half, run.evaluations[-1]))


@pytest.mark.parametrize(("best", "width", "verdict"), [(2e-12, 0.01, "stopped"), (1e-7, 0.5, "not slowed")])
def test_a_verdict_on_runs_that_ended_early_is_as_on_complete_ones(best: float, width: float, verdict: str) -> None:
    """A window that is too narrow to be seen, and one that a model trains in as well as its control."""
    verdicts = []
    for lazy in (False, True):

        def execute(spec: RunSpec, _: Any, lead: Lead | None) -> RunResult:
            at, across = (1e-3, 1.0) if spec.subject == "control" else (best, width)
            run = result(spec, at, across)
            return ended_early(run, lead if lazy else None)  # noqa: B023

        attack = replace(make_series("a"), grid=tuple(float(f"1e{exponent}") for exponent in range(-2, -15, -1)))
        control = replace(attack, first=attack.first.control("c"), grid=(1e-3,))
        outcome, _ = run_plan([control, attack], execute)
        assert any(run.stopped for run in outcome.runs) is lazy
        data = DataSummary("d", 1, 1, "f")
        report = AttackReport("m", "c", None, data, outcome.runs, (), (), {}, "cpu")
        (_, found) = findings(report)
        verdicts.append((found.verdict, found.learning_rate))
        few = [run for run in outcome.runs if run.spec.subject == "control" or run.spec.learning_rate > 1e-5]
        (_, unsettled) = findings(replace(report, runs=tuple(few)))
        assert unsettled.verdict == "not settled"
    assert verdicts[0] == verdicts[1]
    assert verdicts[0][0] == verdict
