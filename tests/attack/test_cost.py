"""What runs cost and what fits into a time: closed forms on made-up runs, and one real measurement."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdef_cli import AttackOptions, attack, plan_attack
from specdef_cli.attack.one_run import RunResult, RunSpec
from specdef_cli.attack.options import BUDGETS
from specdef_cli.attack.plan import SEARCHED_RUNS, Series, Speed, expected_runs, in_order
from specdef_cli.attack.queue import Deadline
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.variants import Variant
from tests.attack.conftest import small
from tests.attack.test_search import GRID, make_series, result, run_plan
from tests.commands import call_cli
from tests.runs import spec

FREE = ("steps", "batch_size", "sequence_length", "eval_every", "eval_sequences")


def series(training: str = "full", variant: str = "plain", optimizer: str = "adamw", control: bool = False) -> Series:
    run = spec(optimizer, training=Training.parse(training), variant=Variant.parse(variant), subject="model")
    return Series(run.control("") if control else run, GRID, True, (0,), False)


def test_a_run_costs_its_tokens() -> None:
    run = spec("adamw", steps=10, batch_size=4, sequence_length=8, eval_every=5)
    # 5 s of loading, 10·4·8 tokens at 0.01 s, three evaluations of 2·8 tokens at a third of that.
    assert Speed(5.0, 0.01).run(run, 2) == pytest.approx(5 + 3.2 + 0.16)
    assert Speed(5.0, 0.01).run(replace(run, optimizer="adahessian"), 2) == pytest.approx(5 + 9.6 + 0.16)


def test_the_most_telling_attacks_come_first_and_each_after_its_control() -> None:
    plan = [
        series("full", optimizer="sgd", control=True), series(control=True), series("lora", control=True),
        series("full", optimizer="sgd"), series("lora"), series(), series(variant="collapse"), series("hira"),
    ]  # fmt: skip
    expected = [plan[place] for place in (1, 6, 7, 5, 2, 4, 0, 3)]
    assert [id(run) for run in in_order(plan)] == [id(run) for run in expected]


def test_the_default_budget_shrinks_with_the_model_and_with_the_time() -> None:
    options = AttackOptions(model="m", out=Path("o"), free=FREE)
    longer = replace(options, steps=150)
    assert longer.lowered_for(10**5, "cpu") == longer, "nothing is lowered that a small model can afford"
    assert options.lowered_for(10**12, "cpu").steps == BUDGETS[-1]["steps"]
    assert replace(options, free=()).lowered_for(10**12, "cpu") == replace(options, free=())
    assert replace(options, steps=4).lowered_for(10**12, "cpu").steps == 4, "never raised"
    fixed = replace(options, steps=25, free=FREE[1:]).lowered_for(10**12, "cpu")
    assert (fixed.steps, fixed.batch_size) == (25, BUDGETS[-1]["batch_size"])
    # 45 runs of 6·10⁸·steps·batch·length operations at 10¹¹ a second.
    for minutes in (5, 20, 60):
        chosen = replace(options, time_limit=60.0 * minutes).lowered_for(10**8, "cpu")
        taken = 45 * 6e8 * chosen.steps * chosen.batch_size * chosen.sequence_length / 1e11
        assert minutes / 8 < taken / 60 < minutes


def test_a_plan_stops_at_its_deadline_with_the_most_telling_runs_done() -> None:
    """A clock that the runs themselves move on: each takes a tenth of the limit."""
    made: list[RunSpec] = []

    class TenRuns(Deadline):
        def allows(self) -> bool:
            return len(made) < 10

    def execute(run: RunSpec, *_: Any) -> RunResult:
        made.append(run)
        return result(run, 1e-4)

    last = make_series("last")
    known = (Training("hira", name="first"), Training("full", name="second"))
    plan = [last, *(replace(last, first=replace(last.first, training=training)) for training in known)]
    labels = [plan[place].first.label for place in (1, 2, 0)]
    outcome, _ = run_plan(plan, execute, deadline=TenRuns(1e9))
    assert [run.training.name for run in made] == ["first"] * 4 + ["second"] * 4 + ["last"] * 2
    assert (outcome.coarse, outcome.cut_short, outcome.not_reached) == (tuple(labels[:2]), (labels[2],), ())
    assert len(outcome.runs) == 10
    everything, _ = run_plan(plan, execute)
    assert [run.training.name for run in made[10:]] == ["first"] * 6 + ["second"] * 6 + ["last"] * 6
    assert (everything.coarse, everything.cut_short, everything.not_reached) == ((), (), ())


def test_a_deadline_lets_the_first_run_start_and_none_that_would_end_after_it() -> None:
    deadline = Deadline(0.0)
    assert deadline.allows()
    deadline.finished(1.0)
    assert not deadline.allows()
    longer = Deadline(1000.0)
    longer.finished(1.0)
    assert longer.allows()
    longer.finished(5000.0)
    assert not longer.allows()


def test_progress_counts_the_run_under_way_and_what_a_search_still_takes() -> None:
    events: list[Any] = []

    def execute(run: RunSpec, on_step: Any, *_: Any) -> RunResult:
        on_step(1, 3.0)
        return result(run, 1e-4)

    run_plan([make_series("a", search=False)], execute, on_progress=events.append)
    steps = [(event.done, event.runs) for event in events if event.kind == "step"]
    assert steps == [(done, len(GRID)) for done in range(len(GRID))]
    events.clear()
    run_plan([make_series("a")], execute, on_progress=events.append)
    assert events[0].runs == SEARCHED_RUNS
    assert (events[-1].done, events[-1].runs) != (0, 0)
    assert expected_runs(make_series("a", seeds=(0, 1, 2))) == SEARCHED_RUNS + 2


def test_a_plan_says_what_will_be_run_and_keeps_nothing(hardened: Path, base: Path, tmp_path: Path) -> None:
    options = AttackOptions(
        model=hardened, control=base, out=tmp_path / "out", steps=4, batch_size=4, sequence_length=32, eval_sequences=4
    )
    forecast = plan_attack(options)
    assert [attack.label for attack in forecast.attacks] == [
        "base: full fine-tuning", "undone first (collapsed), full fine-tuning", "full fine-tuning",
        "base: LoRA on every linear", "LoRA on every linear",
    ]  # fmt: skip
    assert forecast.runs == f"about {sum(attack.runs for attack in forecast.attacks)}", "every rate is searched"
    assert forecast.seconds > 0
    assert not (tmp_path / "out").exists()
    assert forecast.budget == "4 steps of 4 sequences of 32 tokens, float32"


def test_a_finished_run_of_the_control_is_not_measured_again(
    hardened: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small(hardened, tmp_path, control=base, steps=2, batch_size=2, eval_every=1, eval_sequences=2)
    report = attack(options)
    monkeypatch.setattr("specdef_cli.attack.run.TWO_STEPS", None)  # would fail
    forecast = plan_attack(options)
    assert [planned.finished for planned in forecast.attacks] == [planned.runs for planned in forecast.attacks]
    assert forecast.seconds == 0
    another = plan_attack(replace(options, learning_rates=(1e-3, 1e-5)))
    before, last = report.runs[0].evaluations[-2:]
    # From step 1 to 2: 2 sequences trained on, 3 evaluated at a third each. A run: 4, and 3 evaluations of 3.
    assert another.seconds == pytest.approx(len(report.runs) * 7 / 3 * (last.seconds - before.seconds), rel=1e-6)


def test_a_time_limit_leaves_a_report_that_lists_what_was_not_reached(
    hardened: Path, base: Path, tmp_path: Path
) -> None:
    """The first run is always made. In a pipe, every run is a line with a time."""
    budget = ("--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--eval-sequences", "2")
    limited = (*budget, "--time-limit", "0.01s", "--out", tmp_path / "out")
    result = call_cli("attack", hardened, "--control", base, *limited)
    assert result.code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    assert any("Not reached within 0 s: undone first (collapsed), full fine-tuning" in note for note in report["notes"])
    lines = [line for line in result.stderr.splitlines() if re.match(r"\d\d:\d\d:\d\d \d+ of about \d+: base: ", line)]
    assert len(lines) == 1
    assert any(line.startswith("note: Not reached") and line.endswith(".") for line in result.stderr.splitlines())
