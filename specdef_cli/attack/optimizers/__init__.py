"""The optimizers that an attack can use, as a table.

A row is all that a new optimizer takes: where its class lives, what it is called with, and which learning rates are
worth trying. The class is named, not imported, so that a library is loaded only when one of its optimizers is used.

The second-order ones estimate the Hessian's diagonal by Hutchinson's method, with probes of ±1 (Rademacher): their
products with the Hessian are unbiased, and exact for a diagonal one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from specdef_cli.attack.table import NotApplicable, Table

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerChoice:
    """A row of the table."""

    name: str
    optimizer: str  # package.module:name of the class
    help: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # what it is constructed with, next to the learning rate
    learning_rates: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)
    """Rates that fine-tune an ordinary model well, largest first."""
    alpha_power: int = 1
    """The best rate on a layer inflated by α lies near η₀/α**alpha_power. Adam divides by the gradient's size, so α
    acts once, through the factor that follows; plain gradients carry it a second time; updates in proportion to the
    weight don't feel it."""
    second_order: bool = False
    """Whether a step differentiates the gradient. Attention has to be eager for that, and gradients aren't clipped: a
    step is gradient over curvature, and to clip one of them would shrink it by the gradient's norm, which hardening
    inflates."""
    elementwise: bool = True
    """Whether every entry is updated by itself. The others have to see whole tensors, not shards."""
    requires: str | None = None
    """A library that the extra for attacks does not install; the optimizer is refused without it."""
    matrix_option: str | None = None
    """A parameter group's option that tells hidden matrices (true) from everything else (false)."""

    @property
    def available(self) -> bool:
        return self.requires is None or find_spec(self.requires) is not None

    def load(self) -> Callable[..., Optimizer]:
        """Import the class; :class:`NotApplicable` if the library that it needs is not installed."""
        if not self.available:
            raise NotApplicable(
                f"the optimizer {self.name} needs {self.requires}, which is not installed",
                f"Run: pip install {self.requires}",
            )
        return resolve_name(self.optimizer)


OPTIMIZERS: Table[OptimizerChoice] = Table(
    "optimizer",
    "specdef.attack_optimizers",
    OptimizerChoice,
    (
        OptimizerChoice(
            "adamw",
            "torch.optim:AdamW",
            "Adam with decoupled weight decay, what nearly every recipe uses.",
            {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True},
        ),
        OptimizerChoice(
            "sgd",
            "torch.optim:SGD",
            "Gradient descent with momentum 0.9.",
            {"momentum": 0.9},
            learning_rates=(1.0, 1e-1, 1e-2),
            alpha_power=2,
        ),
        OptimizerChoice(
            "adafactor",
            "torch.optim:Adafactor",
            "Adam's second moment in factors, as PyTorch has it.",
            elementwise=False,
        ),
        OptimizerChoice(
            "adafactor-relative",
            "transformers.optimization:Adafactor",
            "Adafactor as transformers has it: steps in proportion to a tensor's size (arXiv 1804.04235).",
            {"scale_parameter": True, "relative_step": False, "warmup_init": False},
            learning_rates=(1e-1, 1e-2, 1e-3, 1e-4),
            elementwise=False,
        ),
        OptimizerChoice(
            "adamw-small-epsilon",
            "torch.optim:AdamW",
            "AdamW with an ε of 1e-30: gradients of any size make full steps.",
            {"betas": (0.9, 0.999), "eps": 1e-30, "fused": True},
        ),
        OptimizerChoice(
            "adamw-8bit",
            "bitsandbytes.optim:AdamW8bit",
            "AdamW with its state in 8 bits, in blocks of 256 weights (arXiv 2110.02861).",
            elementwise=False,
            requires="bitsandbytes",
        ),
        # The smallest step of torch's default, 10⁻⁶, is as large as weights that were divided by 2²⁰.
        OptimizerChoice(
            "rprop",
            "torch.optim:Rprop",
            "A step size for every weight, from the gradient's sign (Riedmiller and Braun 1993).",
            {"step_sizes": (1e-30, 50.0)},
        ),
        OptimizerChoice("rmsprop", "torch.optim:RMSprop", "Adam without momentum: what Keras and many examples use."),
        OptimizerChoice(
            "adagrad",
            "torch.optim:Adagrad",
            "Steps over the sum of all squared gradients.",
            learning_rates=(1e-1, 1e-2, 1e-3, 1e-4),
        ),
        OptimizerChoice(
            "lars",
            "pytorch_optimizer:LARS",
            "SGD with a trust ratio for each tensor (arXiv 1708.03888).",
            learning_rates=(10.0, 1.0, 1e-1, 1e-2),
            alpha_power=0,
            elementwise=False,
        ),
        OptimizerChoice(
            "sgd-tensor-normalized",
            "specdef_cli.attack.optimizers.own:NormalizedSGD",
            "Gradient descent, the gradient of every tensor of size 1 (arXiv 1707.04822).",
            {"per": "tensor"},
            elementwise=False,
        ),
        OptimizerChoice(
            "sgd-row-normalized",
            "specdef_cli.attack.optimizers.own:NormalizedSGD",
            "Gradient descent, the gradient of every row of size 1.",
            {"per": "row"},
            elementwise=False,
        ),
        OptimizerChoice("lion", "pytorch_optimizer:Lion", "The sign of a momentum (arXiv 2302.06675)."),
        OptimizerChoice(
            "lamb",
            "pytorch_optimizer:Lamb",
            "Adam with a trust ratio for each tensor (arXiv 1904.00962).",
            elementwise=False,
        ),
        # Moonlight's scale (arXiv 2502.16982) lets Muon and the AdamW of the other parameters share one rate.
        OptimizerChoice(
            "muon",
            "pytorch_optimizer:Muon",
            "Orthogonalized momentum for hidden matrices, AdamW for the rest.",
            {"use_adjusted_lr": True},
            elementwise=False,
            matrix_option="use_muon",
        ),
        OptimizerChoice(
            "sophia",
            "pytorch_optimizer:SophiaH",
            "Steps over the Hessian's diagonal, clipped (arXiv 2305.14342).",
            {"hessian_distribution": "rademacher"},
            learning_rates=(1.0, 1e-1, 1e-2, 1e-3),
            second_order=True,
        ),
        # The ε of its authors' code. The library's 10⁻¹⁶ lets entries without curvature jump: 1.98 for 1.55 on
        # tiny_llama.
        OptimizerChoice(
            "adahessian",
            "pytorch_optimizer:AdaHessian",
            "Adam with the Hessian's diagonal (arXiv 2006.00719).",
            {"hessian_distribution": "rademacher", "eps": 1e-4},
            learning_rates=(1e-1, 1e-2, 1e-3),
            second_order=True,
        ),
        # By default it preconditions from step 1000 on. The grafted step is RMSProp's (3), without a bias correction,
        # hence the small rates.
        OptimizerChoice(
            "shampoo",
            "pytorch_optimizer:ScalableShampoo",
            "Preconditioned by Kronecker factors (arXiv 2002.09018).",
            {"start_preconditioning_step": 2, "preconditioning_compute_steps": 2, "graft_type": 3},
            learning_rates=(1e-4, 1e-5, 1e-6),
            elementwise=False,
        ),
        OptimizerChoice(
            "soap", "pytorch_optimizer:SOAP", "Adam in Shampoo's eigenbasis (arXiv 2409.11321).", elementwise=False
        ),
        OptimizerChoice(
            "madam",
            "specdef_cli.attack.optimizers.own:Madam",
            "Every weight moves by a share of itself (arXiv 2006.14560).",
            learning_rates=(1e-1, 1e-2, 1e-3),
            alpha_power=0,
        ),
        OptimizerChoice(
            "schedule-free",
            "pytorch_optimizer:ScheduleFreeAdamW",
            "AdamW with averaging instead of a schedule (arXiv 2405.15682).",
        ),
    ),
)
