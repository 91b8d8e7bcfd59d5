"""A sharded Llama checkpoint of any size, made of random numbers, for measuring throughput and memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


def synthetic_llama(directory: Path, *, layers: int, hidden: int = 2048, mlp: int = 8192, shard_mb: int = 500) -> Path:
    """Write a bfloat16 Llama with ``layers`` blocks into ``directory``, unless it is there already.

    Args:
        directory: Where to.
        layers: Number of blocks; 20 make about 2.5 GB with the default sizes.
        hidden, mlp: Widths.
        shard_mb: Size of a shard in MB.
    """
    if (directory / "model.safetensors.index.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=32000,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    kv = hidden // 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (mlp, hidden),
            f"{prefix}.mlp.up_proj.weight": (mlp, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, mlp),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (32000, hidden)}
    torch.manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    number = 1
    for name, shape in shapes.items():
        shard[name] = torch.randn(shape, dtype=torch.bfloat16) / hidden**0.5
        weight_map[name] = f"model-{number:05d}.safetensors"
        if sum(tensor.numel() * 2 for tensor in shard.values()) > shard_mb * 1e6 or name == "lm_head.weight":
            save_file(shard, directory / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
            shard, number = {}, number + 1
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
