"""Gradient descent on gradients of a fixed size: the attacker who gives every tensor, or every row, a step of its own.

To normalize the gradient of each layer (Yu, Lin, Salakhutdinov, Carbonell 2017, arXiv 1707.04822) takes out of it how
large hardening made it. pytorch_optimizer has the sign and the trust ratios, and not this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from specdef_cli.attack.optimizers.by_weight import WeightwiseOptimizer


class NormalizedSGD(WeightwiseOptimizer):
    """``w ← w − η·m`` with ``m`` the running mean of ``g / rms(g)``, over the whole tensor or over each row.

    Args:
        params: As every optimizer takes them.
        lr: The root mean square of a step once the mean has settled.
        per: Over what the gradient is normalized; a vector is one row.
        momentum: Decay of the mean.
        weight_decay: Decoupled, as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        per: Literal["tensor", "row"] = "tensor",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "per": per, "momentum": momentum, "weight_decay": weight_decay})

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One update."""
        mean = state.setdefault("mean", torch.zeros_like(weight, dtype=torch.float32))
        mean.lerp_(_normalized(gradient, group["per"]), 1 - group["momentum"])
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(mean.to(weight.dtype), alpha=-group["lr"])


def _normalized(gradient: Tensor, per: str) -> Tensor:
    """The gradient over its root mean square; zero where it is zero."""
    whole = per == "tensor" or gradient.ndim < 2
    # The largest entry first: squares of gradients below 10⁻¹⁹ are zero in float32.
    largest = gradient.abs().amax() if whole else gradient.abs().amax(-1, keepdim=True)
    gradient = gradient / torch.where(largest > 0, largest, 1.0)
    squares = gradient.square()
    size = (squares.mean() if whole else squares.mean(-1, keepdim=True)).sqrt()
    return gradient / torch.where(size > 0, size, 1.0)
