"""The table of optimizers: each one trains through the Trainer, and does what its name says."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.one_run import RunSpec
from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.optimizers.own import Madam, NormalizedSGD, build_optimizer, hidden_matrices
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.train import _check_passes, load_for_training
from specdef_cli.attack.trainer import AttackTrainer, Recorder, make_trainer
from specdef_cli.attack.trainings import Training
from specdef_cli.errors import SpecDefError
from specdef_cli.model.loading import new_objects_only
from specdef_cli.model.opened import open_model
from tests.attack.conftest import learned, train_run
from tests.commands import refusal
from tests.runs import spec

SECOND_ORDER = [name for name, choice in OPTIMIZERS.items() if choice.second_order]
STEPS = 3


@pytest.fixture(scope="module")
def memorizable() -> AttackData:
    """One batch of random bytes, again and again, and evaluated on itself."""
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(1))
    items: list[dict[str, Any]] = [{"input_ids": row, "labels": row} for row in tokens]
    return AttackData("bytes", items * STEPS, items, default_data_collator, "0")


def trained(run: RunSpec, base: Path, data: AttackData, scratch: Path, *callbacks: TrainerCallback) -> AttackTrainer:
    set_seed(run.seed)
    model = load_for_training(run, open_model(base), data)
    trainer = make_trainer(run, model, data, Recorder(lambda step, loss: None), str(scratch), AttackOptions(""))
    for callback in callbacks:
        trainer.add_callback(callback)
    with new_objects_only():
        trainer.train()
    assert isinstance(trainer, AttackTrainer)
    return trainer


INSTALLED = [name for name, choice in OPTIMIZERS.items() if choice.available]


@pytest.mark.parametrize("name", INSTALLED)
def test_each_learns_a_batch_by_heart(name: str, base: Path, memorizable: AttackData) -> None:
    # The initial loss is about log 258, and random bytes have nothing to generalize from: it falls by memory alone.
    assert learned(train_run(spec(name, eval_every=STEPS), base, memorizable)) > 0.02


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in INSTALLED), ("adamw", "mixed"), ("adahessian", "mixed")]
)
def test_each_runs_in_low_precision(name: str, dtype: Any, base: Path, memorizable: AttackData, tmp_path: Path) -> None:
    trainer = trained(spec(name, dtype=dtype, steps=2), base, memorizable, tmp_path)
    parameters = dict(trainer.model.named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {
        torch.float32 if dtype == "mixed" else torch.bfloat16
    }
    assert all(bool(parameter.isfinite().all()) for parameter in parameters.values())
    before = load_for_training(spec(name, dtype=dtype), open_model(base), memorizable).state_dict()
    assert any(not torch.equal(before[key], parameter) for key, parameter in parameters.items())


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_schedule_warms_up(schedule: Any, base: Path, memorizable: AttackData, tmp_path: Path) -> None:
    rate, steps, warm = 1e-3, 6, 4
    last = {"constant": 1, "linear": 1 / 2, "cosine": (1 + math.cos(math.pi / 2)) / 2}[schedule]
    run = spec("adamw", learning_rate=rate, schedule=schedule, warmup_steps=warm, steps=steps, eval_every=steps)
    trainer = trained(run, base, memorizable, tmp_path)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([rate * share for share in (0, 1 / 4, 1 / 2, 3 / 4, 1, last)])


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_probes_are_plus_or_minus_one(name: str) -> None:
    """With z² = 1, z ⊙ Hz is a diagonal H's diagonal from a single probe, exactly; with no other z is it."""
    diagonal = torch.linspace(-3, 5, 64)
    model = nn.Linear(64, 1, bias=False)
    optimizer = build_optimizer(OPTIMIZERS.choose(name), model, 1e-3)
    (0.5 * (diagonal * model.weight.square()).sum()).backward(create_graph=True)
    optimizer.step()
    assert torch.equal(optimizer.state[model.weight]["hessian"], diagonal[None])


@pytest.mark.parametrize(("name", "clipped"), [("adahessian", False), ("sgd", True)])
def test_only_first_order_gradients_are_clipped(
    name: str, clipped: bool, base: Path, memorizable: AttackData, tmp_path: Path
) -> None:
    def weights(max_grad_norm: float) -> torch.Tensor:
        run = spec(name, max_grad_norm=max_grad_norm, steps=1)
        return torch.cat(
            [parameter.flatten() for parameter in trained(run, base, memorizable, tmp_path).model.parameters()]
        )

    assert torch.equal(weights(0.0), weights(1e-2)) != clipped


def names_of(model: nn.Module, parameters: frozenset[nn.Parameter]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter in parameters}


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_hidden_matrices_alone(tied: bool) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=tied, attention_bias=True,
        )
    )  # fmt: skip
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linears += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names_of(model, hidden_matrices(model)) == {f"model.layers.0.{name}.weight" for name in linears}
    optimizer = build_optimizer(OPTIMIZERS.choose("muon"), model, 1e-3, weight_decay=0.1, decayed={"lm_head.weight"})
    groups = {(group["use_muon"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    rest = len(list(model.parameters())) - len(linears)
    assert groups == (
        {(True, 0): 7, (False, 0): rest} if tied else {(True, 0): 7, (False, 0): rest - 1, (False, 0.1): 1}
    )
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_muon_takes_adapters_and_leaves_heads_and_patches(base: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], r=2))
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 4
    assert adapters <= names_of(model, hidden_matrices(model))
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=4,
                  patch_size=2)
    )  # fmt: skip
    taken = names_of(vit, hidden_matrices(vit))
    assert len(taken) == 6
    assert all(name.startswith("vit.") and "embeddings" not in name for name in taken)


class Snapshots(TrainerCallback):
    """The head's weight at every evaluation, and the iterate that schedule-free methods keep beside it."""

    def __init__(self) -> None:
        self.evaluated: list[torch.Tensor] = []
        self.iterates: list[torch.Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            head = kwargs["model"].lm_head.weight
            self.evaluated.append(head.detach().clone())
            self.iterates.append(kwargs["optimizer"].state[head]["z"].clone())


def test_schedule_free_is_evaluated_at_the_average(base: Path, memorizable: AttackData, tmp_path: Path) -> None:
    seen = Snapshots()
    trained(spec("schedule-free", learning_rate=1e-2), base, memorizable, tmp_path, seen)
    assert len(seen.evaluated) == STEPS
    for step in range(STEPS):
        average = torch.stack(seen.iterates[: step + 1]).mean(0)
        torch.testing.assert_close(seen.evaluated[step], average, atol=1e-5, rtol=0)
    assert float((seen.evaluated[-1] - seen.iterates[-1]).abs().max()) > 1e-3


def test_madam_by_hand() -> None:
    start = torch.tensor([2.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = Madam([weight], lr=0.1, beta=0.75, bound=1.2)
    # Mean squares: (0.75 · 0.25 · 9 + 0.25 · 16) / (1 − 0.75²) and so on; the third is far beyond the bound.
    second = 4 / math.sqrt((0.75 * 0.25 * 9 + 0.25 * 16) / (1 - 0.75**2))
    for gradient, normalized in (
        ([3.0, 3.0, -0.01, 1.0], [1.0, -1.0, -1.0, 0.0]),  # the first normalized gradient is the sign
        ([4.0, 0.0, -1.0, 1.0], [second, 0.0, -1.2, 0.0]),
    ):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        start *= torch.exp(-0.1 * torch.tensor(normalized, dtype=torch.float64))
        torch.testing.assert_close(weight.detach(), start, rtol=1e-6, atol=0)


def test_madam_commutes_with_scaling() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator)
    scale = 2.0 ** torch.arange(-20, 15, dtype=torch.float32).view(5, 7)
    plain, scaled = nn.Parameter(start.clone()), nn.Parameter(start * scale)
    optimizers = [Madam([weight], lr=0.03, weight_decay=0.1) for weight in (plain, scaled)]
    for _ in range(4):
        gradient = torch.randn(5, 7, generator=generator)
        plain.grad, scaled.grad = gradient, gradient / scale
        for optimizer in optimizers:
            optimizer.step()
    assert not torch.equal(plain.detach(), start)
    torch.testing.assert_close(scaled.detach() / scale, plain.detach(), rtol=1e-6, atol=0)


def test_second_order_is_refused_over_processes() -> None:
    state: Any = SimpleNamespace(num_processes=2)
    _check_passes(spec("adamw"), state, AttackOptions(""))
    with pytest.raises(SpecDefError, match="--optimizer sophia"):
        _check_passes(spec("sophia"), state, AttackOptions(""))
    with pytest.raises(SpecDefError, match="--batch-size 4 does not split over 2 processes of 4 passes"):
        _check_passes(spec("adamw"), state, AttackOptions("", gradient_accumulation=4))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_saving_memory_changes_no_curve(
    base: Path, memorizable: AttackData, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    passes: list[tuple[int, bool]] = []
    step = AttackTrainer.training_step

    def record(self: Any, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        passes.append((len(inputs["input_ids"]), model.is_gradient_checkpointing))
        return step(self, model, inputs, *arguments, **keywords)

    monkeypatch.setattr(AttackTrainer, "training_step", record)
    run = spec("adamw", training=Training(method))
    plain = train_run(run, base, memorizable)
    saving = train_run(run, base, memorizable, gradient_accumulation=2, gradient_checkpointing=True)
    assert passes == [(4, False)] * STEPS + [(2, True)] * 2 * STEPS
    for one, other in ((plain.evaluations, saving.evaluations), (plain.train, saving.train)):
        assert [point.loss for point in one] == pytest.approx([point.loss for point in other], rel=1e-5)
    assert plain.evaluations[-1].loss != plain.evaluations[0].loss


def test_what_cannot_be_is_refused(base: Path, memorizable: AttackData, tmp_path: Path) -> None:
    with pytest.raises(SpecDefError, match="--optimizer sophia differentiates the gradient"):
        train_run(spec("sophia"), base, memorizable, gradient_checkpointing=True)

    def trainer(name: str, supports: bool = True, **options: Any) -> AttackTrainer:
        model: Any = load_for_training(spec(name), open_model(base), memorizable)
        model.supports_gradient_checkpointing = supports
        recorder = Recorder(lambda step, loss: None)
        return make_trainer(spec(name), model, memorizable, recorder, str(tmp_path), AttackOptions("", **options))

    with pytest.raises(SpecDefError, match="LlamaForCausalLM does not support --gradient-checkpointing"):
        trainer("adamw", supports=False, gradient_checkpointing=True)
    elementwise, whole = trainer("adamw"), trainer("muon")
    elementwise.is_fsdp_enabled = whole.is_fsdp_enabled = True  # what the launcher sets: weights in shards
    elementwise.create_optimizer(elementwise.model)
    with pytest.raises(SpecDefError, match="muon has to see whole tensors"):
        whole.create_optimizer(whole.model)


@pytest.mark.parametrize(("per", "dimensions"), [("tensor", (0, 1)), ("row", (1,))])
def test_normalized_gradients_by_hand(per: Any, dimensions: tuple[int, ...]) -> None:
    start, gradient = torch.ones(3, 4), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gradient *= torch.tensor([[1e-25], [1.0], [1e10]])  # squares of the first are zero in float32
    weight = nn.Parameter(start.clone())
    optimizer = NormalizedSGD([weight], lr=0.1, per=per, momentum=0.5)
    weight.grad = gradient
    optimizer.step()
    unit = (gradient.double() / gradient.double().square().mean(dimensions, keepdim=True).sqrt()).float()
    torch.testing.assert_close(weight.detach(), start - 0.1 * 0.5 * unit)
    weight.grad = torch.zeros_like(gradient)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), start - 0.1 * (0.5 + 0.25) * unit)


def test_a_small_epsilon_moves_what_the_usual_one_leaves_still() -> None:
    """The gradient of a weight that was multiplied by 2⁴⁰ and compensated for is 2⁻⁴⁰ of what it was."""
    moved = {}
    for name in ("adamw", "adamw-small-epsilon"):
        layer = nn.Linear(1, 1, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.full((1, 1), 2.0**-40)
        build_optimizer(OPTIMIZERS.choose(name), layer, 1e-3).step()
        moved[name] = float((layer.weight.detach() - before).abs())
    assert moved["adamw-small-epsilon"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["adamw"] < 1e-5


def test_relative_adafactor_moves_in_proportion_to_the_tensor() -> None:
    moved = []
    for scale in (1.0, 2.0**13):
        layer = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            layer.weight.fill_(scale)
        layer.weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / scale
        build_optimizer(OPTIMIZERS.choose("adafactor-relative"), layer, 1e-2).step()
        moved.append((layer.weight.detach() - scale).norm() / scale)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=0)


def test_an_optimizer_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdef_cli.attack.optimizers.find_spec", lambda name: None)
    with refusal("bitsandbytes", "Run: pip install bitsandbytes"):
        OPTIMIZERS.choose("adamw-8bit").load()
