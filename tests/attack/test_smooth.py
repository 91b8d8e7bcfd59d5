"""Smoothing: what quantizers of activations do first, on families of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.variants.smooth import smooth
from specdef_cli.hardening.options import HardenOptions
from specdef_cli.hardening.run import harden
from specdef_cli.runtime import load_model
from specdef_cli.runtime.fixed_batch import fixed_inputs
from tests.attack.test_rebalance import logits
from tests.tiny_families import CASES, write_case


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_up_to_rounding(case: str, tmp_path: Path) -> None:
    model = load_model(write_case(case, tmp_path / "base"))
    before = logits(model)
    try:
        growth = smooth(model)
    except NotApplicable:
        return
    assert growth.layers > 0
    assert growth.parameters_added == growth.bytes_added == 0
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_what_a_norm_gives_out_and_what_reads_it_range_alike(tmp_path: Path) -> None:
    """By hand, in the first block: max|x| of every channel is the largest weight of its column."""
    model = load_model(write_case("llama", tmp_path / "base"))
    smooth(model)
    block = model.model.layers[0]
    with torch.no_grad():
        given = block.input_layernorm(model.model.embed_tokens(fixed_inputs(model)["input_ids"]))
    readers = torch.cat([getattr(block.self_attn, f"{name}_proj").weight for name in "qkv"])
    torch.testing.assert_close(given.abs().amax((0, 1)), readers.abs().amax(0), rtol=1e-4, atol=0)


def test_a_fold_s_factors_between_norms_and_readers_are_gone(tmp_path: Path) -> None:
    """Base and fold become the same norms, whatever else the fold did to their readers' other sides."""
    base_directory = write_case("llama", tmp_path / "base")
    assert harden(HardenOptions(str(base_directory), tmp_path / "fold", verify=False)) is not None
    base, fold = load_model(base_directory), load_model(tmp_path / "fold")
    folded = fold.model.norm.weight.clone()
    for model in (base, fold):
        smooth(model)
    assert not torch.allclose(folded, base.model.norm.weight)
    torch.testing.assert_close(fold.model.norm.weight, base.model.norm.weight, rtol=1e-4, atol=0)


def test_a_family_without_norms_that_are_known_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(NotApplicable, match="no norm whose readers"):
        smooth(transformers.BloomForCausalLM(config))
