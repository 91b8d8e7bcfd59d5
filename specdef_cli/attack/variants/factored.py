"""Variants of a model stored as factors: multiply the pairs, freeze one, or grow the model beside or within them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.variants.grown import grow_beside, grow_between
from specdef_cli.model import SpecDefLinear, SpecDefScaled


class GrownLayer(nn.Module):
    """What a variant puts in the place of a hardened layer: as a whole, one linear layer of the original model.

    ``weight`` is the tombstone's successor: model code reads a dtype off it (T5 does), never values.
    """

    weight: Tensor

    def __init__(self, pair: SpecDefLinear) -> None:
        super().__init__()
        self.in_features = pair.in_features
        self.out_features = pair.out_features
        self.register_buffer("weight", pair.weight.detach().clone(), persistent=False)


def hardened_layers(model: nn.Module) -> dict[str, SpecDefLinear]:
    """The hardened layers of a model, by module path; :class:`NotApplicable` if it has none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SpecDefLinear)}
    if not layers:
        raise NotApplicable(
            f"{type(model).__name__} has no factors that could be collapsed, frozen or expanded",
            "Give a directory hardened with `--method factors`; a fold has none: rebalancing undoes it.",
        )
    return layers


def original_name(parameter: str, layers: Iterable[str]) -> str:
    """The name that a parameter had before hardening and a variant: ``x.inflated.weight`` and
    ``x.pair.compensation.weight`` are ``x.weight``.
    """
    for layer in layers:
        if parameter.startswith(f"{layer}."):
            return f"{layer}.{'bias' if parameter.endswith('.bias') else 'weight'}"
    return parameter


def hardened_paths(model: nn.Module) -> tuple[str, ...]:
    """Module paths of hardened layers, untouched or replaced by a variant. Empty for an ordinary model and after
    :func:`specdef_cli.attack.variants.factored.collapse` and :func:`specdef_cli.attack.variants.scales.unscale`.
    """
    kinds = SpecDefLinear | SpecDefScaled | GrownLayer
    paths = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return tuple(path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths))


def replace_layers(model: nn.Module, build: Callable[[SpecDefLinear], nn.Module]) -> None:
    """Put what ``build`` makes of every hardened layer in its place."""
    for name, pair in hardened_layers(model).items():
        model.set_submodule(name, build(pair))


def linear_like(weight: Tensor, like: Tensor) -> nn.Linear:
    """A linear layer without bias that holds ``weight`` in the dtype and on the device of ``like``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(like.device, like.dtype))
    return linear


def _frozen(pair: SpecDefLinear) -> SpecDefLinear:
    for factor in (pair.inflated, pair.compensation):
        factor.weight.requires_grad_(False)
    return pair


def collapse(model: nn.Module) -> None:
    """Multiply every pair, C·W~ = W, and put a plain linear layer in its place.

    The product is formed in float64 where the device has it, so that what is lost is only what storing the factors
    had lost.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        like = pair.inflated.weight
        exact = torch.float64 if like.device.type in ("cpu", "cuda") else torch.float32
        product = pair.compensation.weight.detach().to(exact) @ like.detach().to(exact)  # [m, m] [m, n] → [m, n]
        linear = linear_like(product, like)
        linear.bias = pair.compensation.bias
        return linear

    replace_layers(model, build)


def freeze_compensation(model: nn.Module) -> None:
    """Freeze every compensation weight. Its bias is the original layer's and goes on training."""
    for pair in hardened_layers(model).values():
        pair.compensation.weight.requires_grad_(False)


class InjectedLayer(GrownLayer):
    """y = I·pair(x): a trainable identity after a frozen pair."""

    def __init__(self, pair: SpecDefLinear) -> None:
        super().__init__(pair)
        self.pair = _frozen(pair)
        self.injected = linear_like(torch.eye(pair.out_features), pair.inflated.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.injected(self.pair(input))  # [..., n] → [..., m] → [..., m]


def inject(model: nn.Module) -> None:
    """Freeze every pair and put a trainable identity layer after it."""
    replace_layers(model, InjectedLayer)


class WidenedLayer(GrownLayer):
    """y = pair(x) + up(down(x)), ``up`` zero at first, the pair frozen.

    Args:
        generator: Draws ``down`` on the CPU, so that the path is the same on every device.
    """

    def __init__(self, pair: SpecDefLinear, width: int, generator: torch.Generator) -> None:
        super().__init__(pair)
        self.pair = _frozen(pair)
        # Rows of norm about 1: ‖down(x)‖ ≈ ‖x‖·√(w/n), so the path trains at the original's scale, not at α's.
        down = torch.randn(width, pair.in_features, generator=generator) / math.sqrt(pair.in_features)
        self.down = linear_like(down, pair.inflated.weight)
        self.up = linear_like(torch.zeros(pair.out_features, width), pair.inflated.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.pair(input) + self.up(self.down(input))  # [..., n] → [..., w] → [..., m]


def widen(model: nn.Module, factor: float = 2.0, *, seed: int = 0) -> None:
    """Freeze every pair and set a fresh trainable path beside it; beside every block where nothing was inserted.

    The path's width is the smallest that makes the hardened layers at least ``factor`` times as large: w(n+m) ≥
    (factor−1)(mn + m² + bias). For ``factor`` = 2 that is w = m (one more with a bias), so the path can express any
    change of W.
    """
    if not any(isinstance(module, SpecDefLinear) for module in model.modules()):
        grow_beside(model, factor, seed)
        return
    generator = torch.Generator().manual_seed(seed)

    def build(pair: SpecDefLinear) -> nn.Module:
        size = sum(parameter.numel() for parameter in pair.parameters())
        width = math.ceil((factor - 1) * size / (pair.in_features + pair.out_features))
        return WidenedLayer(pair, width, generator)

    replace_layers(model, build)


class DeepenedLayer(GrownLayer):
    """y = C F_N ⋯ F_1 x + b with F_N ⋯ F_1 = W~ and σ₁(F_i) = σ₁(W~)^{1/N}.

    Args:
        pair: n → m; its compensation is kept, its inflated factor W~ = U S Vᵀ is split.
        factors: N ≥ 2. F_1 = S^{1/N} Vᵀ is r×n, F_N = U S^{1/N} is m×r, those between are S^{1/N}, r×r; r = min(m, n).
    """

    def __init__(self, pair: SpecDefLinear, factors: int) -> None:
        super().__init__(pair)
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


def deepen(model: nn.Module, factor: int = 2, *, seed: int = 0) -> None:
    """Replace every inflated factor by ``factor`` trainable ones with the same product (Theorem 8); freeze the
    compensations. Where nothing was inserted: fresh blocks after every frozen one, ``factor`` times as many.
    """
    if not any(isinstance(module, SpecDefLinear) for module in model.modules()):
        grow_between(model, factor, seed)
        return
    freeze_compensation(model)
    replace_layers(model, lambda pair: DeepenedLayer(pair, factor))
