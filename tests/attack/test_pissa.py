"""PiSSA: adapters that begin with the principal directions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdef_cli.attack.trainings import Training


def test_adapters_hold_the_largest_singular_directions_and_the_rest_is_frozen() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = model(tokens).logits
    adapted: Any = Training.parse("pissa:4").apply(model, "causal-lm")
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, before, rtol=1e-4, atol=1e-4)
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    values = torch.linalg.svdvals(weight)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(torch.linalg.svdvals(product)[:4], values[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[0], values[4], rtol=1e-4, atol=1e-5)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7
