"""Fresh blocks beside and between those of a fold: nothing changes before the first step, and only they train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.variants import Variant
from specdef_cli.attack.variants.grown import outermost_block_paths
from specdef_cli.model import load_model
from tests.attack.conftest import logits
from tests.tiny_families import CASES
from tests.tiny_models import random_llama

BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
TOKENS = torch.arange(40).view(2, 20) % 64


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return random_llama(vocab_size=64)


@pytest.mark.parametrize(
    ("case", "variant"),
    [*((case, "width:1.5") for case in CASES), *((case, "width:3") for case in list(CASES)[::8]),
     *((case, "depth:3") for case in list(CASES)[::3])],
)  # fmt: skip
def test_the_function_is_the_same_bit_for_bit(case: str, variant: str, checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints[case])
    before = logits(model)
    blocks = [model.get_submodule(path) for path in outermost_block_paths(model)]
    parameters = [sum(each.numel() for each in block.parameters()) for block in blocks]
    Variant.parse(variant).apply(model, seed=0)
    assert torch.equal(logits(model), before)
    grown = [sum(each.numel() for each in block.parameters()) for block in blocks]
    assert sum(grown) >= 1.4 * sum(parameters)
    assert all(after > before for after, before in zip(grown, parameters, strict=True))


@pytest.mark.parametrize(
    ("variant", "added"),
    # Of a half: one of two key heads with two of four query heads, and 24 of 48 units.
    [("width:2", BLOCK), ("width:3", 2 * BLOCK), ("depth:3", 2 * BLOCK), ("width:1.5", (BLOCK - 64) // 2 + 64)],
)
def test_only_what_is_fresh_and_what_no_fold_scales_trains(llama: LlamaForCausalLM, variant: str, added: int) -> None:
    before = llama.num_parameters()
    Variant.parse(variant).apply(llama, seed=0)
    assert llama.num_parameters() - before == 2 * added
    trained = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".grown." not in name} == {"model.embed_tokens.weight"}
    assert sum(llama.get_parameter(name).numel() for name in trained) == 2 * added + 64 * 32


@pytest.mark.parametrize("variant", ["width:2", "depth:2"])
def test_what_is_grown_is_drawn_by_the_seed_and_learns(variant: str, llama: LlamaForCausalLM) -> None:
    def grown(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
        Variant.parse(variant).apply(model, seed)
        return model

    first, same, other = (grown(model, seed) for model, seed in ((llama, 1), (_copy(llama), 1), (_copy(llama), 2)))
    name = "model.layers.1.grown.0.mlp.up_proj.weight"
    weights = [dict(model.named_parameters())[name] for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    embeddings = llama.model.embed_tokens.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad and p is not embeddings], lr=1e-2)
    start = float(llama(input_ids=TOKENS, labels=TOKENS).loss.detach())
    for _ in range(10):
        optimizer.zero_grad()
        loss = llama(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < start - 0.5


def test_a_family_whose_norms_stand_in_the_way_is_refused() -> None:
    config = transformers.ElectraConfig(
        vocab_size=64,
        embedding_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = transformers.ElectraForMaskedLM(config).eval()
    Variant.parse("width:2").apply(model, 0)
    with pytest.raises(NotApplicable, match="changes what the model computes"):
        model(input_ids=TOKENS)


def _copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copied = LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_dict()))
    for path in outermost_block_paths(model):
        state = {key: value for key, value in model.get_submodule(path).state_dict().items() if "grown" not in key}
        copied.get_submodule(path).load_state_dict(state)
    return copied.eval()
