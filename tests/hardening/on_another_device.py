"""Runs the computing parts of the package on another device; prints how far each is from the CPU.

    python -m tests.hardening.on_another_device CHECKPOINT [DEVICE]

Without a device it is the one of ``other_device``, and a process of its own because torch then counts an accelerator
that other tests must not find. A tensor that was left on the CPU ends it with torch's own error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.optimizers.own import build_optimizer
from specdef_cli.certify.curvature import hessian_top
from specdef_cli.hardening.options import Factors, HardenOptions
from specdef_cli.hardening.plan import make_plan
from specdef_cli.model.opened import open_model
from specdef_cli.spectral.subspace import effective_rank, top_subspace
from tests.hardening.other_device import other_device

Compute = Callable[[torch.device], list[Tensor]]

CPU = torch.device("cpu")
HARDENED: dict[str, dict[str, Any]] = {
    "factors": {"construction": Factors(alpha=1e3, top_k=4)},
    "factors, symmetric gauge": {"construction": Factors(alpha=10.0, gauge="symmetric")},
    "factors in bfloat16": {"construction": Factors(alpha=1e3), "dtype": "bfloat16"},
}


def main(directory: str, device: str | None = None) -> None:
    """Print the distances as JSON, by name."""
    with other_device() if device is None else nullcontext(torch.device(device)) as chosen:
        found = {name: distance(run(chosen), run(CPU)) for name, run in computations(Path(directory)).items()}
    print(json.dumps(found))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to numbers above 1; what was computed there must be there."""
    largest = 0.0
    for there, here in zip(found, expected, strict=True):
        assert there.device != CPU, there.device
        largest = max(largest, float((there.to(CPU) - here).abs().max() / here.abs().max().clamp(min=1)))
    return largest


def computations(directory: Path) -> dict[str, Compute]:
    """What is run, by name."""
    return {
        **NUMERICAL,
        **{name: partial(transforms, directory, options) for name, options in HARDENED.items()},
        **{f"optimizer {name}": partial(step, name) for name in OPTIMIZERS if OPTIMIZERS.choose(name).available},
    }


def subspace(rows: int, columns: int, device: torch.device) -> list[Tensor]:
    """The projection onto the basis, which has no sign, and the singular values."""
    found = top_subspace(_gaussian(rows, columns).to(device), 4, 0)
    return [found.basis @ found.basis.mT, found.singular_values]


def rank(device: torch.device) -> list[Tensor]:
    """The effective rank."""
    return [torch.tensor(effective_rank(_gaussian(300, 400).to(device), 0)).to(device)]


def _gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def transforms(directory: Path, options: dict[str, Any], device: torch.device) -> list[Tensor]:
    """Every tensor that hardening computes; of two factors their product."""
    base = open_model(directory)
    plan = make_plan(base, HardenOptions(str(directory), Path("unused"), **options))
    made = [group.transform(base.checkpoint, device).tensors for group in plan.groups if group.transform is not None]
    return [tensor.to(device) for tensors in made for tensor in _products(tensors)]


def _products(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    found = {name: tensor.to(CPU).double() for name, tensor in tensors.items()}
    for name in [name for name in found if name.endswith(".compensation.weight")]:
        inflated = name.replace(".compensation.", ".inflated.")
        found[inflated] = found.pop(name) @ found[inflated]
    return list(found.values())


def hessian(device: torch.device) -> list[Tensor]:
    """σ₁ of a network of two layers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs = torch.randn(5, 6, dtype=torch.float64).to(device)
    weights = {name: value.detach().to(device).requires_grad_() for name, value in network.named_parameters()}

    def loss() -> Tensor:
        outputs: Tensor = torch.func.functional_call(network, weights, (inputs,))
        return outputs.square().mean()

    return [torch.tensor(hessian_top(loss, list(weights.values())).eigenvalue).to(device)]


def step(optimizer: str, device: torch.device) -> list[Tensor]:
    """Three steps of an optimizer on one linear layer."""
    torch.manual_seed(0)  # some draw vectors
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + number)
    layer.weight, layer.bias = (nn.Parameter(value.detach().to(device)) for value in (layer.weight, layer.bias))
    chosen = build_optimizer(OPTIMIZERS.choose(optimizer), layer, 1e-3)
    for _ in range(3):
        chosen.zero_grad()
        layer(torch.linspace(-1, 2, 12, device=device).reshape(2, 6)).square().mean().backward(create_graph=True)
        chosen.step()
    return [layer.weight.detach()]


NUMERICAL: dict[str, Compute] = {
    "subspace by Krylov iteration": partial(subspace, 300, 400),
    "subspace by SVD": partial(subspace, 20, 30),
    "effective rank": rank,
    "Hessian": hessian,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
