"""Tiny hardened directories, made by hand from the algebra: W~ = (I + (α−1)P)W and C = I − (1−1/α)P, P = U_k U_kᵀ.

It shares nothing with the package but ``shim_config``, which is what the tests of loading are about.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from specdef_cli.model.described import SHIM_SOURCE, LayerSpec, shim_config

ALPHA = 64.0
TOP_K = 2


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))


def _bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip


def _bert() -> PreTrainedModel:
    return BertForMaskedLM(_bert_config())


def _bert_base() -> PreTrainedModel:
    return BertModel(_bert_config())


def _vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=8,
            patch_size=4, num_labels=3,
        )
    )  # fmt: skip


def _mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        )
    )  # fmt: skip


# Family: how to build it, and which linears of layer {i} to harden: name on disk without `.weight`, path in the model.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, str]]] = {
    "llama": (
        _llama,
        {
            "model.layers.{i}.self_attn.o_proj": "model.layers.{i}.self_attn.o_proj",
            "model.layers.{i}.mlp.down_proj": "model.layers.{i}.mlp.down_proj",
        },
    ),
    "qwen2": (
        _qwen2,
        {
            "model.layers.{i}.self_attn.q_proj": "model.layers.{i}.self_attn.q_proj",  # with a bias
            "model.layers.{i}.self_attn.o_proj": "model.layers.{i}.self_attn.o_proj",  # without
        },
    ),
    "gpt2": (
        _gpt2,
        {
            "transformer.h.{i}.attn.c_proj": "transformer.h.{i}.attn.c_proj",
            "transformer.h.{i}.mlp.c_fc": "transformer.h.{i}.mlp.c_fc",
        },
    ),
    "bert": (
        _bert,
        {
            "bert.encoder.layer.{i}.attention.output.dense": "bert.encoder.layer.{i}.attention.output.dense",
            "bert.encoder.layer.{i}.output.dense": "bert.encoder.layer.{i}.output.dense",
        },
    ),
    "bert_base": (
        _bert_base,
        {"encoder.layer.{i}.attention.output.dense": "encoder.layer.{i}.attention.output.dense"},
    ),
    "vit": (
        _vit,
        {
            "vit.encoder.layer.{i}.attention.attention.query": "vit.layers.{i}.attention.q_proj",
            "vit.encoder.layer.{i}.attention.output.dense": "vit.layers.{i}.attention.o_proj",
            "vit.encoder.layer.{i}.intermediate.dense": "vit.layers.{i}.mlp.fc1",
            "vit.encoder.layer.{i}.output.dense": "vit.layers.{i}.mlp.fc2",
        },
    ),
    "t5": (
        _t5,
        {
            "encoder.block.{i}.layer.1.DenseReluDense.wo": "encoder.block.{i}.layer.1.DenseReluDense.wo",
            "decoder.block.{i}.layer.0.SelfAttention.o": "decoder.block.{i}.layer.0.SelfAttention.o",
        },
    ),
    "mixtral": (_mixtral, {"model.layers.{i}.self_attn.o_proj": "model.layers.{i}.self_attn.o_proj"}),
}
LAYERS = 2


def make_base(family: str, directory: Path) -> Path:
    """A random base checkpoint with weights large enough for the layers to matter."""
    torch.manual_seed(sum(map(ord, family)))
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    if family == "llama":
        words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
            directory
        )
    return directory


def harden(family: str, base: Path, directory: Path) -> Path:
    """The insert directory of a base directory."""
    build, sites = FAMILIES[family]
    shutil.copytree(base, directory)
    modules = dict(build().named_modules())
    tensors = load_file(base / "model.safetensors")
    layers = {}
    for i in range(LAYERS):
        for disk, module in ((disk.format(i=i), module.format(i=i)) for disk, module in sites.items()):
            stored = tensors[f"{disk}.weight"]
            weight = stored.T if isinstance(modules[module], Conv1D) else stored  # [m, n]
            bias = tensors.pop(f"{disk}.bias", None)
            tensors[f"{disk}.weight"] = torch.zeros(1)
            tensors[f"{disk}.inflated.weight"], tensors[f"{disk}.compensation.weight"] = factors(weight)
            if bias is not None:
                tensors[f"{disk}.compensation.bias"] = bias
            layers[module] = LayerSpec(weight.shape[1], weight.shape[0], bias is not None)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(shim_config(config, layers)))
    shutil.copy(SHIM_SOURCE, directory / SHIM_SOURCE.name)
    return directory


def factors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W~ and C of W in the symmetric gauge, computed in float64."""
    exact = weight.double()
    basis = torch.linalg.svd(exact)[0][:, :TOP_K]  # [m, k]
    projector = basis @ basis.T
    identity = torch.eye(len(projector), dtype=exact.dtype)
    inflated = (identity + (ALPHA - 1) * projector) @ exact
    compensation = identity - (1 - 1 / ALPHA) * projector
    return inflated.to(weight.dtype).contiguous(), compensation.to(weight.dtype).contiguous()


def edit_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite config.json in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite model.safetensors in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
