"""Which runs a search ends early, and which searches need not be made, on made-up curves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from specdef_cli.attack.one_run import Divergence, EvalPoint, RunResult, RunSpec
from specdef_cli.attack.queue import Deadline
from specdef_cli.attack.results import AttackReport, DataSummary
from specdef_cli.attack.search import Lead, is_hopeless, trains_as_control
from specdef_cli.report import findings
from tests.attack.test_search import GRID, SPEC, make_series, result, run_plan

CONTROL = replace(SPEC, subject="control")


def curve(*losses: float | None, steps: int = 30) -> list[EvalPoint]:
    """Evaluations at equal distances, the last one after ``steps``."""
    return [EvalPoint(steps * place // (len(losses) - 1), loss, 0.0) for place, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "to_beat", "hopeless"),
    [
        ((3.0, 2.9), 0.4, False),  # 0.1 may become 0.4, its square
        ((3.0, 2.9), 0.5, True),
        ((3.0, 3.0), 0.0, True),  # stands still
        ((3.0, 2.999), 0.0, False),  # does not, and so little may come and go
        ((3.0, 3.02), 0.0, False),
        ((3.0, 3.04), 0.0, True),  # above its start by more than chance
        ((3.0, None), 0.0, False),  # diverged, which is said otherwise
        ((None, 2.9), 0.0, False),
    ],
)
def test_at_half_time(losses: tuple[float | None, ...], to_beat: float, hopeless: bool) -> None:
    assert is_hopeless(curve(*losses, steps=15), 30, to_beat) is hopeless


def test_before_half_time_and_at_the_end_nothing_is_hopeless() -> None:
    assert not is_hopeless(curve(3.0, 9.0, steps=14), 30, 1.0)
    assert not is_hopeless(curve(3.0, 9.0, steps=30), 30, 1.0)
    assert not is_hopeless([EvalPoint(0, 3.0, 0.0)], 30, 1.0)


def test_later_there_is_less_to_come() -> None:
    assert not is_hopeless(curve(3.0, 2.8, steps=20), 30, 0.45)
    assert is_hopeless(curve(3.0, 2.8, steps=27), 30, 0.45)


def run_of(spec: RunSpec, *losses: float | None) -> RunResult:
    return replace(result(spec, 1e-3), evaluations=tuple(curve(*losses, steps=spec.steps)), divergence=None)


@pytest.mark.parametrize(
    ("losses", "same"),
    [
        ((3.0, 2.5, 2.0), True),
        ((3.0, 2.501, 2.0015), True),
        ((3.0, 2.51, 2.0), False),
        ((3.0, 2.5), False),  # ended earlier
        ((3.0, 2.5, None), False),
        ((3.3, 2.5, 2.0), False),
    ],
)
def test_the_control_s_curve(losses: tuple[float | None, ...], same: bool) -> None:
    assert trains_as_control(run_of(SPEC, *losses), run_of(CONTROL, 3.0, 2.5, 2.0)) is same


def test_a_control_that_learned_nothing_shows_nothing() -> None:
    flat = (3.0, 3.0, 2.999)
    assert not trains_as_control(run_of(SPEC, *flat), run_of(CONTROL, *flat))


def plan_with_control(best: dict[str, float], **options: Any) -> tuple[Any, list[RunSpec]]:
    """A control and an attack on parabolas with these best rates."""
    made: list[RunSpec] = []

    def execute(spec: RunSpec, _: Any, lead: Lead | None) -> RunResult:
        made.append(spec)
        return result(spec, best[spec.subject])

    attack = make_series("a")
    control = replace(attack, first=attack.first.control("c"), grid=(1e-3,))
    outcome, _ = run_plan([control, attack], execute, **options)
    return outcome, made


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


def test_a_thorough_search_and_one_that_may_come_back_take_over_nothing() -> None:
    first = make_series("a").first
    cases: list[dict[str, Any]] = [{"thorough": True}]
    cases += [{"first": replace(first, stop_at_divergence=False)}, {"first": replace(first, warmup_steps=9)}]
    for changes in cases:
        asked: list[Lead | None] = []
        attack = replace(make_series("a"), **changes)
        control = replace(attack, first=attack.first.control("c"))

        def execute(spec: RunSpec, _: Any, lead: Lead | None) -> RunResult:
            asked.append(lead)  # noqa: B023
            return result(spec, 1e-4)

        outcome, _ = run_plan([control, attack], execute)
        assert len(outcome.runs) == 12, "six each"
        assert set(asked) == {None}


@pytest.mark.parametrize("follows", [True, False])
def test_a_plan_in_haste_that_is_given_again_makes_no_further_run(follows: bool) -> None:
    """The control is best between two decades, and was compared with at the best one before that was known."""
    made: list[RunSpec] = []

    def execute(spec: RunSpec, *_: Any) -> RunResult:
        made.append(spec)
        return result(spec, 4e-4 if follows or spec.subject == "control" else 1e-8)

    attack = make_series("a")
    plan = [replace(attack, first=attack.first.control("c")), attack]
    first, kept = run_plan(plan, execute, deadline=Deadline(1e9))
    best = {run.spec.subject: run.spec.learning_rate for run in sorted(first.runs, key=lambda run: -(run.best or 9.0))}
    assert best["control"] == 3e-4
    count = len(made)
    again, _ = run_plan(plan, execute, kept=kept, deadline=Deadline(1e9))
    assert (len(made), again) == (count, first)


def test_runs_have_to_beat_what_was_finished_when_they_were_chosen() -> None:
    asked: dict[tuple[float, int], Lead | None] = {}

    def execute(spec: RunSpec, _: Any, lead: Lead | None) -> RunResult:
        asked[spec.learning_rate, spec.seed] = lead
        return result(spec, 1e-4)

    run_plan([make_series("a", seeds=(0, 1))], execute)
    start = EvalPoint(0, 3.0, 0.0)
    first = [asked[rate, 0] for rate in GRID]
    assert first == [Lead(), Lead(), Lead(0.75, start), Lead(0.75, start)], "two at a time"
    assert asked[1e-4, 1] is None, "another seed at the best rate is made in full"
    assert asked[3e-4, 0] == Lead(1.0, start)


def test_a_shortened_run_serves_searches_alone() -> None:
    spec = replace(make_series("a").first, learning_rate=1e-2)
    for shortened in (
        replace(result(spec, 1e-4), stopped=5),
        replace(result(spec, 1e-4), divergence=Divergence(3, "training loss is beyond twice the start")),
    ):
        for search, again in ((True, False), (False, True)):
            made: list[RunSpec] = []

            def execute(spec: RunSpec, *_: Any) -> RunResult:
                made.append(spec)  # noqa: B023
                return result(spec, 1e-4)

            run_plan([make_series("a", search=search)], execute, kept={spec: shortened})
            assert (spec in made) is again


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
