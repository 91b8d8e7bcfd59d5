"""config.json of an insert directory: the shim and its inverse, without torch or transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdef_cli.errors import SpecDefError
from specdef_cli.model.described import shim_config, unshim_config

LAYERS = {
    "model.layers.0.self_attn.o_proj": {"in_features": 32, "out_features": 16, "bias": False},
    "model.layers.1.mlp.down_proj": {"in_features": 48, "out_features": 16, "bias": True},
}
BASE: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "model_type": "llama"}


def test_shim_names_an_unknown_model_type_and_the_file_that_knows_it() -> None:
    shimmed = shim_config(BASE, LAYERS)
    assert shimmed == {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "model_type": "specdef",
        "specdef_base_model_type": "llama",
        "auto_map": {"AutoConfig": "configuration_specdef.SpecDefConfig"},
        "quantization_config": {
            "quant_method": "specdef",
            "layers": {
                "model.layers.0.self_attn.o_proj": {"in_features": 32, "out_features": 16, "bias": False},
                "model.layers.1.mlp.down_proj": {"in_features": 48, "out_features": 16, "bias": True},
            },
        },
    }
    assert BASE == {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "model_type": "llama"}


@given(
    extra=st.dictionaries(
        st.text(max_size=8).filter(lambda key: not key.startswith("specdef") and key != "quantization_config"),
        st.recursive(st.integers() | st.text(max_size=4) | st.none(), lambda inner: st.lists(inner, max_size=3)),
        max_size=4,
    ),
    auto_map=st.none() | st.just({"AutoModelForCausalLM": "modeling_x.X"}),
)
def test_unshim_undoes_shim(extra: dict[str, Any], auto_map: dict[str, str] | None) -> None:
    base = {**extra, **BASE} | ({"auto_map": auto_map} if auto_map else {})
    before = copy.deepcopy(base)
    shimmed = shim_config(base, LAYERS)
    assert shimmed["auto_map"] == {"AutoConfig": "configuration_specdef.SpecDefConfig"}
    assert unshim_config(shimmed) == base == before


def test_unshim_leaves_other_configs_alone() -> None:
    assert unshim_config(BASE) == BASE


def test_shim_refuses_a_config_that_names_no_architecture() -> None:
    with pytest.raises(SpecDefError, match="model_type"):
        shim_config({"hidden_size": 1}, LAYERS)
