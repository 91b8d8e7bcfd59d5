"""Trainings without PEFT: the model's own parameters, and bottleneck adapters.

What a bottleneck adapter (Houlsby et al. 2019, arXiv 1902.00751; parallel: He et al. 2021, arXiv 2110.04366) reads and
adds to is the residual stream or a sublayer's output, which no rescaling of weights changes: it sees an undefended
model. PEFT has none that go on every model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.target import Target, Task
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.variants.factored import hardened_paths, original_name
from specdef_cli.attack.variants.grown import first_tensor, outermost_block_paths, stream_writers, with_first_tensor
from specdef_cli.attack.variants.scales import parameter_name
from specdef_cli.errors import SpecDefError


def train_parameters(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """Freeze every parameter that the training does not name."""
    if training.where:
        train_only(model, training.where)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NotApplicable(
            f"nothing is left to train by --training {training} on this variant",
            "Choose other parameters, or another variant.",
        )
    return model


def train_only(model: nn.Module, globs: Iterable[str]) -> None:
    """Freeze every parameter that no glob names, and every one that a glob with ``!`` in front names.

    Factors answer to the original layer's name too, so that one glob means the same on the control and on the
    hardened model.
    """
    layers = hardened_paths(model)
    patterns = tuple(globs)
    wanted = tuple(pattern for pattern in patterns if not pattern.startswith("!")) or ("*",)
    frozen = tuple(pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!"))
    unused = {pattern.removeprefix("!") for pattern in patterns}
    for full_name, parameter in model.named_parameters():
        name = parameter_name(full_name)
        names = {name, original_name(name, layers)}
        hits, misses = (
            {pattern for pattern in some if any(fnmatchcase(candidate, pattern) for candidate in names)}
            for some in (wanted, frozen)
        )
        unused -= hits | misses
        parameter.requires_grad_(parameter.requires_grad and bool(hits) and not misses)
    if unused:
        examples = [name for name, _ in model.named_parameters()]
        raise NotApplicable(
            f"{min(unused)} names no parameter of {type(model).__name__}",
            f"Write it like {examples[len(examples) // 2]}, with * for any part.",
        )


def parameter_groups(training: Training, target: Target) -> tuple[Training, ...]:
    """One training for each of: embeddings, norms, the head, and each linear of a block over all blocks."""
    model = target.control_model()
    groups: dict[str, list[str]] = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if module is head:
                kind = "head"
            elif isinstance(module, nn.Embedding):
                kind = "embeddings"
            elif "norm" in type(module).__name__.lower():
                kind = "norms"
            else:
                # An expert's stacked tensors are parameters of one module; a linear's weight goes by its module.
                parts = [part for part in f"{path}.{name}".split(".") if part not in ("weight", "bias", "")]
                kind = parts[-1]
            glob = re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{path}.{name}".lstrip("."))
            groups.setdefault(kind, []).append(glob)
    known = {name for name, _ in model.named_parameters()}  # a tied parameter goes by its first name alone
    trainings = []
    for unknown in training.where:
        if unknown not in groups:
            raise SpecDefError(
                f"{type(model).__name__} has no kind of parameter named {unknown!r}", f"Choose of: {', '.join(groups)}."
            )
    for kind in training.where or tuple(groups):
        globs = groups[kind]
        named = tuple(dict.fromkeys(glob for glob in globs if any(fnmatchcase(name, glob) for name in known)))
        if named:
            trainings.append(Training("full", where=named, name=f"{kind} alone"))
    return tuple(trainings)


def all_but_the_first(training: Training, target: Target) -> tuple[Training, ...]:
    """Everything but the embeddings and the first block of each stack."""
    return _later_blocks(training, target, lambda count: 1)


def last_half(training: Training, target: Target) -> tuple[Training, ...]:
    """Everything but the embeddings and the first half of each stack."""
    return _later_blocks(training, target, lambda count: count // 2)


def _later_blocks(training: Training, target: Target, left_out: Callable[[int], int]) -> tuple[Training, ...]:
    model = target.control_model()
    stacks: dict[str, list[str]] = {}
    for path in outermost_block_paths(model):
        stacks.setdefault(path.rpartition(".")[0], []).append(path)
    frozen = [f"!{path}.*" for blocks in stacks.values() for path in blocks[: left_out(len(blocks))]]
    if not frozen:
        return ()
    embeddings = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return (Training("full", where=(*frozen, *(f"!{path}.*" for path in embeddings)), name=training.label),)


class Bottleneck(nn.Module):
    """x → up(gelu(down(x))), zero at first."""

    def __init__(self, width: int, size: int, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(size, width, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(nn.functional.gelu(self.down(hidden)))  # [..., d] → [..., size] → [..., d]


def train_serial(model: PreTrainedModel, training: Training, task: Task) -> nn.Module:
    """An adapter on the output of every attention and every MLP, before it is added to the residual stream."""
    experts = [module for module in model.modules() if isinstance(getattr(module, "down_proj", None), nn.Parameter)]
    return _put(model, training, [*map(model.get_submodule, stream_writers(model)), *experts], _after)


def train_parallel(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """An adapter beside every block: it reads the residual stream before the block, and adds to it after."""
    return _put(model, training, list(map(model.get_submodule, outermost_block_paths(model))), _beside)


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
