"""The paper's Theorem 8: more factors instead of the inflated one.

N trainable factors of σ₁ = (ασ)^{1/N} each bring the bound from α down to about α^{1/N}. The Hessian itself then has
σ₁ ∝ α^{2(N−1)/N} (measured: ``examples/reproduce/injection.py``): more factors are worse for the attacker than freezing
the compensation, which leaves no α in it at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdef_cli.attack.variants.beside import grow_between
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.attack.variants.inserted_layers import GrownLayer, linear_like, replace_layers
from specdef_cli.runtime import SpecDefLinear


class DeepenedLayer(GrownLayer):
    """y = C F_N ⋯ F_1 x + b with F_N ⋯ F_1 = W~ and σ₁(F_i) = σ₁(W~)^{1/N}.

    Args:
        pair: n → m; its compensation is kept, its inflated factor W~ = U S Vᵀ is split.
        factors: N ≥ 2. F_1 = S^{1/N} Vᵀ is r×n, F_N = U S^{1/N} is m×r, those between are S^{1/N}, r×r; r = min(m, n).
    """

    def __init__(self, pair: SpecDefLinear, factors: int) -> None:
        super().__init__(pair.in_features, pair.out_features, pair.weight)
        like = pair.inflated.weight
        # float64: the SVD's absolute error is that of the inflated σ₁, and α eats as many digits of the directions
        # that are not inflated. Not every accelerator has float64.
        device = like.device if like.device.type in ("cpu", "cuda") else torch.device("cpu")
        left, values, right = torch.linalg.svd(like.detach().to(device, torch.float64), full_matrices=False)
        root = values.pow(1 / factors)  # [r]
        weights = [root[:, None] * right, *[torch.diag(root)] * (factors - 2), left * root]
        self.factors = nn.Sequential(*(linear_like(weight, like) for weight in weights))
        self.compensation = pair.compensation

    def forward(self, input: Tensor) -> Tensor:
        return self.compensation(self.factors(input))  # [..., n] → [..., r] → [..., m] → [..., m]


def deepen(model: nn.Module, factor: int = 2, *, seed: int = 0) -> Growth:
    """Replace every inflated factor by ``factor`` trainable ones with the same product (Theorem 8); freeze the
    compensations. Where nothing was inserted: fresh blocks after every frozen one, ``factor`` times as many.

    Args:
        model: Changed in place.
        factor: ≥ 2.
        seed: Of fresh blocks.

    Raises:
        NotApplicable: The model has neither a hardened layer nor a block that could be made afresh.
    """
    if not any(isinstance(module, SpecDefLinear) for module in model.modules()):
        return grow_between(model, factor, seed)

    def build(pair: SpecDefLinear) -> nn.Module:
        pair.compensation.weight.requires_grad_(False)
        return DeepenedLayer(pair, factor)

    return replace_layers(model, build)
