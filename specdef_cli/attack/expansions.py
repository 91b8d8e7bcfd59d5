"""What an attacker who knows the construction does to a loaded model before training it.

Module surgery and nothing else: no data, no training, no files. Each function changes the hardened layers
(:class:`SpecDefLinear`) of a model in place, leaves the model's function as it was, and says what that cost. They are
the limits of the method, so every report carries some of them:

- :func:`collapse` multiplies the pair and is back at the original weight (arXiv 2602.18868, Section 4).
- :func:`freeze_compensation`, :func:`freeze_pair` leave the factors that carry α out of the training.
- :func:`widen`, :func:`inject` give the optimizer fresh parameters next to or after a frozen pair.
- :func:`deepen` is the paper's Theorem 8: N trainable factors of σ₁ = (ασ)^{1/N} each, so that the bound falls from
  α to about α^{1/N}. The Hessian itself then has σ₁ ∝ α^{2(N−1)/N} (measured: ``examples/reproduce/injection.py``):
  more factors are worse for the attacker than freezing the compensation, which leaves no α in it at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from specdef_cli.attack.results import Growth
from specdef_cli.errors import SpecDefError
from specdef_cli.runtime import SpecDefLinear


class GrownLayer(nn.Module):
    """A hardened layer after surgery. Whatever lies beneath it stands for one linear layer of the original model.

    ``weight`` is the tombstone's successor: model code reads a dtype off it (T5 does), never values.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, weight: Tensor) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", weight.detach().clone(), persistent=False)


class WidenedLayer(GrownLayer):
    """y = pair(x) + up(down(x)), ``up`` zero at first.

    Args:
        pair: n → m; frozen by the caller.
        width: w, the path's inner dimension.
        generator: Draws ``down`` on the CPU, so that the path is the same on every device.
    """

    def __init__(self, pair: SpecDefLinear, width: int, generator: torch.Generator) -> None:
        super().__init__(pair.in_features, pair.out_features, pair.weight)
        like = pair.inflated.weight
        self.pair = pair
        self.down = nn.Linear(pair.in_features, width, bias=False, device="meta")
        self.up = nn.Linear(width, pair.out_features, bias=False, device="meta")
        # Rows of norm about 1: ‖down(x)‖ ≈ ‖x‖·√(w/n), so the path trains at the original's scale, not at α's.
        down = torch.randn(width, pair.in_features, generator=generator) / math.sqrt(pair.in_features)
        self.down.weight = nn.Parameter(down.to(like.device, like.dtype))
        self.up.weight = nn.Parameter(torch.zeros(pair.out_features, width, device=like.device, dtype=like.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return self.pair(input) + self.up(self.down(input))  # [..., n] → [..., w] → [..., m]


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
        self.factors = nn.Sequential(*(_linear(weight, like) for weight in weights))
        self.compensation = pair.compensation

    def forward(self, input: Tensor) -> Tensor:
        return self.compensation(self.factors(input))  # [..., n] → [..., r] → [..., m] → [..., m]


class InjectedLayer(GrownLayer):
    """y = I·pair(x): a trainable identity after a pair that the caller freezes."""

    def __init__(self, pair: SpecDefLinear) -> None:
        super().__init__(pair.in_features, pair.out_features, pair.weight)
        like = pair.inflated.weight
        self.pair = pair
        self.injected = _linear(torch.eye(pair.out_features), like)

    def forward(self, input: Tensor) -> Tensor:
        return self.injected(self.pair(input))  # [..., n] → [..., m] → [..., m]


def hardened_layers(model: nn.Module) -> dict[str, SpecDefLinear]:
    """The hardened layers of a model, by module path.

    Raises:
        SpecDefError: It has none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SpecDefLinear)}
    if not layers:
        raise SpecDefError(
            f"{type(model).__name__} has no inserted layer that could be collapsed, frozen or expanded",
            "Give a directory hardened with `--method insert`; a fold has no inserted layers: rebalancing undoes it.",
        )
    return layers


def widen(model: nn.Module, factor: float = 2.0, *, seed: int = 0) -> Growth:
    """Freeze every pair and set a fresh trainable path beside it.

    The path's width is the smallest that makes the hardened layers at least ``factor`` times as large: w(n+m) ≥
    (factor−1)(mn + m² + bias). For ``factor`` = 2 that is w = m (one more with a bias), so the path can express any
    change of W.

    Args:
        model: Changed in place.
        factor: > 1.
        seed: Of the path's first factor; the second is zero.

    Raises:
        SpecDefError: The model has no hardened layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def build(pair: SpecDefLinear) -> nn.Module:
        _freeze(pair)
        width = math.ceil((factor - 1) * _count(pair) / (pair.in_features + pair.out_features))
        return WidenedLayer(pair, width, generator)

    return _replace(model, build)


def deepen(model: nn.Module, factors: int = 2) -> Growth:
    """Replace every inflated factor by ``factors`` trainable ones with the same product (Theorem 8); freeze the
    compensations.

    Raises:
        SpecDefError: The model has no hardened layer.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        pair.compensation.weight.requires_grad_(False)
        return DeepenedLayer(pair, factors)

    return _replace(model, build)


def inject(model: nn.Module) -> Growth:
    """Freeze every pair and put a trainable identity layer after it.

    Raises:
        SpecDefError: The model has no hardened layer.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        _freeze(pair)
        return InjectedLayer(pair)

    return _replace(model, build)


def freeze_compensation(model: nn.Module) -> Growth:
    """Freeze every compensation weight. Its bias is the original layer's and goes on training.

    Raises:
        SpecDefError: The model has no hardened layer.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        pair.compensation.weight.requires_grad_(False)
        return pair

    return _replace(model, build)


def freeze_pair(model: nn.Module) -> Growth:
    """Freeze both weights of every pair, so that everything else trains. The bias goes on training.

    Raises:
        SpecDefError: The model has no hardened layer.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        _freeze(pair)
        return pair

    return _replace(model, build)


def collapse(model: nn.Module) -> Growth:
    """Multiply every pair, C·W~ = W, and put a plain linear layer in its place.

    The product is formed in float64 where the device has it, so that what is lost is only what storing the factors
    had lost.

    Raises:
        SpecDefError: The model has no hardened layer.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        like = pair.inflated.weight
        exact = torch.float64 if like.device.type in ("cpu", "cuda") else torch.float32
        product = pair.compensation.weight.detach().to(exact) @ like.detach().to(exact)  # [m, m] [m, n] → [m, n]
        linear = _linear(product, like)
        linear.bias = pair.compensation.bias
        return linear

    return _replace(model, build)


def original_name(parameter: str, layers: Iterable[str]) -> str:
    """The name that a parameter had before hardening and surgery: ``x.inflated.weight`` and
    ``x.pair.compensation.weight`` are ``x.weight``.

    Args:
        parameter: As ``named_parameters`` gives it.
        layers: Module paths of the hardened layers, whatever stands there now.
    """
    for layer in layers:
        if parameter.startswith(f"{layer}."):
            return f"{layer}.{'bias' if parameter.endswith('.bias') else 'weight'}"
    return parameter


def hardened_paths(model: nn.Module) -> tuple[str, ...]:
    """Module paths of hardened layers, untouched or after surgery. Empty for an ordinary model and after
    :func:`collapse`.
    """
    paths = [name for name, module in model.named_modules() if isinstance(module, SpecDefLinear | GrownLayer)]
    return tuple(path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths))


def _replace(model: nn.Module, build: Callable[[SpecDefLinear], nn.Module]) -> Growth:
    before = after = bytes_added = 0
    layers = hardened_layers(model)
    for name, pair in layers.items():
        before += _count(pair)
        bytes_added -= _bytes(pair)
        replacement = build(pair)
        model.set_submodule(name, replacement)
        after += _count(replacement)
        bytes_added += _bytes(replacement)
    return Growth(len(layers), before, after, bytes_added)


def _freeze(pair: SpecDefLinear) -> None:
    pair.inflated.weight.requires_grad_(False)
    pair.compensation.weight.requires_grad_(False)


def _linear(weight: Tensor, like: Tensor) -> nn.Linear:
    """A linear layer without bias that holds ``weight`` in the dtype and on the device of ``like``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(like.device, like.dtype))
    return linear


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
