"""Lower bounds of σ₁ against closed forms and the measured value, and the rate at which descent diverges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from specdef_cli.certify.curvature import Loss, hessian_top, model_loss, trainable
from specdef_cli.errors import SpecDefError
from tests.certify.test_curvature import leaf, quadratic
from tests.commands import refusal
from tests.scripts import script
from tests.tiny_models import random_llama

compensation_bounds = script("compensation_bound").compensation_bounds
path_bound, exclusive_parameters, product_bound, SingularSubspace = (
    getattr(script("path_bound"), name)
    for name in ("path_bound", "exclusive_parameters", "product_bound", "SingularSubspace")
)
observed_divergence_rate = script("descent").observed_divergence_rate
setting = script("setting")


def mlp(widths: list[int], seed: int, examples: int = 5) -> tuple[nn.Sequential, Loss]:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index in range(len(widths) - 1):
        layers += [nn.Linear(widths[index], widths[index + 1]), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    inputs = torch.randn(examples, widths[0], dtype=torch.float64)
    targets = torch.randn(examples, widths[-1], dtype=torch.float64)
    return model, lambda: nn.functional.mse_loss(model(inputs), targets)


def llama() -> tuple[LlamaForCausalLM, Loss]:
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "attn_implementation": "eager"}
    model = random_llama(**sizes, **more, initializer_range=0.3).double()
    tokens = torch.randint(0, 12, (2, 6))
    return model, model_loss(model, {"input_ids": tokens, "labels": tokens})


def around(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Any, Tensor, Any]:
    """The weight between all singular pairs of dense A [p, m] and C [n, q], one position."""
    _, values_left, vectors_left = torch.linalg.svd(left, full_matrices=False)
    vectors_right, values_right, _ = torch.linalg.svd(right, full_matrices=False)
    before = SingularSubspace(values_left, vectors_left[:, None])
    return before, weight, SingularSubspace(values_right, vectors_right.mT[:, None])


@settings(max_examples=200, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 6)] * 4), seed=st.integers(0, 10**6), alpha=st.floats(1, 1e6))
def test_the_product_never_exceeds_what_it_bounds(sizes: tuple[int, int, int, int], seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    outer, m, n, inner = sizes
    left, weight, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((outer, m), (m, n), (n, inner))
    )
    weight[0] *= alpha
    bound = product_bound(*around(weight, left, right))
    truth = float(torch.linalg.matrix_norm(left @ weight @ right, 2))
    assert 0 < bound.value <= truth * (1 + 1e-9)
    assert bound.value == pytest.approx(
        bound.sigma_left * bound.sigma_weight * bound.alignment * bound.sigma_right, rel=1e-9
    )
    # The module's third step, which is what makes angles sufficient.
    second = float(torch.linalg.svdvals(weight)[1]) if min(m, n) > 1 else 0.0
    sines = math.sqrt(max(0.0, 1 - bound.cosine_left**2)) * math.sqrt(max(0.0, 1 - bound.cosine_right**2))
    promised = bound.cosine_left * bound.cosine_right - second / bound.sigma_weight * sines
    assert bound.alignment >= promised - 1e-9


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("left", "weight", "right", "value", "rank", "literal"),
    [
        ([[5.0, 0], [0, 1]], [7.0, 2.0], [[3.0, 0], [0, 1]], 105, 1, 105),  # attained where the singular vectors meet
        ([[5.0, 0], [0, 2]], [0.0, 7.0], [[1.0, 0], [0, 1]], 14, 2, None),  # the leading ones miss: a higher rank wins
        ([[HALF, HALF]], [1.0, 0.9], [[HALF], [-HALF]], 0.05, 1, 0.5),  # cosines alone do not bound
    ],
)
def test_the_product_by_hand(
    left: Any, weight: Any, right: Any, value: float, rank: int, literal: float | None
) -> None:
    before, after = (torch.tensor(matrix, dtype=torch.float64) for matrix in (left, right))
    bound = product_bound(*around(torch.diag(torch.tensor(weight, dtype=torch.float64)), before, after))
    assert (bound.value, bound.rank_left) == (pytest.approx(value), rank)
    assert literal is None or bound.literal == pytest.approx(literal)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(2, 6), min_size=3, max_size=5),
    seed=st.integers(0, 10**6),
    exponent=st.floats(0, 6),
    top_k=st.integers(1, 3),
    gauge=st.sampled_from(("rotated", "symmetric")),
    data=st.data(),
)
def test_bounds_of_random_mlps_hold(
    widths: list[int],
    seed: int,
    exponent: float,
    top_k: int,
    gauge: str,
    data: st.DataObject,
) -> None:
    model, loss = mlp(widths, seed)
    layer = str(2 * data.draw(st.integers(0, len(widths) - 2)))
    setting.insert(model, (layer,), 10**exponent, top_k, gauge)
    measured = hessian_top(loss, list(model.parameters()), tolerance=1e-6, max_products=300)
    compensation = compensation_bounds(model, loss)[layer]
    assert 0 < compensation.value <= measured.value * (1 + 1e-5)
    path = path_bound(model, loss, layer)
    assert (path is None) == (layer == "0")
    if path is not None:
        assert 0 < path.value <= measured.value * (1 + 1e-5)
        assert path.product.value <= path.value * (1 + 1e-3)


def test_compensation_bound_is_the_dense_block_s_own_rayleigh_quotient() -> None:
    model, _ = llama()
    pair = next(iter(setting.insert(model, ("model.layers.0.mlp.down_proj",), 30.0, 1).values()))
    weight = pair.compensation.weight

    def of_compensation(value: Tensor) -> Tensor:
        output = torch.func.functional_call(
            model, {"model.layers.0.mlp.down_proj.compensation.weight": value}, kwargs=batch
        )
        return output.loss

    tokens = torch.randint(0, 12, (2, 6), generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": tokens, "labels": tokens}
    dense = torch.autograd.functional.hessian(of_compensation, weight.detach())  # [m, m, m, m]
    direction = torch.linalg.svd(pair.inflated.weight.detach())[0][:, 0]
    compressed = torch.einsum("aibj,i,j->ab", dense, direction, direction)
    expected = float(torch.linalg.eigvalsh(compressed).abs().max())
    found = compensation_bounds(model, model_loss(model, batch))["model.layers.0.mlp.down_proj"]
    assert found.value == pytest.approx(expected, rel=1e-4)


def test_the_path_block_factors_exactly() -> None:
    """uᵀABC'v at the bound's vectors cannot exceed the dense block's σ₁, and with full rank it comes close."""
    model, loss = mlp([3, 4, 3], seed=3, examples=2)
    setting.insert(model, ("2",), 20.0, 1)
    names = list(trainable(model))
    parameters = list(trainable(model).values())
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    by_compensation = gradients[names.index("2.compensation.weight")].flatten()
    before = [parameter for name, parameter in trainable(model).items() if name.startswith("0.")]
    rows = [torch.autograd.grad(entry, before, retain_graph=True) for entry in by_compensation]
    block = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    truth = float(torch.linalg.matrix_norm(block, 2))
    bound = path_bound(model, loss, "2")
    assert bound is not None
    assert bound.before == ("0.weight", "0.bias")
    assert 0.2 * truth < bound.value <= truth * (1 + 1e-9)


def test_what_reaches_a_transformer_layer_only() -> None:
    model, loss = llama()
    setting.insert(model, ("*.o_proj", "*.down_proj", "*.q_proj"), 10.0, 1)
    layer = "model.layers.1"
    assert set(exclusive_parameters(model, loss, f"{layer}.mlp.down_proj")) == {
        f"{layer}.mlp.gate_proj.weight",
        f"{layer}.mlp.up_proj.weight",
        f"{layer}.post_attention_layernorm.weight",
    }
    assert set(exclusive_parameters(model, loss, f"{layer}.self_attn.o_proj")) == {
        f"{layer}.self_attn.q_proj.inflated.weight",
        f"{layer}.self_attn.q_proj.compensation.weight",
        f"{layer}.self_attn.k_proj.weight",
        f"{layer}.self_attn.v_proj.weight",
        f"{layer}.input_layernorm.weight",
    }
    assert path_bound(model, loss, f"{layer}.self_attn.q_proj") is None


def test_how_everything_grows_with_alpha() -> None:
    """σ₁ and the compensation's bound as α², Theorem 3's block as α, and nothing once the compensations are frozen."""
    alphas = (1e3, 1e4, 1e5)
    measured, compensation, path, frozen, contexts = [], [], [], [], []
    for alpha in alphas:
        model, loss = llama()
        pairs = setting.insert(model, ("*.o_proj", "*.down_proj"), alpha, 1)
        measured.append(hessian_top(loss, list(model.parameters())).value)
        bounds = compensation_bounds(model, loss)
        assert set(bounds) == set(pairs)
        best = max(bounds.values(), key=lambda bound: bound.value)
        compensation.append(best.value)
        contexts.append(best.context)
        bound = path_bound(model, loss, best.layer)
        assert bound is not None
        path.append(bound.value)
        for pair in pairs.values():
            pair.compensation.weight.requires_grad_(False)
        assert compensation_bounds(model, loss) == {}
        assert path_bound(model, loss, best.layer) is None
        frozen.append(hessian_top(loss, list(trainable(model).values())).value)
        assert best.value <= measured[-1]
        assert path[-1] <= measured[-1]
    slope = setting.slope
    assert slope(alphas, measured) == pytest.approx(2, abs=0.01)
    assert slope(alphas, compensation) == pytest.approx(2, abs=0.01)
    assert slope(alphas, path) == pytest.approx(1, abs=0.05)
    assert slope(alphas, frozen) == pytest.approx(0, abs=0.01)
    assert max(contexts) / min(contexts) == pytest.approx(1, abs=1e-3)


def test_a_layer_that_does_not_run_bounds_nothing_and_what_has_no_bound_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.idle = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
            self.times = 1

        def forward(self, value: Tensor) -> Tensor:
            for _ in range(self.times):
                value = self.shared(value)
            return value

    model = Twice()
    setting.insert(model, ("*",), 10.0, 1)
    inputs = torch.ones(3, 2, dtype=torch.float64)
    bounds = compensation_bounds(model, lambda: model(inputs).square().mean())
    assert bounds["idle"].value == 0
    assert bounds["shared"].value > 0
    model.times = 2
    with pytest.raises(SpecDefError, match="shared runs 2 times"):
        compensation_bounds(model, lambda: model(inputs).square().mean())
    plain, loss = mlp([3, 4, 2], seed=0)
    with pytest.raises(SpecDefError):
        compensation_bounds(plain, loss)
    setting.insert(plain, ("2",), 10.0, 1)
    with refusal("0 is not a hardened layer", "2"):
        path_bound(plain, loss, "0")


@pytest.mark.parametrize(("largest", "guess"), [(0.3, 1.0), (40.0, 1e-3), (40.0, 500.0)])
def test_descent_on_a_quadratic_diverges_at_two_over_sigma(largest: float, guess: float) -> None:
    point, loss = quadratic(torch.tensor([largest, 0.2, 0.1], dtype=torch.float64))
    before = point.detach().clone()
    found = observed_divergence_rate(loss, [point], around=guess * 2 / largest, steps=200)
    assert found.stable < 2 / largest * 1.02
    assert found.divergent > 2 / largest
    assert found.divergent / found.stable <= 1.05
    assert found.value == pytest.approx(2 / largest, rel=0.05)
    assert torch.equal(point, before)


def test_no_divergence_where_there_is_none() -> None:
    point = leaf(1.0)
    bounded = observed_divergence_rate(lambda: torch.tanh(point).sum(), [point], around=1.0, steps=3)
    assert bounded.divergent == math.inf
    assert bounded.stable == bounded.value > 1e8
