"""Parameter groups, and optimizers that no package has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from specdef_cli.attack.optimizers import OptimizerChoice
from specdef_cli.model.skeleton import output_embeddings


def build_optimizer(
    choice: OptimizerChoice,
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    decayed: Collection[str] = (),
) -> Optimizer:
    """Construct an optimizer for whatever is trainable in ``model``."""
    matrices = hidden_matrices(model) if choice.matrix_option else frozenset()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter in matrices, name in decayed), []).append(parameter)
    described = [
        {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay if decays else 0.0}
        | ({choice.matrix_option: matrix} if choice.matrix_option else {})
        for (matrix, decays), parameters in groups.items()
    ]
    return choice.load()(described, lr=learning_rate, **choice.arguments)


def hidden_matrices(model: nn.Module) -> frozenset[nn.Parameter]:
    """The matrices between a model's embeddings and its head, adapters included: what Muon is for.

    Embeddings, the head, norms and biases are not among them, as Muon's author prescribes (Jordan et al. 2024); nor are
    convolutions, which in a Transformer embed patches.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    head = output_embeddings(whole)
    outside = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    outside |= set(head.parameters() if head is not None else ())
    trunk = whole.base_model if isinstance(whole, PreTrainedModel) else whole  # all but the head
    return frozenset(parameter for parameter in trunk.parameters() if parameter.ndim == 2 and parameter not in outside)


class WeightwiseOptimizer(Optimizer, ABC):
    """An optimizer that updates each weight by its own gradient, state and group alone."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update of every weight that has a gradient, and return what ``closure`` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, weight.grad.float(), self.state[weight], group)
        return loss

    @abstractmethod
    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Update ``weight`` in place."""


class Madam(WeightwiseOptimizer):
    """``w ← w · exp(−η · sign(w) · ĝ)`` with ``ĝ`` the gradient over its root mean square.

    The paper's training from scratch also bounds every weight by three times its tensor's initial root mean square.
    That bound is left out: a trained tensor has larger entries from the start, and clipping them is no fine-tuning.
    Weights that are zero stay zero, so biases that start there do not train, nor does LoRA, whose B does.

    Args:
        bound: ``ĝ`` is clipped to ±``bound`` (the paper's 10).
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


class NormalizedSGD(WeightwiseOptimizer):
    """``w ← w − η·m`` with ``m`` the running mean of ``g / rms(g)``, over the whole tensor or over each row."""

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
