"""Both lower bounds against the measured σ₁ of the Hessian over random networks: the ratio may never exceed 1.

python examples/reproduce/bound.py
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from compensation_bound import compensation_bounds
from path_bound import PathBound, path_bound
from setting import insert, markdown
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from specdef_cli.certify.curvature import (
    HessianProducts,
    Loss,
    differentiable_gradient,
    hessian_top,
    model_loss,
    trainable,
)
from specdef_cli.spectral.subspace import top_eigenpairs

TOLERANCE = 1e-5
EXAMPLES = {"MLP": 60, "CNN": 20, "Transformer": 20}
ROUNDING = 1 + TOLERANCE
"""The measured σ₁ is itself a lower bound, short of the true one by at most its residual."""


@dataclass(frozen=True)
class Sample:
    """One layer of one random network.

    Attributes:
        compensation, path: The bounds as shares of the measured σ₁ of the whole Hessian.
        literal: Theorem 3 with cosθ₁·cosθ₂ in the place of the alignment, as a share of what it is to bound: the
            block's own σ₁.
        proved: The same of the form that is proved.
    """

    family: str
    alpha: float
    compensation: float
    path: float | None
    literal: float | None
    proved: float | None


def mlp(draw: random.Random) -> tuple[nn.Module, Sequence[str], Loss]:
    """Two to four layers, squared error or cross-entropy; one hidden layer is hardened."""
    widths = [draw.randint(3, 10) for _ in range(draw.randint(3, 5))]
    activation = draw.choice((nn.Tanh, nn.GELU, nn.Sigmoid, nn.Identity))
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=draw.random() < 0.5), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    inputs = torch.randn(draw.randint(1, 12), widths[0], dtype=torch.float64)
    hardened = draw.choice([name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    return model, (hardened,), _regression_or_classes(draw, model, inputs, widths[-1])


def cnn(draw: random.Random) -> tuple[nn.Module, Sequence[str], Loss]:
    """Two convolutions, then two linear layers, one of which is hardened."""
    channels, hidden, classes = draw.randint(2, 4), draw.randint(4, 8), draw.randint(2, 5)
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(channels * 4, hidden),
        nn.GELU(),
        nn.Linear(hidden, classes),
    ).double()
    inputs = torch.randn(draw.randint(1, 12), 1, 8, 8, dtype=torch.float64)
    return model, (draw.choice(("5", "7")),), _regression_or_classes(draw, model, inputs, classes)


def transformer(draw: random.Random) -> tuple[nn.Module, Sequence[str], Loss]:
    """One- or two-layer Llama with d = 8; one kind of linear is hardened."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=draw.randint(8, 16), num_hidden_layers=draw.randint(1, 2),
        num_attention_heads=2, num_key_value_heads=draw.choice((1, 2)), max_position_embeddings=32,
        initializer_range=draw.uniform(0.1, 0.4), bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    tokens = torch.randint(0, 16, (draw.randint(1, 3), draw.randint(4, 10)))
    layer = draw.choice(("*.o_proj", "*.down_proj", "*.up_proj", "*.q_proj"))
    return model, (layer,), model_loss(model, {"input_ids": tokens, "labels": tokens})


def _regression_or_classes(draw: random.Random, model: nn.Module, inputs: Tensor, outputs: int) -> Loss:
    if outputs > 1 and draw.random() < 0.5:
        labels = torch.randint(0, outputs, (len(inputs),))
        return lambda: nn.functional.cross_entropy(model(inputs), labels)
    targets = torch.randn(len(inputs), outputs, dtype=torch.float64)
    return lambda: nn.functional.mse_loss(model(inputs), targets)


FAMILIES: dict[str, Callable[[random.Random], tuple[nn.Module, Sequence[str], Loss]]] = {
    "MLP": mlp,
    "CNN": cnn,
    "Transformer": transformer,
}


def block_sigma(model: nn.Module, loss: Loss, bound: PathBound) -> float:
    """σ₁ of ∂²loss/∂C∂θ_i, the block that the path bound is about."""
    parameters = trainable(model)
    compensation = parameters[f"{bound.layer}.compensation.weight"]
    before = [parameters[name] for name in bound.before]
    by_compensation, *by_before = differentiable_gradient(loss(), [compensation, *before])
    forwards, backwards = HessianProducts(by_before, [compensation]), HessianProducts([by_compensation], before)
    start = torch.randn(compensation.numel(), dtype=torch.float64)
    found = top_eigenpairs(lambda vector: forwards(backwards(vector)), start, tolerance=TOLERANCE)
    return float(found.values[0].clamp_min(0).sqrt())


def measure(family: str, seed: int) -> list[Sample]:
    """One random network, hardened at a random α in 1…10⁶ and k in 1…3."""
    draw = random.Random(f"{family}{seed}")
    torch.manual_seed(draw.getrandbits(32))
    model, layers, loss = FAMILIES[family](draw)
    alpha, top_k = 10 ** draw.uniform(0, 6), draw.randint(1, 3)
    insert(model, layers, alpha, top_k, draw.choice(("rotated", "symmetric")))
    sigma = hessian_top(loss, list(trainable(model).values()), tolerance=TOLERANCE, max_products=300).value
    samples = []
    for layer, bound in compensation_bounds(model, loss).items():
        path = path_bound(model, loss, layer)
        block = block_sigma(model, loss, path) if path else 0.0
        samples.append(
            Sample(
                family,
                alpha,
                bound.value / sigma,
                path.value / sigma if path else None,
                path.product.literal / block if path and block else None,
                path.product.value / block if path and block else None,
            )
        )
    return samples


def row(name: str, ratios: list[float]) -> tuple[str, ...]:
    """Number, worst (largest), median and smallest of the ratios, and how many exceed 1."""
    above = sum(ratio > ROUNDING for ratio in ratios)
    figures = (max(ratios), statistics.median(ratios), min(ratios))
    return (name, str(len(ratios)), *(f"{figure:.4g}" for figure in figures), str(above))


def main() -> None:
    """Measure and print a Markdown table."""
    samples = [
        sample for family, count in EXAMPLES.items() for seed in range(count) for sample in measure(family, seed)
    ]
    rows = []
    for family in FAMILIES:
        mine = [sample for sample in samples if sample.family == family]
        rows += [
            row(f"{family}: compensation / σ₁(H)", [sample.compensation for sample in mine]),
            row(f"{family}: path / σ₁(H)", [sample.path for sample in mine if sample.path is not None]),
            row(f"{family}: proved form / σ₁(block)", [s.proved for s in mine if s.proved is not None]),
            row(f"{family}: literal reading / σ₁(block)", [s.literal for s in mine if s.literal is not None]),
        ]
    print(markdown(("ratio", "layers", "largest", "median", "smallest", "above 1"), rows))


if __name__ == "__main__":
    main()
