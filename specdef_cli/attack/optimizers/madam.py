"""Madam, the multiplicative optimizer (Bernstein, Zhao, Meister, Liu, Anandkumar, Yue 2020, arXiv 2006.14560).

Every weight moves by a share of itself, so an update commutes with any rescaling of rows and columns. That makes it the
attacker who sees through a diagonal gauge without knowing of it. No library that this project uses has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from specdef_cli.attack.optimizers.by_weight import WeightwiseOptimizer


class Madam(WeightwiseOptimizer):
    """``w ← w · exp(−η · sign(w) · ĝ)`` with ``ĝ`` the gradient over its root mean square.

    The paper's training from scratch also bounds every weight by three times its tensor's initial root mean square.
    That bound is left out: a trained tensor has larger entries from the start, and clipping them is no fine-tuning.
    Weights that are zero stay zero, so biases that start there do not train, nor does LoRA, whose B does.

    Args:
        params: As every optimizer takes them.
        lr: The logarithmic change of a weight whose gradient is at its usual size.
        beta: Decay of the mean of squared gradients.
        bound: ``ĝ`` is clipped to ±``bound`` (the paper's 10).
        eps: Keeps entries whose gradient has always been zero where they are.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        beta: float = 0.999,
        bound: float = 10.0,
        weight_decay: float = 0.0,
        eps: float = 1e-30,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "bound": bound, "weight_decay": weight_decay, "eps": eps})

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One update; weight decay is decoupled, as in AdamW."""
        if not state:
            # float32 whatever the weights are: squares of small gradients leave bfloat16's steps behind.
            state.update(step=0, mean_square=torch.zeros_like(weight, dtype=torch.float32))
        state["step"] += 1
        mean_square = state["mean_square"].lerp_(gradient.square(), 1 - group["beta"])
        size = mean_square.sqrt().div_(math.sqrt(1 - group["beta"] ** state["step"])).add_(group["eps"])
        normalized = (gradient / size).clamp_(-group["bound"], group["bound"])
        change = normalized.mul_(weight.sign()).add_(group["weight_decay"]).mul_(-group["lr"]).exp_()
        weight.mul_(change.to(weight.dtype))
