"""Hardened directories in fresh processes: they load everywhere they should, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hardening.mutations import edit_config, edit_tensors

Results = dict[str, str]


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
def ended(
    run_scenarios: Callable[..., Results], directories: Path, poisoned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """How each scenario ended. Without the package, first what may not load: then the directories' code has been run.

    The second process has loaded a directory by its own code when it imports the package; the third imports it first.
    """
    work = tmp_path_factory.mktemp("damaged")
    for name, (family, auto, damage, message) in DAMAGED.items():
        at = shutil.copytree(directories / family, work / "damaged" / name)
        damage(at)
        (at / "expected.json").write_text(json.dumps([auto, message]))
    trusted = dict.fromkeys(("remote_code", "usage", "training", "damaged"), directories)
    return {
        **run_scenarios(package=False, work=work, without_package=work, strangers=poisoned, **trusted),
        **run_scenarios(package=True, registered_twice=directories, package_alone=poisoned),
        **run_scenarios(package=True, native_class=poisoned),
    }


@pytest.mark.parametrize(
    "scenario",
    [
        *("strangers", "remote_code", "usage", "training", "damaged"),
        *("registered_twice", "package_alone", "native_class"),
    ],
)
def test_hardened_directories_in_fresh_processes(scenario: str, ended: Results) -> None:
    assert ended[scenario] == ""
