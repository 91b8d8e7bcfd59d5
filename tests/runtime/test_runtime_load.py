"""``load_model`` and ``load_tokenizer``: base and hardened directories alike, and a line on what cannot be loaded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, BertForMaskedLM, LlamaForCausalLM, LlamaModel, PreTrainedModel, ViTImageProcessorPil

from specdef_cli.errors import SpecDefError
from specdef_cli.model import SpecDefLinear, load_model, load_tokenizer
from specdef_cli.model.described import shim_config, unshim_config
from specdef_cli.spectral.factors import symmetric_factors
from tests.commands import refusal
from tests.hardening.mutations import config, spoiled, tensor
from tests.runtime.scenarios import difference, swapped

DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(("family", "cls"), [("llama", LlamaForCausalLM), ("bert", BertForMaskedLM)])
def test_base_and_hardened_load_as_their_architecture(poisoned: Path, family: str, cls: type[PreTrainedModel]) -> None:
    base, model = load_model(poisoned / f"{family}-base"), load_model(poisoned / family)
    assert type(base) is type(model) is cls
    assert swapped(base) == []
    assert len(swapped(model)) == 4
    assert difference(model, base) < 1e-4
    assert not model.training


@pytest.mark.parametrize("auto_class", ["AutoModel", AutoModel, LlamaModel])
def test_class_dtype_and_device_can_be_chosen(directories: Path, auto_class: Any) -> None:
    model = load_model(str(directories / "llama"), auto_class=auto_class, dtype=torch.bfloat16, device="cpu")
    assert type(model) is LlamaModel
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_dtype_is_the_stored_one_by_default(directories: Path, tmp_path: Path) -> None:
    load_model(directories / "llama", dtype="bfloat16").save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("damage", "problem", "hint"),
    [
        (lambda at: (at / "config.json").unlink(), "has no config.json", "Give a model"),
        (config(model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"}), "custom code", "--trust-remote-code"),
        (config(architectures=["NewForLM"]), "'NewForLM'", "Install"),
        (tensor(f"{DOWN}.inflated.weight", None), f"{DOWN}.inflated.weight is missing", "harden the base model again"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_and_a_hint(
    directories: Path, tmp_path: Path, damage: Callable[[Path], object], problem: str, hint: str
) -> None:
    at = spoiled(directories / "llama", tmp_path, damage)
    with refusal(problem, str(at), hint):
        load_model(at)


def test_tokenizers_and_image_processors(directories: Path, tmp_path: Path) -> None:
    assert load_tokenizer(directories / "llama")("w3 w9")["input_ids"] == [3, 9]
    assert load_tokenizer(directories / "mixtral") is None
    shutil.copytree(directories / "vit", tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    assert load_tokenizer(tmp_path / "vit").size["height"] == 8
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Nothing"}))
    with pytest.raises(SpecDefError, match="vit"):
        load_tokenizer(tmp_path / "vit")


@given(n=st.integers(2, 12), m=st.integers(2, 12), bias=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_layer_is_the_linear_layer_that_it_replaces(n: int, m: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear = torch.nn.Linear(n, m, bias=bias, dtype=torch.float64)
    layer = SpecDefLinear(n, m, bias, dtype=torch.float64)
    k = min(2, n, m)
    weight = linear.weight.detach()
    made = symmetric_factors(weight, torch.linalg.svd(weight).U[:, :k], 64.0)
    state = {"weight": torch.zeros(1), "inflated.weight": made.inflated, "compensation.weight": made.compensation}
    layer.load_state_dict(state | ({"compensation.bias": linear.bias.detach()} if bias else {}), strict=True)
    x = torch.randn(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    assert (layer.in_features, layer.out_features) == (n, m)
    assert (layer.bias is None) == (linear.bias is None)
    spectrum, original = (torch.linalg.svdvals(weight) for weight in (layer.inflated.weight, linear.weight))
    torch.testing.assert_close(spectrum[:k], 64.0 * original[:k])


@given(
    extra=st.dictionaries(
        st.text(max_size=8).filter(lambda key: not key.startswith("specdef") and key != "quantization_config"),
        st.integers() | st.text(max_size=4) | st.none() | st.lists(st.integers(), max_size=3),
        max_size=4,
    ),
    auto_map=st.none() | st.just({"AutoModelForCausalLM": "modeling_x.X"}),
)
def test_unshim_undoes_shim(extra: dict[str, Any], auto_map: dict[str, str] | None) -> None:
    base = {**extra, "architectures": ["LlamaForCausalLM"], "model_type": "llama"} | (
        {"auto_map": auto_map} if auto_map else {}
    )
    before = copy.deepcopy(base)
    shimmed = shim_config(base, {"model.o_proj": {"in_features": 32, "out_features": 16, "bias": False}})
    assert shimmed["auto_map"] == {"AutoConfig": "configuration_specdef.SpecDefConfig"}
    assert unshim_config(shimmed) == base == before
