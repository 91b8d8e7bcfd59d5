"""The optimizers that an attack can use, as a table.

A row is all that a new optimizer takes: where its class lives, what it is called with, and which learning rates are
worth trying. The class is named, not imported, so that a library is loaded only when one of its optimizers is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specdef_cli.errors import SpecDefError


@dataclass(frozen=True)
class OptimizerChoice:
    """One optimizer of the table.

    Attributes:
        module, name: Where the class is found.
        arguments: What it is constructed with, next to the learning rate.
        learning_rates: Rates that fine-tune an ordinary model well, largest first.
        alpha_power: The best rate on a layer inflated by α lies near η₀/α**alpha_power. Adam divides by the
            gradient's size, so α acts once, through the factor that follows; plain gradients carry it a second time.
    """

    module: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    alpha_power: int = 1

    def load(self) -> type[Any]:
        """Import the optimizer's class."""
        return getattr(importlib.import_module(self.module), self.name)


OPTIMIZERS: Mapping[str, OptimizerChoice] = {
    "adamw": OptimizerChoice("torch.optim", "AdamW", {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}),
    "sgd": OptimizerChoice("torch.optim", "SGD", {"momentum": 0.9}, learning_rates=(1.0, 1e-1, 1e-2), alpha_power=2),
}


def optimizer_choice(name: str) -> OptimizerChoice:
    """Look up an optimizer of the table.

    Raises:
        SpecDefError: The table has no such optimizer.
    """
    try:
        return OPTIMIZERS[name]
    except KeyError:
        raise SpecDefError(f"no optimizer named {name!r}", f"Choose one of: {', '.join(OPTIMIZERS)}.") from None
