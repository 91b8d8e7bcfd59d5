"""Where a run ends once it diverges, and where it goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest

from specdef_cli.attack.one_run import Divergence, EvalPoint
from specdef_cli.attack.search import Lead
from specdef_cli.attack.trainer import Recorder

START = 3.0


def record(
    losses: list[float], *, stop: bool = True, train: dict[int, float] | None = None, lead: Lead | None = None
) -> tuple[Recorder, Any]:
    """A run with these held-out losses, one a step, for as long as the recorder lets it."""
    recorder = Recorder(lambda step, loss: None, stop, lead)
    control: Any = SimpleNamespace(should_training_stop=False, should_evaluate=True)
    for step, loss in enumerate(losses):
        state: Any = SimpleNamespace(global_step=step, max_steps=len(losses) - 1)
        if step:
            recorder.on_log(None, state, control, {"loss": (train or {}).get(step, 1.0)})
        if control.should_training_stop:
            break
        recorder.on_evaluate(None, state, control, {"eval_attack_loss": loss})
        if control.should_training_stop:
            break
    return recorder, control


def test_a_run_ends_beyond_twice_its_start() -> None:
    recorder, control = record([START, 2.9, 6.1, 2.0])
    assert control.should_training_stop
    assert [point.loss for point in recorder.evaluations] == [START, 2.9, 6.1]
    assert recorder.divergence == Divergence(2, "held-out loss is beyond twice the start")


def test_it_goes_on_where_it_is_asked_to_and_remembers_where_it_diverged() -> None:
    recorder, control = record([START, 6.1, 7.0, 2.0], stop=False)
    assert not control.should_training_stop
    assert [point.loss for point in recorder.evaluations] == [START, 6.1, 7.0, 2.0]
    assert [point.step for point in recorder.train] == [1, 2, 3]
    assert recorder.divergence == Divergence(1, "held-out loss is beyond twice the start")


@pytest.mark.parametrize("train", [None, {3: float("nan")}])
def test_nothing_comes_back_from_what_is_not_a_number(train: dict[int, float] | None) -> None:
    recorder, control = record([START, 6.1, 2.0, float("inf") if train is None else 2.0, 2.0], stop=False, train=train)
    assert control.should_training_stop
    reason: Literal["training loss is not finite", "held-out loss is not finite"] = (
        "held-out loss is not finite" if train is None else "training loss is not finite"
    )
    assert recorder.divergence == Divergence(3, reason)


def test_a_search_ends_what_two_batches_in_a_row_show_to_diverge() -> None:
    train = {1: 3.0, 2: 6.1, 3: 5.0, 4: 6.1, 5: 6.2, 6: 1.0}
    losses = [START, *[2.0] * 7]
    recorder, _ = record(losses, train=train)
    assert recorder.divergence is None
    recorder, control = record(losses, train=train, lead=Lead())
    assert recorder.divergence == Divergence(5, "training loss is beyond twice the start")
    assert control.should_training_stop
    assert not control.should_evaluate


def test_a_search_ends_what_is_too_far_behind_and_the_record_says_where() -> None:
    losses = [START, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3, 2.2]
    assert record(losses)[0].stopped is None
    recorder, control = record(losses, lead=Lead(0.8))
    assert (recorder.stopped, control.should_training_stop) == (None, False)
    recorder, control = record(losses, lead=Lead(1.7))  # 0.4 by step 4 of 8 may come to 1.6
    assert (recorder.stopped, control.should_training_stop) == (4, True)
    assert [point.step for point in recorder.evaluations] == [0, 1, 2, 3, 4]
    assert recorder.divergence is None


def test_what_is_known_of_the_start_is_not_evaluated_again() -> None:
    recorder = Recorder(lambda step, loss: None, True, Lead(0.5, EvalPoint(0, START, 0.0)))
    assert recorder.evaluations == [EvalPoint(0, START, 0.0)]
