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

Check = Callable[[torch.device], float]
"""Takes the other device and returns the largest difference from what the CPU computes."""

CPU = torch.device("cpu")
HARDENED: dict[str, dict[str, Any]] = {
    "factors": {"construction": Factors(alpha=1e3, top_k=4)},
    "factors, symmetric gauge": {"construction": Factors(alpha=10.0, gauge="symmetric")},
    "factors in bfloat16": {"construction": Factors(alpha=1e3), "dtype": "bfloat16"},
}


def main(directory: str, device: str | None = None) -> None:
    """Print the distances as JSON, by name."""
    with other_device() if device is None else nullcontext(torch.device(device)) as chosen:
        found = {name: check(chosen) for name, check in checks(Path(directory)).items()}
    print(json.dumps(found))


def checks(directory: Path) -> dict[str, Check]:
    """What is run, by name."""
    return {
        **NUMERICAL,
        **{name: partial(transforms, directory, options) for name, options in HARDENED.items()},
        **{f"optimizer {name}": partial(step, name) for name in OPTIMIZERS if OPTIMIZERS.choose(name).available},
    }


def subspace(rows: int, columns: int, device: torch.device) -> float:
    """The projection onto the basis, which has no sign, and the singular values."""
    weight = _gaussian(rows, columns)
    here, there = (top_subspace(weight.to(place), 4, 0) for place in (CPU, device))
    return max(
        distance(there.basis @ there.basis.mT, here.basis @ here.basis.mT),
        distance(there.singular_values, here.singular_values),
    )


def rank(device: torch.device) -> float:
    """The effective rank."""
    weight = _gaussian(300, 400)
    return abs(effective_rank(weight.to(device), 0) - effective_rank(weight, 0))


def _gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def transforms(directory: Path, options: dict[str, Any], device: torch.device) -> float:
    """Every tensor that hardening computes; of two factors their product, relative to its largest value."""
    base = open_model(directory)
    checkpoint, plan = base.checkpoint, make_plan(base, HardenOptions(str(directory), Path("unused"), **options))
    largest = 0.0
    for group in plan.groups:
        if group.transform is not None:
            here, there = (_products(group.transform(checkpoint, place).tensors) for place in (CPU, device))
            largest = max(largest, *(_relative(there[name], here[name]) for name in here))
    return largest


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def _products(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: tensor.to(CPU).double() for name, tensor in tensors.items()}
    for name in [name for name in found if name.endswith(".compensation.weight")]:
        inflated = name.replace(".compensation.", ".inflated.")
        found[inflated] = found.pop(name) @ found[inflated]
    return found


def hessian(device: torch.device) -> float:
    """σ₁ of a network of two layers."""
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs = torch.randn(5, 6, dtype=torch.float64)
    found = []
    for place in (CPU, device):
        weights = {name: value.detach().to(place).requires_grad_() for name, value in network.named_parameters()}
        loss = partial(_squares, network, weights, inputs.to(place))
        found.append(hessian_top(loss, list(weights.values())).eigenvalue)
    return abs(found[0] - found[1])


def _squares(network: nn.Module, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    outputs: Tensor = torch.func.functional_call(network, weights, (inputs,))
    return outputs.square().mean()


def step(optimizer: str, device: torch.device) -> float:
    """Three steps of an optimizer on one linear layer."""
    results = []
    for place in (CPU, device):
        torch.manual_seed(0)  # some draw vectors
        layer = nn.Linear(6, 4)
        with torch.no_grad():
            for number, parameter in enumerate(layer.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + number)
        layer.weight, layer.bias = (nn.Parameter(value.detach().to(place)) for value in (layer.weight, layer.bias))
        chosen = build_optimizer(OPTIMIZERS.choose(optimizer), layer, 1e-3)
        for _ in range(3):
            chosen.zero_grad()
            layer(torch.linspace(-1, 2, 12, device=place).reshape(2, 6)).square().mean().backward(create_graph=True)
            chosen.step()
        results.append(layer.weight.detach())
    return distance(results[1], results[0])


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference; the first tensor must be on the other device."""
    assert found.device != CPU, found.device
    return float((found.to(CPU) - expected).abs().max())


NUMERICAL: dict[str, Check] = {
    "subspace by Krylov iteration": partial(subspace, 300, 400),
    "subspace by SVD": partial(subspace, 20, 30),
    "effective rank": rank,
    "Hessian": hessian,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
