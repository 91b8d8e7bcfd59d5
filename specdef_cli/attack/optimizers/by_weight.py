"""What optimizers that treat every weight by itself have in common: the walk over groups and weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class WeightwiseOptimizer(Optimizer, ABC):
    """An optimizer whose update of a weight needs that weight's gradient, state and group, and no other's."""

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
        """Change ``weight`` in place.

        Args:
            weight: Of any shape.
            gradient: In float32, of the weight's shape.
            state: What is kept of this weight from step to step; empty before the first.
            group: The options of the weight's parameter group.
        """
