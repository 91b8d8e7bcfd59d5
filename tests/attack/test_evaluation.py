"""What counts as the held-out loss and as progress, and where a run that diverges ends."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import transformers
from transformers import TrainerCallback

from specdef_cli import AttackOptions
from specdef_cli.attack.one_run import DEAD, Divergence, EvalPoint
from specdef_cli.attack.search import Lead
from specdef_cli.attack.target import Task
from specdef_cli.attack.train import load_for_training
from specdef_cli.attack.trainer import Recorder, _constant, make_trainer
from specdef_cli.model import load_model
from specdef_cli.model.loading import new_objects_only
from specdef_cli.model.opened import open_model
from tests.attack.conftest import load, train_run
from tests.attack.test_tasks import DECODER, classifier, write_rows
from tests.byte_tokenizer import byte_tokenizer
from tests.runs import spec

# A class, the arguments of its config, and those with which it adds something to its loss.
ADDING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Mixtral": ({"num_local_experts": 4, "router_aux_loss_coef": 0.5}, {"output_router_logits": True}),
    # The square of its logits' partition function, and says so in none of its outputs.
    "Bamba": (
        {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
        {"z_loss_coefficient": 0.1},
    ),
}


@pytest.mark.parametrize("kind", ADDING)
def test_what_a_model_adds_to_its_loss_is_not_held_out_loss(kind: str, tmp_path: Path) -> None:
    """The same weights twice, and the mean written down directly."""
    always, adding = ADDING[kind]
    make, starts = getattr(transformers, f"{kind}ForCausalLM"), []
    for more in ({}, adding):
        torch.manual_seed(0)
        directory = tmp_path / str(len(more))
        make(make.config_class(**DECODER, **always, **more)).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        data = load(None, directory, eval_sequences=4)
        starts.append(train_run(spec(steps=1), directory, data).start)
    assert starts[0] == pytest.approx(starts[1], rel=1e-6)
    batch = data.collate([data.held_out[index] for index in range(4)])
    with torch.no_grad():
        output = load_model(directory)(**batch)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert starts[1] == pytest.approx(float(expected), rel=1e-5)
    assert float(output.loss) > float(expected) + 0.1, "the model itself adds something, or this shows nothing"


class Kill(TrainerCallback):
    """What a step that is far too large leaves on some processors: every weight is zero."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_dead_network_has_diverged_whatever_its_loss_is(task: Task, base: Path, tmp_path: Path) -> None:
    """It says ln 258 of everything, which is below the start of a random model."""
    directory, rows = base, None
    if task != "causal-lm":
        directory, rows = classifier(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", lambda n: n % 2)
    data = load(rows, directory, task)
    run = spec(task=task, steps=4, eval_every=2, learning_rate=1e-5)
    recorder = Recorder(lambda step, loss: None)
    with new_objects_only(), tempfile.TemporaryDirectory(dir=tmp_path) as scratch:
        model = load_for_training(run, open_model(directory), data)
        trainer = make_trainer(run, model, data, recorder, scratch, AttackOptions(""))
        trainer.add_callback(Kill())
        trainer.train()
    assert recorder.divergence == Divergence(2, DEAD)
    assert [(point.step, point.loss) for point in recorder.evaluations[1:]] == [(2, None)]


def test_the_same_input_everywhere_is_no_sign_of_death(base: Path, tmp_path: Path) -> None:
    """Of one token repeated, a network without positions says the same everywhere."""
    rows = tmp_path / "rows.txt"
    rows.write_text("\n\n".join("a" * 400 for _ in range(40)))
    data = load(rows, base, sequence_length=16)
    result = train_run(spec(steps=4, eval_every=2, learning_rate=1e-4), base, data)
    assert (result.divergence, result.learned) == (None, True)


def test_answers_of_one_token_are_compared_with_each_other() -> None:
    tokens, logits = torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0))
    assert not _constant({"input_ids": tokens}, logits)
    assert _constant({"input_ids": tokens}, logits[:1].expand(2, 1, 5))


def test_a_model_that_was_dead_before_the_attack_makes_no_progress(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "dead")
    byte_tokenizer().save_pretrained(tmp_path / "dead")
    result = train_run(spec(steps=4, eval_every=2), tmp_path / "dead", load(None, base))
    assert (result.divergence, result.outcome, result.final) == (Divergence(2, DEAD), "diverged", None)
    assert result.progress == 0


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


@pytest.mark.parametrize("stop", [True, False])
def test_a_run_ends_beyond_twice_its_start_or_goes_on_where_it_is_asked_to(stop: bool) -> None:
    losses = [START, 2.9, 6.1, 7.0, 2.0]
    recorder, control = record(losses, stop=stop)
    assert control.should_training_stop is stop
    assert [point.loss for point in recorder.evaluations] == losses[: 3 if stop else None]
    assert recorder.divergence == Divergence(2, "held-out loss is beyond twice the start")


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
