"""The optimizers that an attack can use, as a table.

A row is all that a new optimizer takes: where its class lives, what it is called with, and which learning rates are
worth trying. The class is named, not imported, so that a library is loaded only when one of its optimizers is used.

The second-order ones estimate the Hessian's diagonal by Hutchinson's method, with probes of ±1 (Rademacher): their
products with the Hessian are unbiased, and exact for a diagonal one. K-FAC is missing. Its PyTorch packages are either
not maintained (``kfac-pytorch``, ``singd``) or give curvature without an optimizer (``curvlinops``, ``nngeometry``);
SOAP and Shampoo, which precondition by Kronecker factors too, are here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdef_cli.errors import SpecDefError

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerChoice:
    """One optimizer of the table.

    Attributes:
        module, name: Where the class is found.
        arguments: What it is constructed with, next to the learning rate.
        learning_rates: Rates that fine-tune an ordinary model well, largest first.
        alpha_power: The best rate on a layer inflated by α lies near η₀/α**alpha_power. Adam divides by the
            gradient's size, so α acts once, through the factor that follows; plain gradients carry it a second time;
            updates in proportion to the weight don't feel it.
        second_order: Whether a step differentiates the gradient. Attention has to be eager for that, and gradients
            aren't clipped: a step is gradient over curvature, and to clip one of them would shrink it by the
            gradient's norm, which hardening inflates.
        elementwise: Whether every entry is updated by itself. The others have to see whole tensors, not shards.
        matrix_option: A parameter group's option that tells hidden matrices (true) from everything else (false).
    """

    module: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    alpha_power: int = 1
    second_order: bool = False
    elementwise: bool = True
    matrix_option: str | None = None

    def load(self) -> Callable[..., Optimizer]:
        """Import the optimizer's class."""
        return getattr(importlib.import_module(self.module), self.name)


OPTIMIZERS: Mapping[str, OptimizerChoice] = {
    "adamw": OptimizerChoice("torch.optim", "AdamW", {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}),
    "sgd": OptimizerChoice("torch.optim", "SGD", {"momentum": 0.9}, learning_rates=(1.0, 1e-1, 1e-2), alpha_power=2),
    "adafactor": OptimizerChoice("torch.optim", "Adafactor", elementwise=False),
    "lion": OptimizerChoice("pytorch_optimizer", "Lion"),
    "lamb": OptimizerChoice("pytorch_optimizer", "Lamb", elementwise=False),
    # Moonlight's scale (arXiv 2502.16982) lets Muon and the AdamW of the other parameters share one rate.
    "muon": OptimizerChoice(
        "pytorch_optimizer", "Muon", {"use_adjusted_lr": True}, elementwise=False, matrix_option="use_muon"
    ),
    "sophia": OptimizerChoice(
        "pytorch_optimizer",
        "SophiaH",
        {"hessian_distribution": "rademacher"},
        learning_rates=(1.0, 1e-1, 1e-2, 1e-3),
        second_order=True,
    ),
    # The ε of its authors' code. The library's 10⁻¹⁶ lets entries without curvature jump: 1.98 for 1.55 on tiny_llama.
    "adahessian": OptimizerChoice(
        "pytorch_optimizer",
        "AdaHessian",
        {"hessian_distribution": "rademacher", "eps": 1e-4},
        learning_rates=(1e-1, 1e-2, 1e-3),
        second_order=True,
    ),
    # By default it preconditions from step 1000 on. The grafted step is RMSProp's (3), without a bias correction, hence
    # the small rates.
    "shampoo": OptimizerChoice(
        "pytorch_optimizer",
        "ScalableShampoo",
        {"start_preconditioning_step": 2, "preconditioning_compute_steps": 2, "graft_type": 3},
        learning_rates=(1e-4, 1e-5, 1e-6),
        elementwise=False,
    ),
    "soap": OptimizerChoice("pytorch_optimizer", "SOAP", elementwise=False),
    "madam": OptimizerChoice("specdef_cli.attack.madam", "Madam", learning_rates=(1e-1, 1e-2, 1e-3), alpha_power=0),
    "schedule-free": OptimizerChoice("pytorch_optimizer", "ScheduleFreeAdamW"),
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
