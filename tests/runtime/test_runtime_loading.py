"""Hardened directories in fresh processes: they load everywhere they should, and nowhere else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.model.described import SHIM_SOURCE
from tests.hardening.mutations import edit_config, edit_tensors
from tests.runtime.conftest import FAMILIES

Results = dict[str, Any]


def without(name: str) -> Callable[[Path], object]:
    """Take the tensors away whose names begin so."""
    return lambda at: edit_tensors(at, lambda t: [t.pop(key) for key in [*t] if key.startswith(name)])


def listing(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the list of replaced layers in config.json."""
    return lambda at: edit_config(at, lambda c: change(c["quantization_config"]["layers"]))


def layer(in_features: int, out_features: int) -> dict[str, Any]:
    return {"in_features": in_features, "out_features": out_features, "bias": False}


DOWN = "model.layers.1.mlp.down_proj"
LM = "AutoModelForCausalLM"
# Family, class, what is done to the directory, and what is said of it.
DAMAGED: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "no compensation": ("llama", LM, without(f"{DOWN}.compensation"), f"{DOWN}.compensation.weight is missing"),
    "no inflated": (
        "vit", "AutoModelForImageClassification", without("vit.encoder.layer.0.attention.output.dense.inflated"),
        "vit.encoder.layer.0.attention.output.dense.inflated.weight is missing",  # by its name on disk
    ),
    "no bias": (
        "qwen2", "AutoModel", without("model.layers.0.self_attn.q_proj.compensation.bias"),
        "model.layers.0.self_attn.q_proj.compensation.bias is missing",
    ),
    "no tombstone": (
        "llama", "AutoModelForSequenceClassification", without("model.layers.0.self_attn.o_proj.weight"),
        "model.layers.0.self_attn.o_proj.weight is missing",
    ),
    "no trace of a layer": ("llama", LM, without(DOWN), f"{DOWN}.inflated.weight is missing"),
    "wrong shape": (
        "llama", LM,
        lambda at: edit_tensors(
            at, lambda t: t.update({"model.layers.0.self_attn.o_proj.inflated.weight": t["lm_head.weight"] * 1})
        ),
        "model.layers.0.self_attn.o_proj.inflated.weight has shape [96, 32]",
    ),
    "truncated list": ("llama", LM, listing(dict.popitem), f"does not list {DOWN}"),
    "truncated list, no head": (
        "bert", "AutoModel", listing(dict.popitem), "does not list encoder.layer.1.output.dense",
    ),
    "misspelt path": (
        "llama", LM, listing(lambda x: x.update({DOWN.removesuffix("_proj"): x.pop(DOWN)})), f"does not list {DOWN}",
    ),
    "one too many": (
        "llama", LM, listing(lambda x: x.update({"model.layers.2.mlp.down_proj": layer(48, 32)})),
        "lists 5 replaced layers, but the checkpoint holds 4",
    ),
    "not a linear": ("llama", LM, listing(lambda x: x.update({"model.norm": layer(32, 32)})), "is a LlamaRMSNorm"),
    "tied": ("qwen2", LM, listing(lambda x: x.update({"lm_head": layer(32, 96)})), "lm_head.weight is tied"),
    "other dimensions": (
        "gpt2", LM, listing(lambda x: x["transformer.h.0.mlp.c_fc"].update(out_features=96)),
        "transformer.h.0.mlp.c_fc is listed with",
    ),
    "no list": (
        "llama", LM, lambda at: edit_config(at, lambda c: c.pop("quantization_config")),
        "no quantization_config.layers",
    ),
    "unknown architecture": (
        "llama", LM, lambda at: edit_config(at, lambda c: c.update(specdef_base_model_type="llama-from-tomorrow")),
        "llama-from-tomorrow",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def stranger(
    run_scenarios: Callable[..., Results], directories: Path, poisoned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """One process without the package. First what may not load: afterwards the directories' code has been run."""
    work = tmp_path_factory.mktemp("damaged")
    for name, (family, auto, damage, _) in DAMAGED.items():
        shutil.copytree(directories / family, work / auto / name)
        damage(work / auto / name)
    trusted = dict.fromkeys(("remote_code", "usage", "training", "damaged"), directories)
    return run_scenarios(package=False, work=work, without_package=work, strangers=poisoned, **trusted)


@pytest.fixture(scope="module")
def packaged(run_scenarios: Callable[..., Results], directories: Path, poisoned: Path) -> Results:
    """One process that has loaded a directory by its own code, and then imports the package."""
    return run_scenarios(package=True, registered_twice=directories, package_alone=poisoned)


@pytest.mark.parametrize("by", ["remote_code", "package_alone"])
def test_every_family_loads_as_its_native_class_and_survives_saving(
    by: str, directories: Path, request: pytest.FixtureRequest
) -> None:
    results = request.getfixturevalue("stranger" if by == "remote_code" else "packaged")[by]
    assert results.keys() == FAMILIES.keys() if by == "remote_code" else len(results) == 3
    for family, result in results.items():
        assert result["native"], (family, result["type"])
        assert result["type"].startswith("transformers.models."), family
        assert result["difference"] < 1e-4, family
        assert result["headless_difference"] < 1e-4, family
        expected = sorted(layer.module for layer in read_manifest(directories / family).factored)
        assert len(expected) >= 2
        assert result["swapped"] == result["head_again"] == expected
        for kept in ("plain_linears", "same_tensors", "same_output", "config_passed_on", "head_again_equal"):
            assert result[kept], (family, kept)
        for empty in ("traces", "config_difference", "copies"):
            assert result[empty] == [], (family, empty)
        assert result["code"] == SHIM_SOURCE.read_text(), family


def test_dtypes_devices_generation_pipelines_and_heads(stranger: Results) -> None:
    result = stranger["usage"]
    assert result["bfloat16"] == ["torch.bfloat16"]
    assert result["half"] == "torch.float16"
    assert result["double_difference"] < 1e-4
    for same in (
        *(f"device_map_{places}" for places in ("cpu", "auto", "split", "disk")),
        "generate",
        "pipeline",
        "sharded",
    ):
        assert result[same], same
    assert result["shards"] > 1
    assert result["pipeline_swapped"] == 4
    assert result["tokenizer"] == [3, 4, 5]
    encoder = result["encoder"]
    assert encoder["swapped"] == [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in (0, 1)]
    assert encoder["dtypes"] == ["torch.float32"]
    assert encoder["difference"] < 0.05  # float16
    assert result["merged"] == ["llama", "llama"]
    assert result["merged_files"] == ["config.json"]
    assert result["bert_base_classifier"] == {"swapped": 2, "shape": [1, 5], "round_trip": True}
    assert result["llama_classifier"] == {"swapped": 4, "shape": [1, 5], "round_trip": True}


def test_adapters_and_full_fine_tuning(stranger: Results) -> None:
    result = stranger["training"]
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


def test_package_and_directory_code_in_one_process(packaged: Results) -> None:
    result = packaged["registered_twice"]
    assert not result["package_imported_before"]
    assert result["hooks"] == ["transformers_modules", "specdef_cli.model.configuration_specdef"]
    assert result["equal"] == [True, True, True]
    assert result["ours"] == [True, True]
    assert result["saved"] == [True, True]
    assert result["pickles"] == "llama"


def test_the_native_class_where_the_package_is_imported_first(
    run_scenarios: Callable[..., Results], poisoned: Path
) -> None:
    """That import brings neither torch nor transformers."""
    results = run_scenarios(package=True, lazy=poisoned, native_class=poisoned)
    assert results["lazy"] == {"heavy": [], "version": "0.1.0", "error": "specdef_cli.errors"}
    result = results["native_class"]
    assert result["difference"] < 1e-4
    assert result["again"] < 1e-4
    assert result["model_type"] == "llama"
    assert result["saved_model_type"] == "specdef"


def test_nothing_loads_without_the_code(stranger: Results) -> None:
    results = stranger["strangers"]
    assert len(results) > 20
    assert [name for name, raised in results.items() if not raised] == []
    # The right reason: code that was not trusted, or a tombstone where a weight belongs.
    for name, raised in results.items():
        explicit = "Auto" not in name and name.split()[-1] not in ("untrusted", "config", "pipeline")
        assert ("size" in raised or "shape" in raised) if explicit else "custom code" in raised, (name, raised)


def test_damaged_directories_name_what_is_wrong(stranger: Results) -> None:
    results = stranger["damaged"]
    for name, (*_, message) in DAMAGED.items():
        assert results[name].startswith("SpecDefLoadError"), (name, results[name])
        assert message in results[name], (name, results[name])
    assert "has shape [96, 32]" in results["ignored mismatch"]
    assert f"{DOWN}.compensation.weight was not loaded" in results["state dict"]
