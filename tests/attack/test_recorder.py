"""Where a run ends once it diverges, and where it goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from specdef_cli.attack.recorder import Recorder
from specdef_cli.attack.results import Divergence

START = 3.0


def record(losses: list[float], *, stop: bool = True, train: dict[int, float] | None = None) -> tuple[Recorder, Any]:
    """A run with these held-out losses, one a step, for as long as the recorder lets it."""
    recorder = Recorder(lambda step, loss: None, stop)
    control: Any = SimpleNamespace(should_training_stop=False, should_evaluate=True)
    for step, loss in enumerate(losses):
        state: Any = SimpleNamespace(global_step=step)
        if step:
            recorder.on_log(None, state, control, {"loss": (train or {}).get(step, 1.0)})  # type: ignore[arg-type]
        if control.should_training_stop:
            break
        recorder.on_evaluate(None, state, control, {"eval_attack_loss": loss})  # type: ignore[arg-type]
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
    what = "held-out" if train is None else "training"
    assert recorder.divergence == Divergence(3, f"{what} loss is not finite")  # type: ignore[arg-type]
