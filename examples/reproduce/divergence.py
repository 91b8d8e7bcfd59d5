"""The learning rate at which plain gradient descent is seen to diverge, against 2/σ₁ of the Hessian at the start.

Three problems, hardened at α from 1 to 10⁶: an MLP near a minimum, where the loss is nearly quadratic; the same MLP at
its random start, where it is not; and the tiny Llama on the attack text.

    python examples/reproduce/divergence.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from descent import DivergenceRate, observed_divergence_rate
from setting import RESIDUAL_WRITERS, attack_batch, insert, markdown, slope, tiny_llama
from torch import nn

from specdef_cli.certify.curvature import (
    Loss,
    hessian_top,
    largest_stable_rate,
    model_loss,
    trainable,
)

ALPHAS = (1.0, 1e1, 1e2, 1e3, 1e4, 1e6)
TOP_K = 1


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        build: A fresh model and its loss.
        layers: Globs of what is hardened.
        alphas: The factors tried.
        steps: Steps of each trial of a learning rate.
    """

    build: Callable[[], tuple[nn.Module, Loss]]
    layers: tuple[str, ...]
    alphas: tuple[float, ...]
    steps: int


def mlp(training_steps: int) -> tuple[nn.Module, Loss]:
    """A tanh MLP 6-12-12-3 that regresses on another one of its kind, after some gradient descent."""
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
        for _ in range(2)
    )
    inputs = torch.randn(64, 6, dtype=torch.float64)
    targets = teacher(inputs).detach() + 0.1 * torch.randn(64, 3, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(student(inputs), targets)

    optimizer = torch.optim.SGD(student.parameters(), lr=0.2)
    for _ in range(training_steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return student, loss


def llama() -> tuple[nn.Module, Loss]:
    """The tiny Llama on one sequence of the attack text."""
    model = tiny_llama()
    return model, model_loss(model, attack_batch(1, 64))


PROBLEMS = {
    "MLP near a minimum": Problem(lambda: mlp(5000), ("2",), ALPHAS, 200),
    "MLP at its start": Problem(lambda: mlp(0), ("2",), ALPHAS, 200),
    "tiny Llama": Problem(llama, RESIDUAL_WRITERS, (1.0, 1e2, 1e4), 15),
}


def measure(problem: Problem, alpha: float) -> tuple[float, DivergenceRate]:
    """2/σ₁ and where descent was seen to diverge."""
    model, loss = problem.build()
    insert(model, problem.layers, alpha, TOP_K)
    parameters = list(trainable(model).values())
    predicted = largest_stable_rate(hessian_top(loss, parameters))
    return predicted, observed_divergence_rate(loss, parameters, around=predicted, steps=problem.steps)


def main() -> None:
    """Measure and print a Markdown table."""
    rows, slopes = [], []
    for name, problem in PROBLEMS.items():
        found = [measure(problem, alpha) for alpha in problem.alphas]
        for alpha, (predicted, observed) in zip(problem.alphas, found, strict=True):
            ratio = observed.value / predicted
            rows.append((name, f"{alpha:.0e}", f"{predicted:.3g}", f"{observed.value:.3g}", f"{ratio:.2f}"))
        large = [(alpha, rate.value) for alpha, (_, rate) in zip(problem.alphas, found, strict=True) if alpha >= 1e2]
        slopes.append(f"{name} {slope([alpha for alpha, _ in large], [rate for _, rate in large]):.2f}")
    print(markdown(("problem", "α", "2/σ₁", "diverges at η", "ratio"), rows))
    print(f"\nSlope of log η over log α from α = 10²: {', '.join(slopes)}.")


if __name__ == "__main__":
    main()
