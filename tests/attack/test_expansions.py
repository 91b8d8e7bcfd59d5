"""Surgery against closed forms: the function stays, factors have the σ₁ of Theorem 8, counts are by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from specdef_cli.attack.variants.factored import (
    collapse,
    deepen,
    freeze_compensation,
    hardened_paths,
    inject,
    original_name,
    widen,
)
from specdef_cli.model import SpecDefLinear
from tests.commands import refusal
from tests.tiny_models import random_llama

D, M, LAYERS = 32, 48, 2
ALPHA = 64.0


def harden(linear: nn.Linear, alpha: float = ALPHA, top_k: int = 3) -> SpecDefLinear:
    """The rotated gauge written down densely, in float64."""
    weight = linear.weight.detach().double()
    left = torch.linalg.svd(weight).U
    inverse = torch.ones(len(weight), dtype=torch.float64)
    inverse[:top_k] = 1 / alpha
    pair = SpecDefLinear(linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype)
    with torch.no_grad():
        pair.inflated.weight.copy_((left / inverse).mT @ weight)
        pair.compensation.weight.copy_(left * inverse)
        if linear.bias is not None:
            pair.compensation.bias.copy_(linear.bias)
    return pair


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return random_llama(vocab_size=64)


@pytest.fixture
def hardened(llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every down_proj (32×48) hardened by hand."""
    model = copy.deepcopy(llama)
    for layer in model.model.layers:
        layer.mlp.down_proj = harden(layer.mlp.down_proj)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(40).view(2, 20) % 64
    with torch.no_grad():
        return model(input_ids=tokens).logits


PAIR = D * M + D * D


@pytest.mark.parametrize(
    ("surgery", "after", "trainable"),
    [
        (collapse, D * M, D * M),
        (freeze_compensation, PAIR, D * M),
        (inject, PAIR + D * D, D * D),
        # w(n+m) = mn + m² = m(n+m), so w = m exactly
        (lambda model: widen(model, 2), 2 * PAIR, PAIR),
        # w = ⌈2.5·m⌉ = 80
        (lambda model: widen(model, 3.5), PAIR + 80 * (D + M), 80 * (D + M)),
        # r = 32: r×n and m×r, C beside them
        (lambda model: deepen(model, 2), D * M + D * D + D * D, D * M + D * D),
        (lambda model: deepen(model, 4), D * M + 3 * D * D + D * D, D * M + 3 * D * D),
    ],
    ids=["collapse", "freeze-compensation", "inject", "width2", "width3.5", "depth2", "depth4"],
)
def test_surgery_keeps_the_function_and_counts(
    llama: LlamaForCausalLM,
    hardened: LlamaForCausalLM,
    surgery: Callable[[nn.Module], None],
    after: int,
    trainable: int,
) -> None:
    parameters = sum(p.numel() for p in hardened.parameters())
    surgery(hardened)
    torch.testing.assert_close(logits(hardened), logits(llama), rtol=1e-4, atol=2e-4)
    assert sum(p.numel() for p in hardened.parameters()) - parameters == LAYERS * (after - PAIR)
    for layer in hardened.model.layers:
        assert sum(p.numel() for p in layer.mlp.down_proj.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("alpha", [1e2, 1e4])
def test_depth_is_theorem_8(n: int, alpha: float) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(24, 16)
    top = torch.linalg.matrix_norm(linear.weight.detach().double(), 2).item()
    model: Any = nn.Sequential(harden(linear, alpha))
    inflated = model[0].inflated.weight.detach().double()
    deepen(model, n)
    factors = [factor.weight.detach().double() for factor in model[0].factors]
    assert len(factors) == n
    for factor in factors:
        expected = (alpha * top) ** (1 / n)
        assert math.isclose(torch.linalg.matrix_norm(factor, 2).item(), expected, rel_tol=1e-5)
    product = factors[0]
    for factor in factors[1:]:
        product = factor @ product
    # Rows that are not inflated are α times smaller than the rest; each must be right on its own scale.
    error = torch.linalg.vector_norm(product - inflated, dim=1) / torch.linalg.vector_norm(inflated, dim=1)
    assert error.max() < 1e-5
    assert not model[0].compensation.weight.requires_grad
    assert model[0].compensation.bias.requires_grad


def test_width_starts_at_zero_and_at_the_scale_of_its_input() -> None:
    torch.manual_seed(3)
    model: Any = nn.Sequential(harden(nn.Linear(256, 128)))
    widen(model, 2, seed=5)
    assert not model[0].up.weight.any()
    rows = torch.linalg.vector_norm(model[0].down.weight, dim=1)
    assert 0.9 < rows.mean() < 1.1
    again: Any = nn.Sequential(harden(nn.Linear(256, 128)))
    widen(again, 2, seed=5)
    assert torch.equal(again[0].down.weight, model[0].down.weight)


def test_bfloat16_survives(hardened: LlamaForCausalLM) -> None:
    hardened.to(torch.bfloat16)
    before = logits(hardened)
    widen(hardened, 2)
    assert torch.equal(logits(hardened), before)
    assert {p.dtype for p in hardened.parameters()} == {torch.bfloat16}


def test_original_names(hardened: LlamaForCausalLM) -> None:
    widen(hardened, 2)
    layers = hardened_paths(hardened)
    assert layers == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    for part in ("pair.inflated", "pair.compensation", "up", "down"):
        name = f"model.layers.1.mlp.down_proj.{part}.weight"
        assert name in dict(hardened.named_parameters())
        assert original_name(name, layers) == "model.layers.1.mlp.down_proj.weight"
    assert original_name("model.norm.weight", layers) == "model.norm.weight"


def test_a_model_without_inserted_layers_is_refused(llama: LlamaForCausalLM) -> None:
    with refusal("no factors", "rebalanc"):
        collapse(llama)
