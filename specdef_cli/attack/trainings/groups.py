"""Train each kind of parameter alone.

What no inflated layer touches trains as if nothing had happened, and this is how to find it.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from torch import nn

from specdef_cli.attack.target import Target
from specdef_cli.attack.trainings.table import Training
from specdef_cli.errors import SpecDefError


def parameter_groups(training: Training, target: Target) -> tuple[Training, ...]:
    """One training for each of: embeddings, norms, the head, and each linear of a block over all blocks.

    Raises:
        SpecDefError: The training names a kind that the model has not.
    """
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
