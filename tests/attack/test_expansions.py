"""Surgery against closed forms: the function stays, factors have the σ₁ of Theorem 8, counts are by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.variants import Variant
from specdef_cli.attack.variants.factored import collapse, deepen, freeze_compensation, inject, widen
from specdef_cli.attack.variants.grown import outermost_block_paths
from specdef_cli.model import SpecDefLinear, load_model
from tests.attack.conftest import TOKENS, logits, trained_names, training_curve
from tests.commands import refusal
from tests.tiny_families import CASES
from tests.tiny_models import VOCABULARY, random_llama

D, M, LAYERS = 32, 48, 2
PAIR = D * M + D * D
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


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return random_llama()


@pytest.fixture
def hardened() -> LlamaForCausalLM:
    """Every down_proj (32×48) hardened by hand."""
    model = random_llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = harden(layer.mlp.down_proj)
    return model


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
    parameters = hardened.num_parameters()
    surgery(hardened)
    torch.testing.assert_close(logits(hardened), logits(llama), rtol=1e-4, atol=2e-4)
    assert hardened.num_parameters() - parameters == LAYERS * (after - PAIR)
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
    model, again = (nn.Sequential(harden(nn.Linear(256, 128))) for _ in range(2))
    for each in (model, again):
        widen(each, 2, seed=5)
    grown: Any = model[0]
    assert not grown.up.weight.any()
    assert 0.9 < torch.linalg.vector_norm(grown.down.weight, dim=1).mean() < 1.1
    assert torch.equal(again.get_parameter("0.down.weight"), grown.down.weight)


def test_bfloat16_survives(hardened: LlamaForCausalLM) -> None:
    hardened.to(torch.bfloat16)
    before = logits(hardened)
    widen(hardened, 2)
    assert torch.equal(logits(hardened), before)
    assert {p.dtype for p in hardened.parameters()} == {torch.bfloat16}


def test_models_that_cannot_be_changed_so_are_refused(llama: LlamaForCausalLM) -> None:
    with refusal("no factors", "rebalanc"):
        collapse(llama)
    sizes = {"vocab_size": 96, "embedding_size": 32, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.ElectraConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    model = transformers.ElectraForMaskedLM(config).eval()
    Variant.parse("width:2").apply(model, 0)
    with pytest.raises(NotApplicable, match="changes what the model computes"):  # its norms stand in the way
        model(input_ids=TOKENS)


# --- fresh blocks beside and between those of a fold -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "variant"),
    [*((case, "width:1.5") for case in CASES), *((case, "width:3") for case in list(CASES)[::8]),
     *((case, "depth:3") for case in list(CASES)[::3])],
)  # fmt: skip
def test_fresh_blocks_change_no_bit_of_the_function(case: str, variant: str, checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints[case])
    before = logits(model)
    blocks = [model.get_submodule(path) for path in outermost_block_paths(model)]
    parameters = [sum(each.numel() for each in block.parameters()) for block in blocks]
    Variant.parse(variant).apply(model, seed=0)
    assert torch.equal(logits(model), before)
    grown = [sum(each.numel() for each in block.parameters()) for block in blocks]
    assert sum(grown) >= 1.4 * sum(parameters)
    assert all(after > before for after, before in zip(grown, parameters, strict=True))


BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32


@pytest.mark.parametrize(
    ("variant", "added"),
    # Of a half: one of two key heads with two of four query heads, and 24 of 48 units.
    [("width:2", BLOCK), ("width:3", 2 * BLOCK), ("depth:3", 2 * BLOCK), ("width:1.5", (BLOCK - 64) // 2 + 64)],
)
def test_only_what_is_fresh_and_what_no_fold_scales_trains(llama: LlamaForCausalLM, variant: str, added: int) -> None:
    before = llama.num_parameters()
    Variant.parse(variant).apply(llama, seed=0)
    assert llama.num_parameters() - before == 2 * added
    trained = trained_names(llama)
    assert {name for name in trained if ".grown." not in name} == {"model.embed_tokens.weight"}
    assert sum(llama.get_parameter(name).numel() for name in trained) == 2 * added + VOCABULARY * 32


@pytest.mark.parametrize("variant", ["width:2", "depth:2"])
def test_what_is_grown_is_drawn_by_the_seed_and_learns(variant: str) -> None:
    models = [random_llama() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        Variant.parse(variant).apply(model, seed)
    first, same, other = (model.get_parameter("model.layers.1.grown.0.mlp.up_proj.weight") for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    model = models[0]
    model.model.embed_tokens.weight.requires_grad_(False)
    losses = training_curve(model, TOKENS, 10)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("variant", ["width:2", "depth:2"])
def test_scaled_modules_are_grown_beside_like_a_fold(variant: str, scaled: Path) -> None:
    model = load_model(scaled)
    before = logits(model)
    Variant.parse(variant).apply(model, 0)
    assert torch.equal(logits(model), before)
    assert not any("inflated" in name or "scale" in name for name in trained_names(model))
    assert any(".grown." in name for name in trained_names(model))
