"""The modules that can be replaced by factors or scaled: linears, norms, embeddings and heads, by tensors on disk.

Only a weight's name, shape and place matter, so any architecture works. A family's description says which linears write
to the residual stream; without one, the last linear of a block's submodule does if it is as wide as the hidden state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.checkpoint.changes import LinearLayer, Replaced, ScaledKind
from specdef_cli.errors import SpecDefError
from specdef_cli.model.body import blocks, described_bodies, join, output_norms
from specdef_cli.model.families import DENOISER_WRITERS, Experts, Family, Role
from specdef_cli.model.skeleton import Skeleton, match_names, output_embeddings, repeated_blocks


@dataclass(frozen=True)
class LinearSite(LinearLayer):
    """A linear layer of a model, and what it does there.

    Attributes:
        role: ``attention_output`` and ``mlp_down`` are the last linears of a block's attention and MLP, which write to
            the residual stream; the paper hardens those.
    """

    role: Role


_HEAD_NAMES = re.compile(r"(^|\.)(lm_head|classifier|score|qa_outputs|cls|classification_head|embed_out)(\.|$)")


def linear_sites(skeleton: Skeleton) -> tuple[LinearSite, ...]:
    """The linear layers among :func:`scalable_sites`."""
    roles = _roles(skeleton.model)
    sites = []
    for site in scalable_sites(skeleton):
        if site.kind == "linear" and site.input_axis is not None:
            m, n, transposed = site.shape[site.output_axis], site.shape[site.input_axis], site.output_axis == 1
            role = roles.get(site.module, "other")
            sites.append(LinearSite(site.module, site.tensor, m, n, site.bias, transposed, role))
    return tuple(sites)


def writers(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the linears that write to the residual stream: the last of each attention and each MLP."""
    return tuple(_roles(model))


def is_classifier(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path`` lies outside of the base model, as the head of a classifier does."""
    if not isinstance(model, PreTrainedModel):
        return False
    if _HEAD_NAMES.search(path):
        return True
    prefix = model.base_model_prefix
    has_base = bool(prefix) and model.base_model is not model
    return has_base and not path.startswith(f"{prefix}.")


def _roles(model: nn.Module) -> dict[str, Role]:
    if not isinstance(model, PreTrainedModel):
        ends = DENOISER_WRITERS.get(type(model).__name__, {})
        paths = [path for path, _ in model.named_modules()]
        return {path: role for path in paths for end, role in ends.items() if path.endswith(f".{end}")}
    described = {
        path: role for body, family in described_bodies(model) for path, role in _described_roles(model, body, family)
    }
    roles: dict[str, Role] = {}
    for linears in _groups(model):
        if any(path in described for path in linears):
            roles |= {path: described[path] for path in linears if described.get(path, "other") != "other"}
            continue
        writer = _last_writer(model, linears)
        if writer is not None:
            attention = re.search(r"att|mixer", writer, re.IGNORECASE)
            roles[writer] = "attention_output" if attention else "mlp_down"
    return roles


def _described_roles(model: nn.Module, body: str, family: Family) -> Iterator[tuple[str, Role]]:
    """The paths of the linears that a family's description names, and their roles."""
    for stack in family.stacks:
        for block in blocks(model, body, stack):
            for layer in stack.sublayers:
                if not isinstance(layer, Experts):
                    yield join(block, layer.path, layer.writer), layer.role
                    yield from ((join(block, layer.path, reader), "other") for reader in layer.readers)


def _groups(model: nn.Module) -> Iterable[list[str]]:
    """Linears of each direct submodule of each block, in order; those directly in a block count as one submodule."""
    blocks = sorted(repeated_blocks(model), key=len, reverse=True)
    groups: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        # The innermost block: T5 has a list of sublayers in every element of its list of blocks.
        block = next((block for block in blocks if path.startswith(f"{block}.")), None)
        if block is not None:
            inside = path[len(block) + 1 :].split(".")
            groups.setdefault(block if len(inside) == 1 else f"{block}.{inside[0]}", []).append(path)
    return groups.values()


def _last_writer(model: PreTrainedModel, linears: list[str]) -> str | None:
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    for path in reversed(linears):
        module = model.get_submodule(path)
        if (module.nf if isinstance(module, Conv1D) else module.out_features) == hidden:
            return path
    return None


_AXES: Mapping[ScaledKind, tuple[int, int | None]] = {
    "linear": (0, 1),
    "head": (0, 1),
    "embedding": (1, 0),
    "norm": (0, None),
}
"""The axes of a weight that count the module's outputs and its inputs."""


@dataclass(frozen=True)
class ScalableSite:
    """A module with a weight of its own on disk, or the head that shares the embedding's.

    Attributes:
        bias: Name of the bias on disk, or ``None``.
        input_axis: The axis that counts what it takes in (tokens, of an embedding); ``None`` for a norm.
        tied_to: Path of the embedding whose weight a head shares, or ``None``.
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
    """All modules with a weight of their own on disk that can be replaced or scaled, in the model's order.

    Left out: the heads of classifiers, which an attacker replaces anyway; position embeddings; embeddings of models
    that have no one kind of input (CLIP); subclasses of ``nn.Linear``; weights that the model's code reads itself
    (WavLM's attention); weights that transformers merges from or splits into several tensors (Mixtral's experts).
    """
    model, names, tied = skeleton.model, skeleton.names, skeleton.tied
    try:
        embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:  # raised for models of several inputs: none of them is the input
        embedding = None
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
        biased = getattr(module, "bias", None) is not None
        bias = names.tensor(f"{path}.bias") if biased else None
        if tensor is None or not tensor.endswith(".weight") or (biased and bias is None):
            continue
        if parameter in tied and kind not in ("head", "embedding"):
            continue
        shape = tuple(skeleton.parameters[parameter].shape)
        skeleton.require_shape(tensor, shape, f"the layer {path}")
        output, inputs = (1, 0) if isinstance(module, Conv1D) else _AXES[kind]
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


def _kind(
    model: nn.Module, path: str, module: nn.Module, embedding: nn.Module | None, head: nn.Module | None
) -> ScaledKind | None:
    weight = getattr(module, "weight", None)
    if module is embedding and isinstance(module, nn.Embedding):
        return "embedding"
    if module is head:
        return "head" if type(module) is nn.Linear else None
    # Exactly these: of a subclass (nn.MultiheadAttention's out_proj) the model reads the weight, past its forward.
    if type(module) in (nn.Linear, Conv1D):
        return None if is_classifier(model, path) else "linear"
    if isinstance(weight, nn.Parameter) and weight.dim() == 1 and "norm" in type(module).__name__.lower():
        # Statistics beside the gain (BatchNorm's) would have to move on disk, and no gain undoes them.
        plain = module.state_dict().keys() <= {"weight", "bias"} and not isinstance(module, nn.GroupNorm)
        return "norm" if plain else None
    return None


def require_findable(skeleton: Skeleton, replaced: Sequence[Replaced]) -> None:
    """Check that transformers will find the tensors of replaced modules under the names that they have on disk.

    They stand there as ``X.inflated.weight`` … where the base has ``X.weight``, and must reach
    ``<module>.inflated.weight`` … through transformers' renamings, which are regular expressions written for other
    names.
    """
    wanted = {
        tensor: (f"{layer.module}{tensor.removeprefix(layer.stem)}", layer.module)
        for layer in replaced
        for tensor in layer.stored
    }
    found = match_names(skeleton.model, wanted, added=[parameter for parameter, _ in wanted.values()]).parameters
    for tensor, (parameter, module) in wanted.items():
        if found.get(tensor) != parameter:
            raise SpecDefError(
                f"transformers would load {tensor} as {found.get(tensor, 'nothing')}, not as {parameter}",
                f"--exclude '{module}', or fold instead (--method fold).",
            )
