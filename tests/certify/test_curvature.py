"""σ₁ of Hessians against closed forms, dense Hessians and ARPACK."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaForCausalLM, MixtralForCausalLM

from specdef_cli.certify.curvature import (
    CurvatureFigures,
    groups_by_layer,
    hessian_top,
    hessian_top_by_group,
    largest_stable_rate,
    measure_curvature,
    model_loss,
    trainable,
)
from specdef_cli.errors import SpecDefError
from specdef_cli.spectral.subspace import SUBSPACE, top_eigenpairs
from tests.commands import refusal
from tests.tiny_families import build_config
from tests.tiny_models import random_llama


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def quadratic(eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Callable[[], Tensor]]:
    """½ xᵀ(Q Λ Qᵀ)x at a random point."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q.to(eigenvalues)
    matrix = rotation @ torch.diag(eigenvalues) @ rotation.mT
    point = torch.randn(size, generator=generator, dtype=torch.float64).to(eigenvalues).requires_grad_()
    return point, lambda: 0.5 * point @ matrix @ point


def dense_hessian(model: nn.Module, loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor]) -> Tensor:
    """The oracle: every second derivative, by ``torch.autograd.functional.hessian``."""
    named = trainable(model)
    sizes, shapes = [p.numel() for p in named.values()], [p.shape for p in named.values()]

    def of_vector(vector: Tensor) -> Tensor:
        parts = (part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True))
        return loss_of(model, dict(zip(named, parts, strict=True)))

    point = torch.cat([parameter.detach().flatten() for parameter in named.values()])
    return torch.autograd.functional.hessian(of_vector, point, vectorize=True)


def tiny_llama() -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "eager"}
    model = random_llama(**sizes, **heads, bos_token_id=0, eos_token_id=1, initializer_range=0.3).double()
    tokens = torch.randint(0, 12, (2, 6), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": tokens, "labels": tokens}


@pytest.fixture(scope="module")
def llama_hessian() -> Tensor:
    model, batch = tiny_llama()
    return dense_hessian(model, lambda m, p: functional_call(m, p, kwargs=batch).loss)


def test_two_layer_matrices_by_hand() -> None:
    # loss = ½‖C W x‖² with x = e₁, W = diag(w), C = diag(c): over C alone the Hessian is I ⊗ (Wx)(Wx)ᵀ, so σ₁ = w₁²;
    # over W alone it is (x xᵀ) ⊗ CᵀC, so σ₁ = max c².
    inner = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)).requires_grad_()
    outer = torch.diag(torch.tensor([0.5, 1.5], dtype=torch.float64)).requires_grad_()
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def loss() -> Tensor:
        return 0.5 * (outer @ inner @ x).square().sum()

    found = hessian_top_by_group(loss, {"C": [outer], "W": [inner]}, tolerance=1e-9)
    assert found["C"].value == pytest.approx(9.0)
    assert found["W"].value == pytest.approx(2.25)


def test_the_largest_modulus_wins_and_keeps_its_sign() -> None:
    point, loss = quadratic(torch.tensor([5.0, 1.0, -7.0, 0.1], dtype=torch.float64))
    found = hessian_top(loss, [point], tolerance=1e-9)
    assert (found.eigenvalue, found.value) == pytest.approx((-7, 7))
    assert largest_stable_rate(found) == pytest.approx(2 / 7)


@pytest.mark.parametrize("loss_name", ["squared error", "cross-entropy"])
def test_mlp_against_the_dense_hessian(loss_name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    inputs, labels = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 4, (7,))
    targets = torch.randn(7, 4, dtype=torch.float64)

    def of_output(output: Tensor) -> Tensor:
        if loss_name == "cross-entropy":
            return nn.functional.cross_entropy(output, labels)
        return nn.functional.mse_loss(output, targets)

    dense = dense_hessian(model, lambda m, p: of_output(functional_call(m, p, inputs)))
    found = hessian_top(lambda: of_output(model(inputs)), list(model.parameters()), tolerance=1e-8)
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(dense).abs().max()), rel=1e-8)
    for name, parameter in model.named_parameters():
        start = sum(p.numel() for p in list(model.parameters())[: list(trainable(model)).index(name)])
        block = dense[start : start + parameter.numel(), start : start + parameter.numel()]
        alone = hessian_top(lambda: of_output(model(inputs)), [parameter], tolerance=1e-8)
        assert alone.value == pytest.approx(float(torch.linalg.eigvalsh(block).abs().max()), rel=1e-8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_against_the_dense_hessian(attention: str, llama_hessian: Tensor) -> None:
    model, batch = tiny_llama()
    model.set_attn_implementation(attention)
    found = hessian_top(model_loss(model, batch), list(model.parameters()), tolerance=1e-5)
    assert found.parameters == len(llama_hessian)
    # transformers computes norms, and eager attention its softmax, in float32 whatever the model's dtype.
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(llama_hessian).abs().max()), rel=2e-6)


def test_experts_are_measured() -> None:
    """The usual way to run them on a CPU takes no float64, and certify died of it."""
    torch.manual_seed(0)
    figures = measure_curvature(MixtralForCausalLM(build_config("mixtral")), torch.randint(5, 96, (1, 6)))
    assert isinstance(figures, CurvatureFigures)
    assert math.isfinite(figures.top.value)


def test_blocks_bound_the_whole_from_below() -> None:
    model, batch = tiny_llama()
    loss = model_loss(model, batch)
    groups = groups_by_layer(model)
    assert set(groups) == {"model.embed_tokens", "model.layers.0", "model.norm", "lm_head"}
    assert sum(len(members) for members in groups.values()) == len(list(model.parameters()))
    whole = hessian_top(loss, list(model.parameters())).value
    blocks = hessian_top_by_group(loss, groups)
    assert max(block.value for block in blocks.values()) <= whole * 1.001
    assert max(block.value for block in blocks.values()) > 0.1 * whole


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 60), seed=st.integers(0, 10**6), spread=st.floats(0, 6))
def test_never_above_the_truth_and_the_residual_is_true(size: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10 ** (spread * torch.rand(size, generator=generator, dtype=torch.float64))
    eigenvalues = magnitudes * torch.randint(0, 2, (size,), generator=generator).mul(2).sub(1)
    point, loss = quadratic(eigenvalues, seed)
    truth = float(magnitudes.max())
    for max_products in (2, 5, 100):
        found = hessian_top(loss, [point], max_products=max_products)
        assert found.value <= truth * (1 + 1e-9)
        assert found.products <= max_products
        nearest = float((eigenvalues - found.eigenvalue).abs().min())
        assert nearest <= found.residual * found.value + 1e-9 * truth
        assert found.converged == (found.residual <= 1e-3)


def test_a_budget_that_is_too_small_is_admitted() -> None:
    # The two ends of the spectrum are close in modulus and the rest crowds near them: Lanczos cannot do this in five.
    eigenvalues = torch.linspace(-1, 1.0001, 400, dtype=torch.float64)
    point, loss = quadratic(eigenvalues)
    hasty = hessian_top(loss, [point], max_products=5)
    assert not hasty.converged
    assert hasty.residual > 1e-2
    assert hasty.value < 1.0001
    patient = hessian_top(loss, [point], max_products=400, tolerance=1e-6)
    assert patient.converged
    assert patient.eigenvalue == pytest.approx(1.0001, rel=1e-6)
    assert patient.products > SUBSPACE  # it restarted


def test_float32_shows_its_rounding_in_the_residual() -> None:
    eigenvalues = torch.cat([torch.logspace(-3, 0, 50), torch.tensor([1e6])])
    point, loss = quadratic(eigenvalues)
    found = hessian_top(loss, [point], tolerance=1e-12)
    assert found.value == pytest.approx(1e6, rel=1e-5)
    assert not found.converged
    assert 1e-12 < found.residual < 1e-5


@pytest.mark.parametrize("count", [1, 4])
def test_lanczos_against_arpack(count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(150, 150, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    start = torch.randn(150, generator=generator, dtype=torch.float64)
    found = top_eigenpairs(lambda vector: matrix @ vector, start, count=count, tolerance=1e-9, max_products=600)
    operator = LinearOperator((150, 150), matvec=lambda vector: matrix.numpy() @ vector, dtype=np.float64)
    values = eigsh(operator, k=count, which="LM", return_eigenvectors=False)
    expected = torch.from_numpy(values[np.argsort(-np.abs(values))].copy())
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.vectors @ found.vectors.mT, torch.eye(count, dtype=torch.float64))
    errors = torch.linalg.vector_norm(found.vectors @ matrix - found.values[:, None] * found.vectors, dim=1)
    torch.testing.assert_close(errors, found.residuals, rtol=0.1, atol=1e-10)


def test_a_curvature_whose_square_overflows() -> None:
    """A hardened SmolLM2's is 2e25. Powers of two change no digit, so the scaled problem is the same one."""
    eigenvalues = torch.linspace(1, 2, 40, dtype=torch.float32)
    small, large = (hessian_top(loss, [point]) for point, loss in map(quadratic, (eigenvalues, eigenvalues * 2.0**84)))
    assert large.eigenvalue == small.eigenvalue * 2.0**84
    assert (large.residual, large.converged) == (small.residual, True)


def test_flat_directions_and_flat_losses() -> None:
    used, unused = leaf(1.0, 2.0), leaf(3.0)
    found = hessian_top(lambda: (used**2).sum(), [used, unused], tolerance=1e-9)
    assert (found.value, found.parameters) == (pytest.approx(2.0), 3)
    linear = hessian_top(lambda: used.sum(), [used])
    assert (linear.value, linear.residual, linear.converged) == (0.0, 0.0, True)
    assert largest_stable_rate(linear) == math.inf


def test_what_has_no_hessian_is_refused() -> None:
    point, half = leaf(1.0), torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    refused: list[tuple[str, Callable[[], Tensor], list[Tensor]]] = [
        ("no trainable parameter", lambda: point.sum(), []),
        ("bfloat16", lambda: half.square().sum(), [half]),
        ("loss is nan", lambda: (point * math.nan).sum(), [point]),
        ("depends on no parameter", lambda: torch.tensor(1.0), [point]),
    ]
    for said, loss, parameters in refused:
        with pytest.raises(SpecDefError, match=said):
            hessian_top(loss, parameters)
    model, batch = tiny_llama()
    model.set_attn_implementation("sdpa")  # its fused kernels, which `model_loss` switches off
    with refusal("no second derivative", "eager"):
        hessian_top(lambda: model(**batch).loss, list(model.parameters()))
