"""Rebalancing: what a fold did is read off the weights and taken out, bit for bit, for families of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from specdef_cli.attack.variants.scales import rebalance
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import HardenOptions
from specdef_cli.hardening.recognise import channel_exponents
from specdef_cli.hardening.run import harden
from specdef_cli.model import load_model
from specdef_cli.model.body import Side, SymmetricPair
from tests.tiny_families import CASES, build_config, randomize

TOKENS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    """Logits, or the last hidden state of a model without head."""
    inputs = {"input_ids": TOKENS}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(1))}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS[:, :7]
    with torch.inference_mode():
        return model(**inputs)[0]


def octaves(left: torch.nn.Module, right: torch.nn.Module) -> float:
    """The largest factor between two models' weights, as a power of two."""
    others = right.state_dict()
    return max(float((weight / others[name]).abs().log2().abs().max()) for name, weight in left.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_a_fold_is_undone_from_the_weights_alone(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base_directory = checkpoints[case]
    result = harden(HardenOptions(str(base_directory), tmp_path / "fold", verify=False))
    assert result is not None
    base, model = load_model(base_directory), load_model(tmp_path / "fold")
    # No manifest is at hand: the attacker has the loaded model and nothing else.
    before = logits(model)
    assert octaves(base, model) >= 20
    growth = rebalance(model)
    assert growth.layers >= len(result.manifest.folded)
    assert growth.parameters_added == growth.bytes_added == 0
    assert torch.equal(logits(model), before)
    # Random weights leave a channel's size uncertain by an octave or two; a fold moved it by thirteen or more.
    assert octaves(base, model) <= 4


def test_a_second_pass_finds_nothing() -> None:
    model = transformers.LlamaForCausalLM(build_config("llama")).eval()
    randomize(model)
    rebalance(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rebalance(model)
    for name, tensor in model.state_dict().items():
        assert bool(((tensor / weights[name]).log2().abs() <= 2).all()), name


def test_the_factor_of_a_channel_is_read_off_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 2048, generator=generator), torch.randn(2048, 8, generator=generator)
    # Channel 5 is important on both sides by nature: nothing that a fold could have done.
    up[5] *= 16
    down[:, 5] *= 16
    up[2] *= 2**13
    down[:, 2] /= 2**13
    # Another pair's channel crosses this one's: a single column, which no median feels.
    up[:, 7] *= 2**20
    each = tuple((channel,) for channel in range(8))
    pair = SymmetricPair("mlp", "up_down", 8, (Side("up", 0, each, 1), Side("down", 1, each, -1)))
    expected = torch.zeros(8, dtype=torch.int64)
    expected[2] = 13
    assert torch.equal(channel_exponents(pair, {"up": up, "down": down}.__getitem__), expected)


def test_a_side_of_zeros_says_nothing() -> None:
    each = ((0,), (1,))
    pair = SymmetricPair("p", "up_down", 2, (Side("up", 0, each, 1), Side("down", 1, each, -1)))
    tensors = {"up": torch.zeros(2, 4), "down": torch.tensor([[1.0, 1024.0]] * 4)}
    assert not channel_exponents(pair, tensors.__getitem__).any()


def test_a_family_without_pairs_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(SpecDefError, match="no symmetric pair"):
        rebalance(transformers.BloomForCausalLM(config))
