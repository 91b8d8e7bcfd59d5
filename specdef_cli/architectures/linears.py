"""The linear layers of a model that can be replaced by an inflated layer and its compensation.

Only the weight's name, shape and place matter here, so any architecture works: the modules are read from the model on
the meta device. A table per family says which of them write to the residual stream; for a family that is not in the
table, a linear is taken to write there when it is the last one of a block's submodule and as wide as the hidden state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.architectures.names import match_names, meta_model, repeated_blocks, tied_parameters
from specdef_cli.errors import SpecDefError

Role = Literal["attention_output", "mlp_down", "other"]


@dataclass(frozen=True)
class LinearSite:
    """A linear layer y = Wx (+ b), W ∈ R^{m×n}, whose weight is one tensor on disk.

    Attributes:
        module: Path of the layer in the transformers model.
        tensor: Name of the weight on disk.
        out_features: m.
        in_features: n.
        bias: Name of the bias on disk, or ``None``.
        transposed: Whether the tensor on disk is Wᵀ (transformers' ``Conv1D``).
        role: ``attention_output`` and ``mlp_down`` are the last linears of a block's attention and MLP, which write to
            the residual stream; the paper hardens those.
    """

    module: str
    tensor: str
    out_features: int
    in_features: int
    bias: str | None
    transposed: bool
    role: Role


# Suffixes of module paths inside a block. The key is `config.model_type`; of a model of diffusers, its class.
_LLAMA_LIKE: dict[str, Role] = {"self_attn.o_proj": "attention_output", "mlp.down_proj": "mlp_down"}
_BERT_LIKE: dict[str, Role] = {
    "attention.output.dense": "attention_output",
    "crossattention.output.dense": "attention_output",
    "output.dense": "mlp_down",
}
_T5_LIKE: dict[str, Role] = {
    "SelfAttention.o": "attention_output",
    "EncDecAttention.o": "attention_output",
    "DenseReluDense.wo": "mlp_down",
}
_MOE_LIKE: dict[str, Role] = {**_LLAMA_LIKE, "shared_expert.down_proj": "mlp_down"}
_ROLES: dict[str, dict[str, Role]] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3"),
        _LLAMA_LIKE,
    ),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "smollm3", "granite", "cohere", "cohere2", "glm4"), _LLAMA_LIKE),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe"), _MOE_LIKE),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT_LIKE),
    "gpt2": {"attn.c_proj": "attention_output", "crossattention.c_proj": "attention_output", "mlp.c_proj": "mlp_down"},
    "gpt_neox": {"attention.dense": "attention_output", "mlp.dense_4h_to_h": "mlp_down"},
    "vit": {"attention.o_proj": "attention_output", "mlp.fc2": "mlp_down"},
    **dict.fromkeys(("t5", "mt5"), _T5_LIKE),
    "UNet2DConditionModel": {"to_out.0": "attention_output", "ff.net.2": "mlp_down"},
}

_HEAD_NAMES = re.compile(r"(^|\.)(lm_head|classifier|score|qa_outputs|cls|classification_head|embed_out)(\.|$)")


def linear_sites(
    config: PreTrainedConfig,
    tensors: Mapping[str, tuple[int, ...]],
    *,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> tuple[LinearSite, ...]:
    """All linear layers with a weight of their own on disk, in the model's order.

    Left out: embeddings, heads, subclasses of ``nn.Linear``, weights tied to another parameter, and weights that
    transformers merges from or splits into several tensors (Mixtral's experts).

    Args:
        config: The model's native config.
        tensors: Tensor name on disk → shape.
        model: ``meta_model(config)``, where the caller has it already.
        trust_remote_code: As in :func:`meta_model`.

    Raises:
        SpecDefError: The model cannot be built, or a tensor's shape contradicts it.
    """
    model = meta_model(config, trust_remote_code=trust_remote_code) if model is None else model
    names = match_names(model, tensors)
    tied = tied_parameters(model)
    roles = _roles(model)
    sites = []
    for path, module in model.named_modules():
        # Exactly these: of a subclass (nn.MultiheadAttention's out_proj) the model reads the weight, past its forward.
        if type(module) not in (nn.Linear, Conv1D) or _is_head(model, path, module):
            continue
        parameter = f"{path}.weight"
        tensor = names.tensor(parameter)
        if tensor is None or parameter in tied or not tensor.endswith(".weight"):
            continue
        shape, expected = tuple(tensors[tensor]), tuple(module.weight.shape)
        if shape != expected:
            raise SpecDefError(
                f"tensor {tensor} has shape {list(shape)}, but by config.json the layer {path} needs {list(expected)}",
                "Use the config.json that belongs to this checkpoint (of a quantized one, the unquantized checkpoint).",
            )
        transposed = isinstance(module, Conv1D)
        out_features, in_features = expected[::-1] if transposed else expected
        bias = None if module.bias is None else names.tensor(f"{path}.bias")
        sites.append(LinearSite(path, tensor, out_features, in_features, bias, transposed, roles.get(path, "other")))
    return tuple(sites)


def require_insertable(
    config: PreTrainedConfig,
    sites: tuple[LinearSite, ...],
    *,
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Check that transformers will find the factors of every site under the names that insert writes.

    The factors stand on disk as ``X.inflated.weight``, ``X.compensation.weight`` and ``X.compensation.bias`` where the
    base has ``X.weight``, and must reach ``<module>.inflated.weight`` … through transformers' renamings, which are
    regular expressions written for other names.

    Raises:
        SpecDefError: A renaming leads elsewhere.
    """
    model = meta_model(config, trust_remote_code=trust_remote_code) if model is None else model
    wanted: dict[str, str] = {}
    for site in sites:
        for part in ("inflated.weight", "compensation.weight", *(("compensation.bias",) if site.bias else ())):
            wanted[f"{site.tensor.removesuffix('.weight')}.{part}"] = f"{site.module}.{part}"
        wanted[site.tensor] = f"{site.module}.weight"
    found = match_names(model, wanted, added=wanted.values()).parameters
    for tensor, parameter in wanted.items():
        if found.get(tensor) != parameter:
            raise SpecDefError(
                f"transformers would load {tensor} as {found.get(tensor, 'nothing')}, not as {parameter}",
                "Exclude this layer (--exclude), or fold instead (--method fold).",
            )


def writers(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the linears that write to the residual stream: the last of each attention and each MLP."""
    return tuple(_roles(model))


def _is_head(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether ``module`` turns hidden states into an output, so that it is what an attacker replaces anyway."""
    if not isinstance(model, PreTrainedModel):
        return False
    return module is model.get_output_embeddings() or is_classifier(model, path)


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
    roles: dict[str, Role] = {}
    for container, linears in _groups(model).items():
        family = _ROLES.get(_family(model, container))
        for path in linears:
            if family is not None:
                suffixes = [suffix for suffix in family if path.endswith(f".{suffix}")]
                if suffixes:
                    roles[path] = family[max(suffixes, key=len)]
        if family is None:
            writer = _last_writer(model, linears)
            if writer is not None:
                attention = re.search(r"att|mixer", writer, re.IGNORECASE)
                roles[writer] = "attention_output" if attention else "mlp_down"
    return roles


def _groups(model: nn.Module) -> dict[str, list[str]]:
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
    return groups


def _last_writer(model: PreTrainedModel, linears: list[str]) -> str | None:
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    for path in reversed(linears):
        module = model.get_submodule(path)
        if (module.nf if isinstance(module, Conv1D) else module.out_features) == hidden:
            return path
    return None


def _family(model: nn.Module, path: str) -> str:
    """The family of the innermost pretrained model around ``path`` (multimodal models nest several)."""
    owner = model
    family = type(model).__name__
    for name in ("", *path.split(".")):
        owner = owner.get_submodule(name)
        if isinstance(owner, PreTrainedModel):
            family = owner.config.model_type
    return family
