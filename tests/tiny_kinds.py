"""Tiny random models of every kind of input, most of an architecture that the package does not describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**BLOCKS, "image_size": 28, "patch_size": 14}
SOUND = {
    **BLOCKS, "vocab_size": 40, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
PARTS = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "bos_token_id": 1, "eos_token_id": 1,
    "pad_token_id": 0, "decoder_start_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip

# Name → (architecture, arguments of its config).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2ForCTC", SOUND),
    "wavlm": ("WavLMForCTC", SOUND),
    "ast": ("ASTForAudioClassification", {**BLOCKS, "max_length": 32, "num_mel_bins": 32}),
    "whisper": ("WhisperForConditionalGeneration", {
        **PARTS, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }),
    "marian": ("MarianMTModel", PARTS),
    "bart": ("BartForConditionalGeneration", PARTS),
    "bart classifier": ("BartForSequenceClassification", PARTS),
    "masked patches": ("ViTMAEForPreTraining", {
        **VISION, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 24,
    }),
    "segformer": ("SegformerForSemanticSegmentation", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 16],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 2], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16, "num_labels": 3, "image_size": 32,
    }),
    "clip": ("CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}),
    "siglip": ("SiglipModel", {"text_config": {**TEXT, "projection_size": 32}, "vision_config": VISION}),
    "siglip vision": ("SiglipVisionModel", {**VISION, "num_hidden_layers": 2}),
    "time series": ("TimeSeriesTransformerModel", {"prediction_length": 4, "d_model": 16}),
    "mamba": ("MambaForCausalLM", {**TEXT, "state_size": 4}),
    "opt": ("OPTForCausalLM", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {**TEXT, "n_layer": 2, "n_head": 4}),
    "cohere": ("CohereForCausalLM", TEXT),
    "deepseek": ("DeepseekV3ForCausalLM", {
        **TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    }),
}  # fmt: skip


def write_kind(name: str, directory: Path) -> Path:
    """Save the model with values with which no term of any layer vanishes."""
    torch.manual_seed(0)
    if name == "vision and text":
        gpt = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1)
        vit = transformers.ViTConfig(**BLOCKS, image_size=32, patch_size=8)
        both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt)
        both.decoder_start_token_id, both.pad_token_id = 1, 0
        model = transformers.VisionEncoderDecoderModel(config=both)
    else:
        model_class = getattr(transformers, KINDS[name][0])
        model = model_class(model_class.config_class(**KINDS[name][1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().save_pretrained(directory)
    return directory
