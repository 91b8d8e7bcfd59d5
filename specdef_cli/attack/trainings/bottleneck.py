"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751; parallel: He et al. 2021, arXiv 2110.04366).

What an adapter reads and what it adds to is the residual stream or a sublayer's output, which no rescaling of weights
changes: it sees an undefended model. PEFT has no bottleneck adapters that go on every model, hence these few lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.table import Training
from specdef_cli.attack.variants.grown import first_tensor, outermost_blocks, with_first_tensor
from specdef_cli.model import SpecDefLinear


class Bottleneck(nn.Module):
    """x → up(gelu(down(x))), zero at first.

    Args:
        like: Gives dtype and device.
    """

    def __init__(self, width: int, size: int, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(size, width, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(nn.functional.gelu(self.down(hidden)))  # [..., d] → [..., size] → [..., d]


def train_serial(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """An adapter on the output of every attention and every MLP, before it is added to the residual stream.

    Raises:
        NotApplicable: The model has no blocks, or none with a sublayer as wide as the residual stream.
    """
    width = _width(model)
    places = [layer for block in outermost_blocks(model) for layer in _sublayers(block) if _writes(layer, width)]
    return _put(model, training, places, _after)


def train_parallel(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """An adapter beside every block: it reads the residual stream before the block, and adds to it after.

    Raises:
        NotApplicable: The model has no blocks.
    """
    return _put(model, training, list(outermost_blocks(model)), _beside)


def _put(model: nn.Module, training: Training, places: list[nn.Module], hook: Any) -> nn.Module:
    if not places:
        raise NotApplicable(
            f"{training.label} needs blocks with sublayers, and {type(model).__name__} has none",
            "Choose another --training.",
        )
    model.requires_grad_(False)
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    for place in places:
        place.add_module("bottleneck", Bottleneck(_width(model), int(training.size or 0), like))
        place.register_forward_hook(hook, with_kwargs=True)
    return model


def _after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = first_tensor(output)
    return with_first_tensor(output, hidden + module.bottleneck(hidden))


def _beside(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    entering = args[0] if args else kwargs["hidden_states"]
    return with_first_tensor(output, first_tensor(output) + module.bottleneck(entering))


def _width(model: nn.Module) -> int:
    return int(model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]


def _sublayers(block: nn.Module) -> Iterator[nn.Module]:
    """A block's children; where it has a list of them (T5), what they wrap with a norm and an addition."""
    for child in block.children():
        if isinstance(child, nn.ModuleList):
            for part in child:
                yield from part.children()
        else:
            yield child


def _writes(module: nn.Module, width: int) -> bool:
    """Whether a block's child is a sublayer with an output as wide as the stream; experts are stacked, not linears."""
    if not any(parameter.ndim > 1 for parameter in module.parameters()):
        return False
    widths = [
        layer.nf if isinstance(layer, Conv1D) else layer.out_features
        for layer in module.modules()
        if isinstance(layer, nn.Linear | Conv1D | SpecDefLinear)
    ]
    return not widths or width in widths
