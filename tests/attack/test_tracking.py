"""Runs in an experiment tracker: what TensorBoard reads back is what the run recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specdef_cli import AttackOptions, attack
from specdef_cli.attack.options import require_trackers
from specdef_cli.errors import SpecDefError


def test_every_run_is_a_log_of_its_own(hardened: Path, base: Path, tmp_path: Path) -> None:
    options = AttackOptions(
        model=hardened, control=base, out=tmp_path, trainings=("full",), learning_rates=(1e-4,), steps=2, batch_size=2,
        sequence_length=16, eval_sequences=2, report_to=("tensorboard",),
    )  # fmt: skip
    report = attack(options)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {run.spec.run_id for run in report.runs}
    for run in report.runs:
        events = EventAccumulator(str(tmp_path / "logs" / run.spec.run_id))
        events.Reload()
        logged = [event.value for event in events.Scalars("eval/attack_loss")]
        assert logged == pytest.approx([point.loss for point in run.evaluations], rel=1e-6)


@pytest.mark.parametrize("name", ["paper", "trackio"])
def test_a_tracker_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SpecDefError, match=name) as caught:
        require_trackers((name,))
    assert caught.value.hint in ("pip install trackio", "Choose one of: tensorboard, wandb, trackio, mlflow.")
