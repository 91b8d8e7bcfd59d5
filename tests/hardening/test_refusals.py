"""What cannot be hardened is refused in one line with one hint, and leaves nothing behind, hidden or not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

from specdef_cli.hardening import factors
from specdef_cli.spectral.factors import Factors
from tests.commands import assert_refused, call_cli, snapshot, succeed
from tests.hardening.mutations import (
    DOWN,
    GIT_LFS,
    REMOVED,
    Mutation,
    config,
    content,
    edit_json,
    element,
    file_in_place_of,
    raw_bytes,
    spoiled,
    tensor,
)

TinyModel = Callable[..., Path]


INPUTS: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    # weights
    "NaN": (tensor(DOWN, element(math.nan)), (DOWN, "NaN", "--exclude")),
    "infinity": (tensor(DOWN, element(-math.inf)), (DOWN, "infinity", "--exclude")),
    "zero": (tensor(DOWN, torch.zeros_like), (DOWN, "zero", "--exclude")),
    "NaN elsewhere": (tensor("model.norm.weight", element(math.nan)), ("NaN or infinity before any change",)),
    "another shape": (tensor(DOWN, lambda weight: weight.mT), (DOWN, "[48, 32]", "[32, 48]", "config.json")),
    "fp8": (tensor(DOWN, lambda weight: weight.to(torch.float8_e4m3fn)), (DOWN, "F8_E4M3", "unquantized")),
    "int8": (tensor(DOWN, lambda weight: weight.to(torch.int8)), (DOWN, "I8", "unquantized")),
    "int8 in what is not hardened": (
        tensor("lm_head.weight", lambda weight: weight.to(torch.int8)),
        ("lm_head.weight", "I8", "unquantized"),
    ),
    "a missing layer": (tensor(DOWN, None), (DOWN, "no tensor of the checkpoint")),
    # config.json
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantized (gptq)", "unquantized")),
    "an odd quantization_config": (config(quantization_config="fp8"), ("quantized (fp8)", "unquantized")),
    "a quantized part": (config(text_config={"quantization_config": {"quant_method": "fp8"}}), ("quantized (fp8)",)),
    "an empty quantization_config": (config(quantization_config={}), ("empty quantization_config", "Remove that key")),
    "a wider model": (config(hidden_size=64), ("[96, 32]", "[96, 64]", "config.json")),
    "more layers": (config(num_hidden_layers=3), ("model.layers.2.", "no tensor of the checkpoint")),
    "heads that do not divide": (config(num_attention_heads=3), ("config.json", "hidden size (32)")),
    "no heads": (config(num_attention_heads=0), ("config.json",)),
    "a size as text": (config(hidden_size="32"), ("config.json", "hidden_size")),
    "a negative size": (config(intermediate_size=-1), ("config.json",)),
    "an unknown model_type": (config(model_type="nonsense"), ("nonsense", "model_type")),
    "no model_type": (config(model_type=REMOVED), ("model_type",)),
    "an unknown architecture": (config(architectures=["NopeForCausalLM"]), ("NopeForCausalLM",)),
    "an unknown activation": (config(hidden_act="nope"), ("nope",)),
    # files; tests/checkpoint/test_reader.py has the others
    "truncated": (raw_bytes(lambda data: data[: len(data) // 2]), ("model.safetensors",)),
    "hardened already": (content("specdef.json", "{}"), ("hardened already", "specdef collapse")),
    "a shim's config": (config(model_type="specdef"), ("hardened already",)),
    "code of its own": (
        config(model_type="own", auto_map={"AutoConfig": "evil.C"}),
        ("Python code", "--trust-remote-code"),
    ),
    # odd values
    "no vocab_size": (edit_json("config.json", vocab_size=REMOVED), ("config.json",)),
    "a vocabulary with a fraction": (config(vocab_size=96.5), ("vocab_size",)),
    "a tie in words": (config(tie_word_embeddings="false"), ("tie_word_embeddings",)),
    "positions of an unknown kind": (config(rope_scaling={"type": "nonsense"}), ("config.json",)),
    "positions without their factor": (config(rope_parameters={"rope_type": "linear"}), ("factor",)),
    "a model of another in it": (config(text_config={"hidden_size": 32}), ("config.json",)),
    "quantized by a list": (config(quantization_config=[1]), ("quantized",)),
    "heads of an odd width": (config(head_dim=7), ("head_dim",)),
    "a billion layers": (config(num_hidden_layers=10**9), ("num_hidden_layers 1000000000",)),
    "hidden beyond any memory": (config(hidden_size=10**12), ("1000000000000",)),
    "an epsilon in words": (config(rms_norm_eps="1e-6"), ("rms_norm_eps",)),
    "padding beyond the vocabulary": (config(pad_token_id=1000), ("config.json",)),
    "classes of no number": (config(id2label={"a": "b"}), ("config.json",)),
    "a cache in words": (config(use_cache="yes"), ("use_cache",)),
    "biases that are not there": (config(attention_bias=True), ("bias",)),
    "an architecture with an escape": (config(architectures=["Ll\x1b[31mama"]), ("x1b[31m",)),
    "config.json a directory": (file_in_place_of("config.json"), ("no config.json",)),
    "the weights a directory": (file_in_place_of("model.safetensors"), ("model.safetensors",)),
    "a config with a byte order mark": (content("config.json", b"\xef\xbb\xbf{}"), ("BOM",)),
    "an unknown dtype": (config(dtype="float12"), ("float12",)),
    "a dtype of numbers": (config(dtype=16), ("cannot be built from this config.json",)),
    "a dtype of eight bits": (config(dtype="float8_e4m3fn"), ("Float8_e4m3fn",)),
    "an architecture in words": (config(architectures="LlamaForCausalLM"), ("no class 'L'",)),
    "an architecture of another family": (
        config(architectures=["GPT2LMHeadModel"]),
        ("GPT2LMHeadModel cannot be built",),
    ),
    "weights cloned without Git LFS": (content("model.safetensors", GIT_LFS), ("git lfs pull",)),
    "a config cloned without Git LFS": (content("config.json", GIT_LFS), ("git lfs pull",)),
    "weights with a scalar": (tensor("model.norm.weight", lambda weight: weight[0]), ("model.norm.weight",)),
    "an attention kernel that is not here": (config(attn_implementation="flash_attention_2"), ("flash_attention_2",)),
    "an attention kernel of no name": (config(attn_implementation="nonsense"), ("attn_implementation",)),
    "an attention kernel of the Hub": (config(_attn_implementation="kernels-community/x"), ("kernels-community/x",)),
}


@pytest.mark.parametrize("case", INPUTS)
def test_input(case: str, llama: Path, tmp_path: Path, outside: Path) -> None:
    mutation, words = INPUTS[case]
    directory = spoiled(llama, tmp_path, mutation, content("evil.py", "raise SystemExit('code was run')"))
    before = snapshot(directory)
    command = ("harden", directory, "--out", outside / "out", "--method", "factors", "--top-k", "4", "--quiet")
    result = call_cli(*command)
    assert_refused(result, *words, empty=outside)
    assert call_cli(*command, "--dry-run") == result
    assert "code was run" not in result.stderr
    assert snapshot(directory) == before


OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpha 0": (("--alpha", "0"), ("--alpha 0.0 is not a number of at least 1",)),
    "alpha negative": (("--alpha", "-2"), ("--alpha -2.0",)),
    "alpha below 1": (("--alpha", "0.5"), ("--alpha 0.5",)),
    "alpha NaN": (("--alpha", "nan"), ("--alpha nan",)),
    "alpha infinite": (("--alpha", "inf"), ("--alpha inf",)),
    "alpha 1e40": (("--alpha", "1e40"), ("1e+40", "float32", "--alpha")),
    "symmetric in bfloat16": (
        ("--dtype", "bfloat16", "--gauge", "symmetric"),
        ("10000", "bfloat16", "symmetric", "--alpha 2 or less", "--gauge rotated"),
    ),
    "float16": (("--dtype", "float16"), ("10000", "float16", "--alpha 100 or less", "--dtype bfloat16")),
    "top-k 0": (("--top-k", "0"), ("--top-k 0 is not a whole number of at least 1",)),
    "top-k beyond the rank": (("--top-k", "33"), ("top-k 33", "o_proj", "32×32", "--top-k 32 or less")),
    "a glob without a match": (("--layers", "*.qkv"), ("'*.qkv' matches no linear layer", "specdef inspect")),
    "an exclusion without a match": (("--exclude", "*.qkv"), ("'*.qkv' matches no linear layer",)),
    "nothing left": (("--layers", "*.o_proj", "--exclude", "*"), ("no linear layer is left",)),
    "a device": (("--device", "quantum"), ("'quantum'", "--device cpu")),
    "a device in a dry run": (("--device", "quantum", "--dry-run"), ("'quantum'", "--device cpu")),
    "a GPU that is not there": (("--device", "cuda:99"), ("'cuda:99'", "--device cpu")),
    "a fold in float16": (("--method", "fold", "--dtype", "float16"), ("float16", "--dtype bfloat16")),
    "pairs without a match": (("--method", "fold", "--layers", "*.qkv"), ("'*.qkv' matches no tensor of a symmetric",)),
    "pairs excluded in vain": (
        ("--method", "fold", "--exclude", "*.qkv"), ("'*.qkv' matches no tensor of a symmetric pair",),
    ),
    "no pair left": (("--method", "fold", "--exclude", "*"), ("no symmetric pair to fold", "--exclude")),
    "scales in float16": (("--method", "scale", "--dtype", "float16"), ("float16", "--dtype bfloat16")),
    "modules without a match": (
        ("--method", "scale", "--layers", "nothing"), ("'nothing' matches no", "specdef inspect"),
    ),
    "a size": (("--max-shard-size", "5 parsecs"), ("'5 parsecs'", "5GB")),
}  # fmt: skip


# Wrong by themselves, whatever the model: exit code 2.
USAGE = {case for case in OPTIONS if case.startswith(("alpha 0", "alpha neg", "alpha bel", "alpha NaN", "alpha inf"))}
USAGE |= {"top-k 0", "a device", "a device in a dry run", "a size"}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, llama: Path, outside: Path) -> None:
    arguments, words = OPTIONS[case]
    top_k = () if {"--top-k", "--method"} & {*arguments} else ("--top-k", "4")
    method = () if "--method" in arguments else ("--method", "factors")
    result = call_cli("harden", llama, "--out", outside / "out", *method, "--quiet", *top_k, *arguments)
    assert_refused(result, *words, empty=outside, code=2 if case in USAGE else 1)


def test_the_alpha_that_is_advised_for_a_layer_is_accepted(llama: Path, outside: Path) -> None:
    # Within the dtype's rough limit, but not within this layer's own: its spectrum decays.
    directory = spoiled(llama, outside.parent, tensor(DOWN, decaying))
    arguments = ("harden", directory, "--method", "factors", "--gauge", "symmetric", "--top-k", "8", "--quiet")
    refused = call_cli(*arguments, "--alpha", "1e5", "--out", outside / "out")
    assert_refused(refused, "mlp.down_proj", "100000", "--alpha", empty=outside)
    advised = refused.stderr.split("--alpha ")[1].split()[0]
    succeed(*arguments, "--alpha", advised, "--out", outside / "out")


DATA_DEPENDENT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[str, ...]]] = {
    "a fold that would round": (lambda weight: weight * 1e-33, ("--method", "fold")),
    "a fold that would overflow": (lambda weight: weight * 1e36, ("--method", "fold", "--layers", "*.down_proj")),
    "one row of tiny numbers": (lambda weight: weight.index_fill(0, torch.tensor([7]), 1e-37), ("--method", "fold")),
}


@pytest.mark.parametrize("case", DATA_DEPENDENT)
def test_a_dry_run_refuses_what_the_run_refuses(case: str, llama: Path, tmp_path: Path, outside: Path) -> None:
    """Even where only the weights themselves tell."""
    change, arguments = DATA_DEPENDENT[case]
    directory = spoiled(llama, tmp_path, tensor(DOWN, change))
    command: tuple[str | Path, ...] = ("harden", directory, "--out", outside / "out", "--quiet", *arguments)
    refused = call_cli(*command)
    assert_refused(refused, "layers.0.mlp.down_proj", empty=outside)
    assert call_cli(*command, "--dry-run") == refused


def decaying(weight: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((left * torch.arange(1, 33) ** -2.0) @ right).float()


def test_weights_of_low_rank_are_hardened(llama: Path, tmp_path: Path) -> None:
    """A rank below k is no error: the surplus directions are inflated zeros, and the product is the weight."""
    directory = spoiled(llama, tmp_path, tensor(DOWN, lambda weight: weight[:, :1] @ weight[:1]))
    result = succeed("harden", directory, "--out", tmp_path / "out", "--method", "factors", "--top-k", "8", "--json")
    assert json.loads(result.stdout)["manifest"]["verification"]["relative"] < 1e-5


@pytest.mark.parametrize("shape", [(1, 32), (32, 1)])
def test_layers_of_one_row_or_column(shape: tuple[int, int], llama: Path, tmp_path: Path) -> None:
    # An MLP of width 1: up_proj is 1×32 and down_proj is 32×1.
    directory = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig.from_pretrained(llama, intermediate_size=1)).save_pretrained(directory)
    glob = "*.up_proj" if shape[0] == 1 else "*.down_proj"
    arguments = ("harden", directory, "--out", tmp_path / "out", "--method", "factors", "--layers", glob, "--json")
    assert_refused(call_cli(*arguments, "--top-k", "2"), "top-k 2", f"{shape[0]}×{shape[1]}", "--top-k 1 or less")
    result = succeed(*arguments, "--top-k", "1")
    layer = json.loads(result.stdout)["manifest"]["factored"][0]
    assert (layer["out_features"], layer["in_features"]) == shape
    assert layer["reconstruction_error"] < 1e-5


def test_a_disk_too_small_is_refused_before_any_work(
    llama: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = call_cli("harden", llama, "--out", outside / "new" / "out", "--quiet")
    assert_refused(result, "the output needs", str(outside), "Free some space", empty=outside)


def test_a_corrupted_factor_is_never_published(llama: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own check and the comparison of the models each catch what the other does not see."""
    build = factors.rotated_factors

    def corrupt(weight: torch.Tensor, basis: torch.Tensor, alpha: float, dtype: torch.dtype) -> Factors:
        factors = build(weight, basis, alpha, dtype)
        factors.compensation[0, -1] += 1
        return factors

    arguments = ("harden", llama, "--out", outside / "out", "--method", "factors", "--top-k", "4", "--quiet")
    monkeypatch.setattr(factors, "rotated_factors", corrupt)
    assert_refused(call_cli(*arguments), "model.layers.", "relative error", empty=outside)  # whichever layer is first
    monkeypatch.setattr(factors.FactorLayer, "_require_restored", lambda self, error: None)
    assert_refused(call_cli(*arguments), "the hardened model's outputs differ from the base's", empty=outside)
    succeed(*arguments, "--no-verify")


@pytest.fixture(scope="module")
def hardened(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hardened") / "out"
    succeed(*("harden", tiny_model("bert"), "--out", out, "--method", "factors", "--top-k", "4", "--no-verify"))
    return out


INFLATED = "bert.encoder.layer.0.output.dense.inflated.weight"
COMPENSATION = "bert.encoder.layer.0.output.dense.compensation"
HARDENED: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "W~ missing": (tensor(INFLATED, None), (INFLATED, "missing")),
    "C missing": (tensor(f"{COMPENSATION}.weight", None), (COMPENSATION, "missing")),
    "bias missing": (tensor(f"{COMPENSATION}.bias", None), (f"{COMPENSATION}.bias", "missing")),
    "W~ of another shape": (tensor(INFLATED, lambda weight: weight[:, :5]), (INFLATED, "[32, 5]", "specdef.json")),
    "W~ in int8": (tensor(INFLATED, lambda weight: weight.to(torch.int8)), (INFLATED, "I8", "specdef.json")),
    "no manifest": (lambda directory: (directory / "specdef.json").unlink(), ("specdef.json", "specdef harden")),
    "manifest not JSON": (content("specdef.json", "{"), ("specdef.json", "not a valid manifest")),
    "manifest of the future": (edit_json("specdef.json", format=99), ("format 99", "Install")),
    "truncated": (raw_bytes(lambda data: data[:-5]), ("model.safetensors",)),
}


@pytest.mark.parametrize("case", HARDENED)
def test_collapse_of_a_damaged_directory(case: str, hardened: Path, tmp_path: Path, outside: Path) -> None:
    mutation, words = HARDENED[case]
    directory = spoiled(hardened, tmp_path, mutation)
    assert_refused(call_cli("collapse", directory, "--out", outside / "out"), *words, empty=outside)


@pytest.mark.parametrize("case", ["W~ missing", "manifest not JSON", "manifest of the future", "truncated"])
def test_inspect_of_a_damaged_directory(case: str, hardened: Path, tmp_path: Path) -> None:
    mutation, words = HARDENED[case]
    assert_refused(call_cli("inspect", spoiled(hardened, tmp_path, mutation)), *words)


def test_inspect_refuses_a_device_and_nan(llama: Path, tmp_path: Path) -> None:
    assert_refused(call_cli("inspect", llama, "--device", "quantum"), "'quantum'", code=2)
    spoilt = spoiled(llama, tmp_path, tensor(DOWN, element(math.nan)))
    assert_refused(call_cli("inspect", spoilt, "--layers"), DOWN, "NaN")


def test_resume_with_other_options_is_refused(llama: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("harden", llama, "--out", outside / "out", "--method", "factors", "--quiet", "--max-shard-size")

    def full(source: Any, target: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert_refused(call_cli(*arguments, "41KB", "--top-k", "4"), "No space left on device", "--resume")
    monkeypatch.undo()
    kept = snapshot(outside)
    assert len(kept) > 3
    for other in (("41KB", "--top-k", "5"), ("41KB", "--top-k", "4", "--seed", "1"), ("41.4KB", "--top-k", "4")):
        # The last makes as many shards under the same names, but with other tensors in them.
        assert_refused(call_cli(*arguments, *other, "--resume"), "other options")
        assert snapshot(outside) == kept
    succeed(*arguments, "41KB", "--top-k", "4", "--resume")


@pytest.mark.parametrize("method", ["fold", "scale", "factors"])
def test_a_model_of_convolutions_is_not_sent_from_one_method_to_the_other(method: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "base")
    refused = call_cli("harden", tmp_path / "base", "--method", method, "--out", tmp_path / "out")
    assert_refused(refused, "hint: Harden a model that has an embedding, or linear layers below its head.")
    assert not (tmp_path / "out").exists()
