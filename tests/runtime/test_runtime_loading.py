"""Hardened directories in fresh processes: they load everywhere they should, and nowhere else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specdef_cli.model.described import SHIM_SOURCE
from tests.runtime.hand_hardened import FAMILIES, LAYERS, edit_config, edit_tensors

Scenario = Callable[..., dict[str, Any]]


def expected_modules(family: str) -> list[str]:
    return sorted(module.format(i=i) for module in FAMILIES[family][1].values() for i in range(LAYERS))


@pytest.mark.parametrize("by", ["remote_code", "package"])
def test_every_family_loads_as_its_native_class_and_survives_saving(
    scenario: Scenario, directories: Path, poisoned: Path, by: str
) -> None:
    results = scenario(by, poisoned if by == "package" else directories, package=by == "package")
    assert results.keys() == FAMILIES.keys()
    for family, result in results.items():
        assert result["native"], (family, result["type"])
        assert result["type"].startswith("transformers.models."), family
        assert result["difference"] < 1e-4, family
        assert result["headless_difference"] < 1e-4, family
        assert result["swapped"] == expected_modules(family)
        assert result["head_again"] == expected_modules(family)
        for kept in (
            "plain_linears", "same_tensors", "same_output", "config_passed_on", "head_again_equal"
        ):  # fmt: skip
            assert result[kept], (family, kept)
        for empty in ("traces", "config_difference", "copies"):
            assert result[empty] == [], (family, empty)
        assert result["code"] == SHIM_SOURCE.read_text(), family


def test_dtypes_devices_generation_pipelines_and_heads(scenario: Scenario, directories: Path) -> None:
    result = scenario("usage", directories)
    assert result["bfloat16"] == ["torch.bfloat16"]
    assert result["half"] == "torch.float16"
    assert result["double_difference"] < 1e-4
    for same in (
        "device_map_cpu",
        "device_map_auto",
        "device_map_split",
        "device_map_disk",
        "generate",
        "pipeline",
        "sharded",
    ):
        assert result[same], same
    assert result["shards"] > 1
    assert result["pipeline_swapped"] == 4
    assert result["tokenizer"] == [3, 4, 5]
    encoder = result["encoder"]
    assert encoder["swapped"] == [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(LAYERS)]
    assert encoder["dtypes"] == ["torch.float32"]
    assert encoder["difference"] < 0.05  # float16
    assert result["merged"] == ["llama", "llama"]
    assert result["merged_files"] == ["config.json"]
    assert result["bert_base_classifier"] == {"swapped": 2, "shape": [1, 5], "round_trip": True}
    assert result["llama_classifier"] == {"swapped": 4, "shape": [1, 5], "round_trip": True}


def test_adapters_and_full_fine_tuning(scenario: Scenario, directories: Path) -> None:
    result = scenario("training", directories)
    attention = [
        f"self_attn.{name}" for name in ("k_proj", "o_proj.compensation", "o_proj.inflated", "q_proj", "v_proj")
    ]
    mlp = [f"mlp.{name}" for name in ("down_proj.compensation", "down_proj.inflated", "gate_proj", "up_proj")]
    assert result["all_linear"] == mlp + attention
    assert result["adapter_round_trip"]
    assert result["default_targets"] == ["q_proj", "v_proj"]
    assert result["trained"]
    assert result["checkpoint_swapped"] == 4
    assert result["checkpoint_equal"]
    assert result["resumed_steps"] == 4


def test_package_and_directory_code_in_one_process(scenario: Scenario, directories: Path) -> None:
    result = scenario("registered_twice", directories, package=True)
    assert not result["package_imported_before"]
    assert result["hooks"] == ["transformers_modules", "specdef_cli.model.configuration_specdef"]
    assert result["equal"] == [True, True, True]
    assert result["ours"] == [True, True]
    assert result["saved"] == [True, True]
    assert result["pickles"] == "llama"


def test_native_class_with_the_package(scenario: Scenario, poisoned: Path) -> None:
    result = scenario("native_class", poisoned, package=True)
    assert result["difference"] < 1e-4
    assert result["again"] < 1e-4
    assert result["model_type"] == "llama"
    assert result["saved_model_type"] == "specdef"


def test_nothing_loads_without_the_code(scenario: Scenario, poisoned: Path) -> None:
    results = scenario("strangers", poisoned)
    assert len(results) > 20
    assert [name for name, raised in results.items() if not raised] == []
    # The right reason: code that was not trusted, or a tombstone where a weight belongs.
    for name, raised in results.items():
        explicit = "Auto" not in name and name.split()[-1] not in ("untrusted", "config", "pipeline")
        assert ("size" in raised or "shape" in raised) if explicit else "custom code" in raised, (name, raised)


def test_damaged_directories_name_what_is_wrong(scenario: Scenario, directories: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
        "no compensation": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_tensors(at, lambda t: t.pop("model.layers.1.mlp.down_proj.compensation.weight")),
            "model.layers.1.mlp.down_proj.compensation.weight is missing",
        ),
        "no inflated": (
            "vit", "AutoModelForImageClassification",
            lambda at: edit_tensors(at, lambda t: t.pop("vit.encoder.layer.0.attention.output.dense.inflated.weight")),
            "vit.encoder.layer.0.attention.output.dense.inflated.weight is missing",  # by its name on disk
        ),
        "no bias": (
            "qwen2", "AutoModel",
            lambda at: edit_tensors(at, lambda t: t.pop("model.layers.0.self_attn.q_proj.compensation.bias")),
            "model.layers.0.self_attn.q_proj.compensation.bias is missing",
        ),
        "no tombstone": (
            "llama", "AutoModelForSequenceClassification",
            lambda at: edit_tensors(at, lambda t: t.pop("model.layers.0.self_attn.o_proj.weight")),
            "model.layers.0.self_attn.o_proj.weight is missing",
        ),
        "no trace of a layer": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_tensors(at, lambda t: [t.pop(k) for k in [*t] if k.startswith("model.layers.1.mlp.down")]),
            "model.layers.1.mlp.down_proj.inflated.weight is missing",
        ),
        "wrong shape": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_tensors(
                at, lambda t: t.update({"model.layers.0.self_attn.o_proj.inflated.weight": t["lm_head.weight"] * 1})
            ),
            "model.layers.0.self_attn.o_proj.inflated.weight has shape [64, 32]",
        ),
        "truncated list": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_config(at, lambda c: c["quantization_config"]["layers"].popitem()),
            "does not list model.layers.1.mlp.down_proj",
        ),
        "truncated list, no head": (
            "bert", "AutoModel",
            lambda at: edit_config(at, lambda c: c["quantization_config"]["layers"].popitem()),
            "does not list encoder.layer.1.output.dense",
        ),
        "misspelt path": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_config(
                at, lambda c: c["quantization_config"]["layers"].update(
                    {"model.layers.1.mlp.down": c["quantization_config"]["layers"].pop("model.layers.1.mlp.down_proj")}
                )
            ),
            "does not list model.layers.1.mlp.down_proj",
        ),
        "one too many": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_config(
                at, lambda c: c["quantization_config"]["layers"].update(
                    {"model.layers.2.mlp.down_proj": {"in_features": 48, "out_features": 32, "bias": False}}
                )
            ),
            "lists 5 replaced layers, but the checkpoint holds 4",
        ),
        "not a linear": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_config(
                at, lambda c: c["quantization_config"]["layers"].update(
                    {"model.norm": {"in_features": 32, "out_features": 32, "bias": False}}
                )
            ),
            "model.norm is a LlamaRMSNorm",
        ),
        "tied": (
            "qwen2", "AutoModelForCausalLM",
            lambda at: edit_config(
                at, lambda c: c["quantization_config"]["layers"].update(
                    {"lm_head": {"in_features": 32, "out_features": 64, "bias": False}}
                )
            ),
            "lm_head.weight is tied",
        ),
        "other dimensions": (
            "gpt2", "AutoModelForCausalLM",
            lambda at: edit_config(
                at, lambda c: c["quantization_config"]["layers"]["transformer.h.0.mlp.c_fc"].update(out_features=96)
            ),
            "transformer.h.0.mlp.c_fc is listed with",
        ),
        "no list": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_config(at, lambda c: c.pop("quantization_config")),
            "no quantization_config.layers",
        ),
        "unknown architecture": (
            "llama", "AutoModelForCausalLM",
            lambda at: edit_config(at, lambda c: c.update(specdef_base_model_type="llama-from-tomorrow")),
            "llama-from-tomorrow",
        ),
    }  # fmt: skip
    for name, (family, _, damage, _) in cases.items():
        shutil.copytree(directories / family, tmp_path / name)
        damage(tmp_path / name)
    results = scenario("damaged", directories, cases={name: case[1] for name, case in cases.items()})
    for name, (*_, message) in cases.items():
        assert results[name].startswith("SpecDefLoadError"), (name, results[name])
        assert message in results[name], (name, results[name])
    assert "has shape [64, 32]" in results["ignored mismatch"]
    assert "model.layers.1.mlp.down_proj.compensation.weight was not loaded" in results["state dict"]


def test_importing_the_package_imports_neither_torch_nor_transformers(scenario: Scenario, tmp_path: Path) -> None:
    assert scenario("lazy", tmp_path, package=True) == {
        "heavy": [],
        "version": "0.1.0",
        "error": "specdef_cli.errors",
    }
