"""The hardened layers of a model, and how a variant puts something else in their place.

Modules are replaced and nothing else is done: no data, no training, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.runtime import SpecDefLinear, SpecDefScaled


class GrownLayer(nn.Module):
    """What a variant puts in the place of a hardened layer: as a whole, one linear layer of the original model.

    ``weight`` is the tombstone's successor: model code reads a dtype off it (T5 does), never values.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, weight: Tensor) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", weight.detach().clone(), persistent=False)


def hardened_layers(model: nn.Module) -> dict[str, SpecDefLinear]:
    """The hardened layers of a model, by module path.

    Raises:
        NotApplicable: It has none.
    """
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

    Args:
        parameter: As ``named_parameters`` gives it.
        layers: Module paths of the hardened layers, whatever stands there now.
    """
    for layer in layers:
        if parameter.startswith(f"{layer}."):
            return f"{layer}.{'bias' if parameter.endswith('.bias') else 'weight'}"
    return parameter


def hardened_paths(model: nn.Module) -> tuple[str, ...]:
    """Module paths of hardened layers, untouched or replaced by a variant. Empty for an ordinary model and after
    :func:`specdef_cli.attack.variants.collapse.collapse` and :func:`specdef_cli.attack.variants.unscale.unscale`.
    """
    kinds = SpecDefLinear | SpecDefScaled | GrownLayer
    paths = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return tuple(path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths))


def replace_layers(model: nn.Module, build: Callable[[SpecDefLinear], nn.Module]) -> Growth:
    """Put what ``build`` makes of every hardened layer in its place.

    Raises:
        NotApplicable: The model has no hardened layer.
    """
    before = after = bytes_added = 0
    layers = hardened_layers(model)
    for name, pair in layers.items():
        before += count_parameters(pair)
        bytes_added -= _bytes(pair)
        replacement = build(pair)
        model.set_submodule(name, replacement)
        after += count_parameters(replacement)
        bytes_added += _bytes(replacement)
    return Growth(len(layers), before, after, bytes_added)


def freeze(pair: SpecDefLinear) -> None:
    """Freeze both weights of a pair."""
    pair.inflated.weight.requires_grad_(False)
    pair.compensation.weight.requires_grad_(False)


def linear_like(weight: Tensor, like: Tensor) -> nn.Linear:
    """A linear layer without bias that holds ``weight`` in the dtype and on the device of ``like``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(like.device, like.dtype))
    return linear


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
