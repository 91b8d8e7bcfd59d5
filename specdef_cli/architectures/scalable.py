"""The modules of a model whose weight can be scaled by channel, the scale being undone where the module runs.

Unlike a symmetric pair, this takes nothing of the architecture but that a module multiplies its weight with something:
a linear layer, the embedding that tokens are looked up in, the head, the gain of a norm. So it works in any
architecture, also where a norm stands between two weights, where a gain is stored as w and applied as 1 + w, and where
the head is the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.architectures.body import output_norms
from specdef_cli.architectures.head import output_embeddings
from specdef_cli.architectures.linears import is_classifier
from specdef_cli.architectures.names import match_names
from specdef_cli.architectures.skeleton import Skeleton
from specdef_cli.checkpoint.manifest import ScaledKind
from specdef_cli.errors import SpecDefError

_AXES: Mapping[ScaledKind, tuple[int, int | None]] = {
    "linear": (0, 1),
    "head": (0, 1),
    "embedding": (1, 0),
    "norm": (0, None),
}
"""Of a weight, the axis of what the module puts out and of what it takes in."""


@dataclass(frozen=True)
class ScalableSite:
    """A module with a weight of its own on disk, or the head that shares the embedding's.

    Attributes:
        module: Path in the transformers model.
        kind: What it does with its weight.
        tensor: Name of the weight on disk.
        stem: What the names of the module's new tensors on disk begin with.
        shape: Of the weight, as stored.
        bias: Name of the bias on disk, or ``None``.
        output_axis: The weight's axis that counts what the module puts out.
        input_axis: The axis that counts what it takes in (tokens, of an embedding); ``None`` for a norm.
        tied_to: Path of the embedding whose weight a head shares, or ``None``.
        writes: Whether it is a norm that is known to write to the residual stream.
    """

    module: str
    kind: ScaledKind
    tensor: str
    stem: str
    shape: tuple[int, ...]
    bias: str | None
    output_axis: int
    input_axis: int | None
    tied_to: str | None = None
    writes: bool = False


def scalable_sites(skeleton: Skeleton) -> tuple[ScalableSite, ...]:
    """All modules that can be scaled, in the model's order.

    Left out: the heads of classifiers, which an attacker replaces anyway; position embeddings; embeddings of models
    that have no one kind of input (CLIP); weights that the model's code reads itself (WavLM's attention); weights that
    transformers merges from or splits into several tensors (Mixtral's experts).
    """
    model, names, tied = skeleton.model, skeleton.names, skeleton.tied
    embedding = _input_embeddings(model)
    head = output_embeddings(model)
    looked_up = next((path for path, module in skeleton.modules.items() if module is embedding), "")
    writing = output_norms(model)
    sites = []
    for path, module in skeleton.modules.items():
        kind = _kind(model, path, module, embedding, head)
        if kind is None or path in skeleton.trial.read_past:
            continue
        parameter = f"{path}.weight"
        shares = kind == "head" and parameter in tied
        tensor = names.tensor(f"{looked_up}.weight" if shares else parameter)
        if (
            tensor is None
            or not tensor.endswith(".weight")
            or (parameter in tied and kind not in ("head", "embedding"))
        ):
            continue
        shape = skeleton.shapes[tensor]
        output, inputs = _AXES[kind]
        if isinstance(module, Conv1D):
            output, inputs = 1, 0
        bias = names.tensor(f"{path}.bias") if getattr(module, "bias", None) is not None else None
        if getattr(module, "bias", None) is not None and bias is None:
            continue
        stem = path if shares else tensor.removesuffix(".weight")
        tied_to = looked_up if shares else None
        sites.append(ScalableSite(path, kind, tensor, stem, shape, bias, output, inputs, tied_to, path in writing))
    if f"{looked_up}.weight" in tied:
        # Scaled together with its head or not at all: some models share the weight with more, or add a bias, and some
        # checkpoints hold the head once more, in whose place the scales would stand.
        heads = [site for site in sites if site.tied_to is not None]
        alone = len(tied) == 2 and len(heads) == 1 and heads[0].bias is None
        if not alone or f"{heads[0].stem}.weight" in names.parameters:
            sites = [site for site in sites if site.kind != "embedding" and site.tied_to is None]
    return tuple(sites)


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # raised for models of several inputs: none of them is the input
        return None


def _kind(
    model: nn.Module, path: str, module: nn.Module, embedding: nn.Module | None, head: nn.Module | None
) -> ScaledKind | None:
    weight = getattr(module, "weight", None)
    if module is embedding:
        return "embedding" if isinstance(module, nn.Embedding) else None
    if module is head:
        return "head" if type(module) is nn.Linear else None
    if type(module) in (nn.Linear, Conv1D):
        return None if is_classifier(model, path) else "linear"
    if isinstance(weight, nn.Parameter) and weight.dim() == 1 and "norm" in type(module).__name__.lower():
        # Statistics beside the gain (BatchNorm's) would have to move on disk, and no gain undoes them.
        plain = module.state_dict().keys() <= {"weight", "bias"} and not isinstance(module, nn.GroupNorm)
        return "norm" if plain else None
    return None


def require_findable(skeleton: Skeleton, sites: Sequence[ScalableSite], wanted: Mapping[str, str]) -> None:
    """Check that transformers will find the new tensors under the names that are written.

    Args:
        wanted: Tensor name on disk → the parameter that it must become.
    """
    found = match_names(skeleton.model, wanted, added=wanted.values())
    for tensor, parameter in wanted.items():
        if found.parameters.get(tensor) != parameter:
            module = next((site.module for site in sites if tensor.startswith(f"{site.stem}.")), tensor)
            raise SpecDefError(
                f"transformers would load {tensor} as {found.parameters.get(tensor, 'nothing')}, not as {parameter}",
                f"--exclude '{module}', or fold instead (--method fold).",
            )
