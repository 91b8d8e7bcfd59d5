"""Scales read off the weights: taken out (rebalanced), evened out (equalised), or trained at rates of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.trainings.own import train_only
from specdef_cli.attack.variants.scales import Scaled, channel_scales, equalise, rebalance, scale_rates
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.recognise import channel_exponents
from specdef_cli.model import load_model
from specdef_cli.model.body import Side, SymmetricPair
from tests.attack.conftest import TOKENS, logits
from tests.hardened import harden_to
from tests.tiny_families import CASES, build_config, randomize


def octaves(left: torch.nn.Module, right: torch.nn.Module) -> float:
    """The largest factor between two models' weights, as a power of two."""
    others = right.state_dict()
    return max(float((weight / others[name]).abs().log2().abs().max()) for name, weight in left.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_a_fold_is_undone_from_the_weights_alone(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base_directory = checkpoints[case]
    harden_to(tmp_path / "fold", base_directory)
    base, model = load_model(base_directory), load_model(tmp_path / "fold")
    # No manifest is at hand: the attacker has the loaded model and nothing else.
    before = logits(model)
    assert octaves(base, model) >= 20
    rebalance(model)
    assert torch.equal(logits(model), before)
    # Random weights leave a channel's size uncertain by an octave or two; a fold moved it by thirteen or more.
    assert octaves(base, model) <= 4


def test_a_second_pass_finds_nothing() -> None:
    model = transformers.LlamaForCausalLM(build_config("llama")).eval()
    randomize(model)
    rebalance(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rebalance(model)
    for name, tensor in model.state_dict().items():
        assert bool(((tensor / weights[name]).log2().abs() <= 2).all()), name


def test_the_factor_of_a_channel_is_read_off_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 2048, generator=generator), torch.randn(2048, 8, generator=generator)
    # Channel 5 is important on both sides by nature: nothing that a fold could have done.
    up[5] *= 16
    down[:, 5] *= 16
    up[2] *= 2**13
    down[:, 2] /= 2**13
    # Another pair's channel crosses this one's: a single column, which no median feels.
    up[:, 7] *= 2**20
    each = tuple((channel,) for channel in range(8))
    pair = SymmetricPair("mlp", "up_down", 8, (Side("up", 0, each, 1), Side("down", 1, each, -1)))
    expected = torch.zeros(8, dtype=torch.int64)
    expected[2] = 13
    assert torch.equal(channel_exponents(pair, {"up": up, "down": down}.__getitem__), expected)


def test_a_side_of_zeros_says_nothing() -> None:
    each = ((0,), (1,))
    pair = SymmetricPair("p", "up_down", 2, (Side("up", 0, each, 1), Side("down", 1, each, -1)))
    tensors = {"up": torch.zeros(2, 4), "down": torch.tensor([[1.0, 1024.0]] * 4)}
    assert not channel_exponents(pair, tensors.__getitem__).any()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [(rebalance, SpecDefError, "no symmetric pair"), (equalise, NotApplicable, "could be equalised")],
)
def test_a_family_without_pairs_is_refused(change: Any, error: type[Exception], said: str) -> None:
    config = transformers.BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(error, match=said):
        change(transformers.BloomForCausalLM(config))


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_up_to_rounding(case: str, checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints[case])
    before = logits(model)
    try:
        equalise(model)
    except NotApplicable:
        return
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_a_fold_and_its_base_are_converted_to_the_same_weights_but_for_queries_and_keys(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Nothing but the weights says where gains and ranges went: gains are 1, both sides of an MLP range equally."""
    base_directory = checkpoints["llama"]
    harden_to(tmp_path / "fold", base_directory)
    base, fold = load_model(base_directory), load_model(tmp_path / "fold")
    for model in (base, fold):
        equalise(model)
        for block in model.model.layers:
            assert torch.allclose(block.input_layernorm.weight, torch.ones(32))
            assert torch.allclose(block.post_attention_layernorm.weight, torch.ones(32))
            rows, columns = block.mlp.up_proj.weight.abs().amax(1), block.mlp.down_proj.weight.abs().amax(0)
            torch.testing.assert_close(rows, columns, rtol=1e-5, atol=0)
    different = {
        name
        for (name, weight), other in zip(base.named_parameters(), fold.parameters(), strict=True)
        if not torch.allclose(weight, other, rtol=1e-4)
    }
    assert different
    assert all(".q_proj." in name or ".k_proj." in name for name in different)


def test_a_gain_of_zero_stays() -> None:
    model = transformers.LlamaForCausalLM(build_config("llama-tied")).eval()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    before = logits(model)
    equalise(model)
    assert model.model.layers[0].input_layernorm.weight[3] == 0
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def after_training(model: nn.Module, steps: int = 3) -> torch.Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-30, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("case", ["llama", "gpt2", "qwen2"])
def test_a_fold_trains_like_its_base(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base_directory = checkpoints[case]
    harden_to(tmp_path / "fold", base_directory)
    base, plain, scaled = load_model(base_directory), load_model(tmp_path / "fold"), load_model(tmp_path / "fold")
    with torch.no_grad():
        before = scaled(input_ids=TOKENS).logits
        scale_rates(scaled)
        assert torch.equal(scaled(input_ids=TOKENS).logits, before)
    assert any(isinstance(module, Scaled) for module in scaled.modules())
    scale_rates(base)
    expected = after_training(base)
    moved = (expected - before).abs().mean()
    # A column of another pair that crosses a row shifts few medians by less than an octave.
    assert (after_training(scaled) - expected).abs().mean() < 0.2 * moved
    assert not (after_training(plain) - expected).abs().mean() < moved  # NaN counts


def test_a_step_is_the_scale_squared_for_plain_descent() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[2] *= 2**9
        layer.weight[:, 4] /= 2**7
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    rows, columns = channel_scales(weight)
    assert float(rows[2]) >= 2**7
    assert float(columns[0, 4]) <= 2**-5
    inputs = torch.randn(4, 6)
    twin = nn.Linear(6, 5)
    twin.load_state_dict({"weight": weight, "bias": bias})
    twin(inputs).square().sum().backward()
    assert twin.weight.grad is not None
    assert twin.bias.grad is not None
    scale_rates(layer)
    layer(inputs).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    step = -1e-3 * (rows * columns) ** 2 * twin.weight.grad
    assert torch.allclose(layer.weight - weight, step, rtol=1e-3, atol=float(weight.abs().max()) * 1e-6)
    assert torch.allclose(layer.bias - bias, -1e-3 * rows.flatten() ** 2 * twin.bias.grad, rtol=1e-3, atol=1e-6)


def test_each_scale_belongs_to_its_channel() -> None:
    weight = torch.full((2, 6, 8), 0.5)
    weight[1, 3] *= -(2.0**11)
    weight[0, :, 5] /= 2.0**6
    rows, columns = channel_scales(weight)
    assert rows[1, 3] == 2**11
    assert columns[0, 0, 5] == 2**-6
    assert int((rows != 1).sum()) == int((columns != 1).sum()) == 1
    assert torch.equal(torch.cat([part.flatten() for part in channel_scales(torch.zeros(3, 4))]), torch.ones(7))


def test_outputs_of_a_transposed_layer_are_its_columns() -> None:
    layer = Conv1D(4, 6)
    with torch.no_grad():
        layer.weight[:, 1] = 2.0**8 * layer.weight[:, 0]
        layer.bias.fill_(1.0)
    scale_rates(layer)
    ratio = layer.bias / layer.parametrizations.bias.original
    assert ratio[1] / ratio[0] == 2**8


def test_what_is_shared_or_frozen_keeps_one_rate() -> None:
    embedding, head, frozen = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False)
    head.weight = embedding.weight
    with torch.no_grad():
        for weight in (embedding.weight, frozen.weight):
            weight[0] *= 2**10
    frozen.requires_grad_(False)
    model = nn.ModuleList([embedding, head, frozen])
    scale_rates(model)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "2.weight"}


def test_a_glob_means_the_same(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["llama"])
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[1] *= 2**10
    scale_rates(model)
    train_only(model, ["*.v_proj.weight"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(model.model.layers)
    assert "model.layers.0.self_attn.v_proj.parametrizations.weight.original" in trained
