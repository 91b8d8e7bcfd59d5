"""Leave the first blocks alone: an attacker who does so meets only what was done to the others."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from specdef_cli.attack.target import Target
from specdef_cli.attack.trainings.table import Training
from specdef_cli.attack.variants.beside import outermost_block_paths


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
