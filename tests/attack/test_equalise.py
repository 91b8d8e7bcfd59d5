"""Equalising: what converters do for reasons of their own, on families of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.variants.scales import equalise
from specdef_cli.hardening.options import HardenOptions
from specdef_cli.hardening.run import harden
from specdef_cli.model import load_model
from tests.attack.test_rebalance import logits
from tests.tiny_families import CASES, build_config


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_up_to_rounding(case: str, checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints[case])
    before = logits(model)
    try:
        growth = equalise(model)
    except NotApplicable:
        return
    assert growth.layers > 0
    assert growth.parameters_added == growth.bytes_added == 0
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_a_fold_and_its_base_are_converted_to_the_same_weights_but_for_queries_and_keys(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Nothing but the weights says where gains and ranges went: gains are 1, both sides of an MLP range equally."""
    base_directory = checkpoints["llama"]
    assert harden(HardenOptions(str(base_directory), tmp_path / "fold", verify=False)) is not None
    base, fold = load_model(base_directory), load_model(tmp_path / "fold")
    for model in (base, fold):
        equalise(model)
        for block in model.model.layers:
            assert torch.allclose(block.input_layernorm.weight, torch.ones(32))
            assert torch.allclose(block.post_attention_layernorm.weight, torch.ones(32))
            rows, columns = block.mlp.up_proj.weight.abs().amax(1), block.mlp.down_proj.weight.abs().amax(0)
            torch.testing.assert_close(rows, columns, rtol=1e-5, atol=0)
    different = {
        name
        for (name, weight), other in zip(base.named_parameters(), fold.parameters(), strict=True)
        if not torch.allclose(weight, other, rtol=1e-4)
    }
    assert different
    assert all(".q_proj." in name or ".k_proj." in name for name in different)


def test_a_gain_of_zero_stays() -> None:
    model = transformers.LlamaForCausalLM(build_config("llama-tied")).eval()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    before = logits(model)
    equalise(model)
    assert model.model.layers[0].input_layernorm.weight[3] == 0
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_a_family_without_pairs_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(NotApplicable, match="could be equalised"):
        equalise(transformers.BloomForCausalLM(config))
