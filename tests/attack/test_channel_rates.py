"""A learning rate for each channel: the function stays, and a fold is walked through as if it were not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from specdef_cli.attack.trainings.own import train_only
from specdef_cli.attack.variants.scales import channel_scales, scale_rates
from specdef_cli.hardening.options import HardenOptions
from specdef_cli.hardening.run import harden
from specdef_cli.model import load_model

TOKENS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))


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
    assert harden(HardenOptions(str(base_directory), tmp_path / "fold", verify=False)) is not None
    base, plain, scaled = load_model(base_directory), load_model(tmp_path / "fold"), load_model(tmp_path / "fold")
    with torch.no_grad():
        before = scaled(input_ids=TOKENS).logits
        growth = scale_rates(scaled)
        assert torch.equal(scaled(input_ids=TOKENS).logits, before)
    assert growth.layers > 0
    assert growth.parameters_added == growth.bytes_added == 0
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
    assert scale_rates(model).layers == 0
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
