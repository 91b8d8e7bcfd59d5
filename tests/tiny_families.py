"""Tiny random checkpoints of every supported family, as directories that transformers wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from specdef_cli.model.skeleton import Skeleton

VOCABULARY = 96
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
_GQA = {**_COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_MHA = {**_COMMON, "num_attention_heads": 4, "max_position_embeddings": 64}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
# Large enough for float32 to see it; the default of BERT and ViT is 1e-12.
_EPS = 1e-4
_T5_IDS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}

# Name of the case → (architecture, arguments of its config).
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", {**_GQA, **_IDS, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {**_GQA, **_IDS, "tie_word_embeddings": True}),
    "llama-base": ("LlamaModel", {**_GQA, **_IDS}),
    "llama-classifier": ("LlamaForSequenceClassification", {**_GQA, **_IDS, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", {**_GQA, **_IDS, "head_dim": 12, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", {**_GQA, **_IDS}),
    "qwen3": ("Qwen3ForCausalLM", {**_GQA, **_IDS, "head_dim": 12}),
    "qwen3-tied": ("Qwen3ForCausalLM", {**_GQA, **_IDS, "head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {**_GQA, **_IDS, "head_dim": 12, "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**_GQA, **_IDS, "head_dim": 12, "sliding_window": 8}),
    "phi3": ("Phi3ForCausalLM", {**_GQA, **_IDS, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}),
    "olmo": ("OlmoForCausalLM", {**_GQA, **_IDS, "attention_bias": True}),
    "olmo-clip": ("OlmoForCausalLM", {**_GQA, **_IDS, "clip_qkv": 0.05}),
    "olmo2": ("Olmo2ForCausalLM", {**_GQA, **_IDS}),
    "qwen3-bias": ("Qwen3ForCausalLM", {**_GQA, **_IDS, "head_dim": 12, "attention_bias": True}),
    "olmo2-bias": ("Olmo2ForCausalLM", {**_GQA, **_IDS, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS},
    ),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            **_IDS,
            "tie_word_embeddings": False,
            "activation_function": "relu",
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", {**_MHA, **_IDS, "rotary_pct": 0.5}),
    "gpt-neox-serial": (
        "GPTNeoXForCausalLM",
        {**_MHA, **_IDS, "rotary_pct": 0.25, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    "bert": ("BertForMaskedLM", {**_MHA, "pad_token_id": 0}),
    "bert-classifier": (
        "BertForSequenceClassification",
        {**_MHA, "pad_token_id": 0, "hidden_act": "relu", "layer_norm_eps": _EPS},
    ),
    "roberta": ("RobertaForMaskedLM", {**_MHA, "pad_token_id": 0}),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 5,
            "layer_norm_eps": _EPS,
        },
    ),
    "t5": ("T5ForConditionalGeneration", {**_T5, **_T5_IDS}),
    "t5-gated": ("T5ForConditionalGeneration", {**_T5, **_T5_IDS, "feed_forward_proj": "gated-gelu"}),
    "t5-untied": (
        "T5ForConditionalGeneration",
        {**_T5, **_T5_IDS, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5-encoder": ("T5EncoderModel", {**_T5, **_T5_IDS}),
    "mixtral": ("MixtralForCausalLM", {**_GQA, **_IDS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-stacked": ("MixtralForCausalLM", {**_GQA, **_IDS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {**_GQA, **_IDS, **_MOE, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**_GQA, **_IDS, **_MOE, "head_dim": 12, "mlp_only_layers": [0]}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {**_GQA, **_IDS, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}


Tensors = dict[str, torch.Tensor]


def _by_parameter_name(model: PreTrainedModel, _: Tensors) -> Tensors:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _with_lm_head(model: PreTrainedModel, tensors: Tensors) -> Tensors:
    """As T5 v1.1 is stored: ``save_pretrained`` ties T5's head whatever the config says."""
    head = 0.15 * torch.randn(tensors["shared.weight"].shape, generator=torch.Generator().manual_seed(7))
    return {**tensors, "lm_head.weight": head.bfloat16().float()}


# Layouts that exist on the Hub but that `save_pretrained` does not write.
_STORED_OTHERWISE: dict[str, Callable[[PreTrainedModel, Tensors], Tensors]] = {
    "mixtral-stacked": _by_parameter_name,
    "t5-untied": _with_lm_head,
}


def build_config(case: str) -> PreTrainedConfig:
    architecture, arguments = CASES[case]
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**arguments)
    config.architectures = [architecture]
    return config


def randomize(model: PreTrainedModel, seed: int = 0) -> None:
    """Values with which no term of any layer vanishes: biases ≠ 0, norm gains spread about their init."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((parameter + 0.3 * noise).to(parameter.dtype))
            else:
                parameter.copy_((0.15 * noise).to(parameter.dtype))


def write_case(case: str, directory: Path) -> Path:
    """Save the case's checkpoint and return its directory."""
    torch.manual_seed(0)
    config = build_config(case)
    model = getattr(transformers, CASES[case][0])(config).eval()
    randomize(model)
    # bfloat16 values in float32 storage, so that the same numbers are tested in both dtypes.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(directory)
    if case in _STORED_OTHERWISE:
        weights = directory / "model.safetensors"
        save_file(_STORED_OTHERWISE[case](model, load_file(weights)), weights, {"format": "pt"})
    return directory


def read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def read_config(directory: Path) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(directory)


def skeleton_of(directory: Path) -> Skeleton:
    return Skeleton.of(read_config(directory), read_shapes(directory))
