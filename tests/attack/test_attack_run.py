"""Attacks on a real, tiny, random Llama directory: what the Trainer was made to do, and what was written down."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specdef_cli import AttackOptions, ProgressEvent, attack, plan_attack
from specdef_cli.attack.data import load_data
from specdef_cli.attack.data.language import BUILTIN_NAME
from specdef_cli.attack.data.split import Examples
from specdef_cli.attack.one_run import RunResult, RunStore
from specdef_cli.attack.results import AttackReport
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.variants import Variant
from specdef_cli.checkpoint.manifest import MANIFEST_NAME
from specdef_cli.errors import SpecDefError
from specdef_cli.model import load_model, load_tokenizer
from specdef_cli.report import findings
from specdef_cli.report.text import summary
from tests.attack.conftest import load, small, target_of, trained_names


@pytest.fixture(scope="module")
def report(hardened: Path, tmp_path_factory: pytest.TempPathFactory) -> AttackReport:
    """Control, plain, collapse, frozen, width, inject and depth, at one usual rate and one that blows up."""
    variants = ("freeze-compensation", "width:2", "inject", "depth:2")
    return attack(small(hardened, tmp_path_factory.mktemp("attack"), learning_rates=(1e-4,), variants=variants))


def run_of(report: AttackReport, kind: str) -> RunResult:
    runs = {run.spec.variant.kind if run.spec.subject == "model" else "control": run for run in report.runs[::-1]}
    return runs[kind]


def test_every_run_starts_from_the_same_function_and_sees_the_same_batches(report: AttackReport) -> None:
    """Collapsed, the model is the control again, so all its batches must give the control's losses."""
    control, collapsed = run_of(report, "control"), run_of(report, "collapse")
    assert len(report.runs) == 7
    for run in report.runs:
        assert run.start == pytest.approx(control.start, rel=1e-5)
        assert run.train[0].loss == pytest.approx(control.train[0].loss, rel=1e-5)
        assert [point.step for point in run.evaluations] == [0, 2, 4]
        assert [point.step for point in run.train] == [1, 2, 3, 4]
    assert [p.loss for p in collapsed.train] == pytest.approx([p.loss for p in control.train], rel=1e-4)
    assert collapsed.first_grad_norm == pytest.approx(control.first_grad_norm, rel=1e-3)
    assert len({round(p.loss or 0, 6) for p in control.train}) == 4


def test_inflation_shows_in_the_gradient_and_goes_with_the_compensation(report: AttackReport) -> None:
    control = run_of(report, "control").first_grad_norm
    assert control is not None
    assert (run_of(report, "plain").first_grad_norm or 0) > 30 * control
    assert (run_of(report, "freeze-compensation").first_grad_norm or math.inf) < 3 * control


def test_parameters(report: AttackReport) -> None:
    pairs = 2 * (32 * 32 + 32 * 32) + 2 * (32 * 48 + 32 * 32)
    original = run_of(report, "control").parameters
    assert run_of(report, "plain").parameters == original + 4 * 32 * 32
    assert run_of(report, "collapse").parameters == original
    width = run_of(report, "width")
    assert width.parameters - run_of(report, "plain").parameters == pairs
    assert width.trainable_parameters == width.parameters - pairs
    attacked = next(attack for attack in report.attacks if width in attack.runs)
    assert attacked.parameters_times == width.parameters / original


def test_a_run_goes_on_beyond_its_divergence_where_asked(hardened: Path, tmp_path: Path) -> None:
    made = small(hardened, tmp_path, learning_rates=(10.0,), steps=8)
    stopped, longer = attack(made), attack(replace(made, stop_at_divergence=False))
    first, second = run_of(stopped, "plain"), run_of(longer, "plain")
    assert first.divergence == second.divergence
    assert first.divergence is not None
    assert first.best == first.start
    assert first.divergence.step == first.train[-1].step < 8 == second.train[-1].step == second.evaluations[-1].step
    assert (first.cut, first.outcome) == (True, "diverged")
    assert (second.cut, second.outcome) == (False, "worse")
    assert any("Runs ended" in note and "full fine-tuning from 10 on" in note for note in stopped.notes)
    assert not any("Given up" in note for note in longer.notes)


def test_a_run_is_never_repeated(hardened: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    first = attack(small(hardened, tmp_path, learning_rates=(1e-4,)), on_progress=events.append)
    assert [event.kind for event in events][:6] == ["run-start", *["step"] * 4, "run-end"]
    assert [(event.done, event.runs) for event in events if event.kind == "run-end"] == [(1, 3), (2, 3), (3, 3)]
    events.clear()
    again = attack(small(hardened, tmp_path, learning_rates=(1e-4, 1e-5)), on_progress=events.append)
    assert [event.kind for event in events].count("run-reused") == 3
    assert [event.kind for event in events].count("run-end") == 3
    assert set(first.runs) < set(again.runs)


def test_a_damaged_result_is_run_again(report: AttackReport, tmp_path: Path) -> None:
    store, run = RunStore(tmp_path), report.runs[0]
    store.save(run)
    assert store.load(run.spec) == run
    other = replace(run.spec, seed=1)
    shutil.copy(store.path(run.spec), store.path(other))  # a name that says something else
    assert store.load(other) is None
    store.path(run.spec).write_text(store.path(run.spec).read_text()[:-40])
    assert store.load(run.spec) is None
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


def sequences(examples: Examples) -> torch.Tensor:
    return torch.tensor([examples[index]["input_ids"] for index in range(len(examples))])


def test_the_held_out_loss_is_over_every_held_out_sequence(base: Path, tmp_path: Path) -> None:
    """Six sequences in batches of four, against the mean written down directly."""
    made = small(base, tmp_path, control=base, steps=1, eval_sequences=6)
    data = load_data(made, "causal-lm", load_tokenizer(base))
    tokens = sequences(data.held_out)
    with torch.no_grad():
        logits = load_model(base, dtype=torch.float32)(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert len(tokens) == 6
    assert attack(made).runs[0].start == pytest.approx(expected.item(), rel=1e-5)


def test_seeds_change_the_data_order_and_nothing_before_it(base: Path, hardened: Path, tmp_path: Path) -> None:
    result = attack(small(hardened, tmp_path, control=base, learning_rates=(1e-4,), seeds=(0, 1)))
    first, second = (run for run in result.runs if run.spec.subject == "control")
    assert first.start == second.start
    assert first.train[0].loss != second.train[0].loss


FACTORS = {f"{layer}.{part}" for layer in ("o_proj", "down_proj") for part in ("inflated", "compensation")}
PLAIN = {f"{name}_proj" for name in ("q", "k", "v", "gate", "up")}


@pytest.mark.parametrize(
    ("training", "places"),
    [
        (Training("lora", 2), FACTORS | PLAIN),
        (Training("lora", 2, ("o_proj",)), {"o_proj.inflated", "o_proj.compensation"}),
        (Training("lora", 2, ("q_proj", "down_proj")), {"q_proj", "down_proj.inflated", "down_proj.compensation"}),
        (Training("lora-default", 2), {"q_proj", "v_proj"}),  # where PEFT puts it
    ],
    ids=["all", "o_proj", "two", "default"],
)
def test_lora_goes_on_both_factors(training: Training, places: set[str], hardened: Path) -> None:
    names = trained_names(training.apply(load_model(hardened), "causal-lm"))
    assert all("lora_" in name for name in names)
    found = {place for name in names for place in re.findall(r"(\w+_proj(?:\.[a-z]+)?)\.lora_", name)}
    assert found == places
    assert len(names) == 2 * 2 * len(places)


def test_parameter_groups_cover_every_parameter_once(base: Path, hardened: Path) -> None:
    model = load_model(base)
    groups = Training("groups").on(target_of(model))
    names = [group.name for group in groups]
    assert names == [f"{kind} alone" for kind in (
        "embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norms", "head"
    )]  # fmt: skip
    found = [name for group in groups for name in trained_names(group.apply(load_model(base), "causal-lm"))]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    down = groups[names.index("down_proj alone")]
    assert {name.split(".mlp.")[1] for name in trained_names(down.apply(load_model(hardened), "causal-lm"))} == {
        "down_proj.inflated.weight", "down_proj.compensation.weight"
    }  # fmt: skip


@pytest.mark.parametrize("variant", [Variant(), Variant("width", 2.0), Variant("collapse")])
def test_train_globs_mean_the_same_on_every_variant(base: Path, hardened: Path, variant: Variant) -> None:
    model = load_model(hardened)
    variant.apply(model, 0)
    names = trained_names(Training(where=("*.o_proj.weight", "model.norm.*")).apply(model, "causal-lm"))
    expected = {
        "plain": {"o_proj.inflated.weight", "o_proj.compensation.weight"},
        "width": {"o_proj.up.weight", "o_proj.down.weight"},
        "collapse": {"o_proj.weight"},
    }[variant.kind]
    layers = {f"model.layers.{layer}.self_attn.{part}" for layer in (0, 1) for part in expected}
    assert names == layers | {"model.norm.weight"}


def test_a_variant_that_leaves_nothing_to_train(hardened: Path) -> None:
    model = load_model(hardened)
    Variant("freeze-compensation").apply(model, 0)
    with pytest.raises(SpecDefError, match="nothing is left"):
        Training(where=("*.o_proj.compensation.weight",)).apply(model, "causal-lm")


def test_the_builtin_text_is_split_by_document(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    data = load(None, base, steps=50, batch_size=8, sequence_length=64, eval_sequences=100)
    assert (data.name, len(data.train), len(data.held_out)) == (BUILTIN_NAME, 400, 100)
    train = tokenizer.decode(sequences(data.train).flatten())
    held_out = tokenizer.decode(sequences(data.held_out).flatten())
    paragraphs = [part for part in held_out.split("\n\n") if len(part) > 80]
    assert len(paragraphs) > 5
    assert not any(part in train for part in paragraphs)


def test_utility_is_measured_on_retained_text(report: AttackReport, hardened: Path, tmp_path: Path) -> None:
    """At a rate that breaks the model, what is learned without harm is less than what is learned."""
    assert all(point.retained is not None for run in report.runs for point in run.evaluations)
    control = run_of(report, "control")
    assert control.evaluations[0].retained != control.evaluations[0].loss
    text = tmp_path / "retained.txt"
    text.write_text("\n\n".join("zzz " * 30 for _ in range(20)))
    harmful = attack(small(hardened, tmp_path / "out", learning_rates=(3e-2,), steps=8, retained=str(text)))
    run = run_of(harmful, "control")
    assert run.useful_progress is not None
    assert run.useful_progress <= (run.progress or 0)
    unmeasured = attack(small(hardened, tmp_path / "none", retained="none"))
    assert run_of(unmeasured, "control").useful_progress is None


def test_two_at_a_time_find_the_same(report: AttackReport, hardened: Path, tmp_path: Path) -> None:
    two = attack(small(hardened, tmp_path, jobs=2, learning_rates=(1e-4,)))
    assert [run.spec for run in two.runs] == [run.spec for run in report.runs[:3]]
    for here, there in zip(report.runs, two.runs, strict=False):
        assert there.best == pytest.approx(here.best, rel=1e-4)


def test_classification(hardened: Path, tmp_path: Path) -> None:
    """The base has no head for the task: it is drawn from the seed, the same for control and attack."""
    path = tmp_path / "labelled.jsonl"
    words, labels = ["bad", "good", "so-so"], ["no", "yes", "maybe"]
    rows = [{"text": f"{words[n % 3]} {n}", "label": labels[n % 3]} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = small(hardened, tmp_path / "out", dataset=str(path), task="sequence-classification")
    result = attack(replace(made, trainings=("full", "lora")))
    control = run_of(result, "control")
    assert control.start == pytest.approx(math.log(3), rel=0.5)
    for run in result.runs:
        assert run.start == pytest.approx(control.start, rel=1e-4)


def test_a_model_without_manifest_needs_only_a_control(base: Path, tmp_path: Path) -> None:
    result = attack(small(base, tmp_path, control=base))
    assert [(run.spec.subject, str(run.spec.variant)) for run in result.runs] == [
        ("control", "plain"), ("model", "plain"), ("model", "rebalance"),
    ]  # fmt: skip
    assert result.attacks[1].share() == pytest.approx(1.0)
    assert "Nothing in the weights" in result.notes[0]


def without_manifest(directory: Path, out: Path) -> Path:
    return shutil.copytree(directory, out / "bare", ignore=shutil.ignore_patterns(MANIFEST_NAME))


def test_a_fold_that_comes_without_its_manifest_is_undone_all_the_same(base: Path, fold: Path, tmp_path: Path) -> None:
    result = attack(small(without_manifest(fold, tmp_path), tmp_path / "out", control=base))
    _, plain, rebalanced = findings(result)
    assert str(rebalanced.attack.spec.variant) == "rebalance"
    assert (rebalanced.share or 0) >= 0.95
    assert (plain.share or 0) < 0.5
    assert "The weights show a fold" in result.notes[0]
    assert any("do not reach below η₀/α" in note for note in result.notes)
    assert not any("stopped" in sentence for sentence in summary(result))


def test_a_fold_is_undone_before_float16_that_does_not_hold_it(base: Path, fold: Path, tmp_path: Path) -> None:
    result = attack(small(fold, tmp_path / "out", control=base, steps=1, dtype="float16"))
    control, plain, rebalanced = findings(result)
    assert plain.start is None
    assert rebalanced.start == pytest.approx(control.start, rel=1e-3)


def test_inserted_layers_without_their_manifest_are_collapsed(base: Path, hardened: Path, tmp_path: Path) -> None:
    result = attack(small(without_manifest(hardened, tmp_path), tmp_path / "out", control=base))
    shares = {str(finding.attack.spec.variant): finding.share for finding in findings(result)[1:]}
    assert {"collapse", "rebalance"} <= set(shares)
    assert shares["collapse"] == pytest.approx(1, abs=0.05)
    assert "The weights show factors: 4 layers" in result.notes[0]


def test_a_fold_grows_beside_its_blocks_and_rebalancing_is_there(fold: Path, tmp_path: Path) -> None:
    """`harden` folds where it can, so `attack --expand 2x` must go on from there. Libraries are left as they were."""
    before = (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
    result = attack(small(fold, tmp_path / "out", variants=("width:2",), steps=1))
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before
    assert {run.spec.variant.kind for run in result.runs} == {"plain", "rebalance", "width"}
    plain, width = run_of(result, "plain"), run_of(result, "width")
    assert width.start == plain.start
    # What trains is fresh, but for the embeddings, which no fold scales.
    assert width.trainable_parameters == width.parameters - plain.parameters + 258 * 32


def test_a_control_that_is_another_model_is_noticed(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] *= 1.1  # 0.7 % of the loss: a short attack learns no more
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    made = small(base, tmp_path / "out", steps=1)
    assert "The control is another model" in " ".join(attack(replace(made, control=other)).notes)
    assert "another model" not in " ".join(attack(replace(made, control=base)).notes)


def test_a_tracker_has_a_log_of_every_run(hardened: Path, tmp_path: Path) -> None:
    """What TensorBoard reads back is what the run recorded."""
    result = attack(small(hardened, tmp_path, learning_rates=(1e-4,), steps=2, report_to=("tensorboard",)))
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {run.spec.run_id for run in result.runs}
    for run in result.runs:
        events = EventAccumulator(str(tmp_path / "logs" / run.spec.run_id))
        events.Reload()
        logged = [event.value for event in events.Scalars("eval/attack_loss")]
        assert logged == pytest.approx([point.loss for point in run.evaluations], rel=1e-6)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_an_engine_that_nothing_here_uses_is_named(engine: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(SpecDefError, match=f"ACCELERATE_USE_{engine} is set"):
        plan_attack(AttackOptions(model=base, control=base, out=base.parent / "out"))
