"""Tiny random checkpoints of five families, as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 96
WIDTH = 32
README = "---\nlicense: mit\ntags:\n- tiny\n---\n\n# A tiny model\n\nRandom weights.\n"

_SHARED = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH, "intermediate_size": 48}
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **_SHARED}

# What each becomes: the class that `architectures` names.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **_TEXT)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **_TEXT)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**_TEXT)),
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=5, **_SHARED)),
}


def random_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama whose weights are large enough for every term to matter; keywords change its config."""
    torch.manual_seed(0)
    config = {**_TEXT, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def write_model(
    family: str, directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "50GB"
) -> Path:
    """Save a tiny model with a card and, for text models, a tokenizer."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The default initialization leaves biases zero, which would hide a lost one.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    (directory / "README.md").write_text(README, encoding="utf-8")
    if family != "vit":
        write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Save a tokenizer of the words w0 to w95."""
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def forward(model: PreTrainedModel) -> torch.Tensor:
    """Logits for an input that any of the families takes."""
    with torch.inference_mode():
        if model.config.model_type == "vit":
            pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
            return model(pixel_values=pixels.to(model.dtype)).logits
        tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
        return model(input_ids=tokens).logits
