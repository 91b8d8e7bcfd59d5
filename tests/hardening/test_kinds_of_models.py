"""Models of every kind of input, and what checkpoints really lack or hold twice: planned, verified, given back."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.commands import assert_refused, call_cli, succeed
from tests.hardening.mutations import Mutation, config, content, spoiled, tensor
from tests.tiny_families import CASES, write_case
from tests.tiny_kinds import BLOCKS, write_kind

OTHERS = ("wav2vec2", "wavlm", "ast", "whisper", "marian", "segformer", "vision and text", "bart classifier",
          "masked patches")  # fmt: skip
UNDESCRIBED = ("opt", "bloom", "cohere", "bart", "deepseek")
"""Text models of no family that the package describes."""


@pytest.mark.parametrize("name", [*OTHERS, *UNDESCRIBED])
def test_a_scaled_model_is_verified_and_given_back_whole(name: str, tmp_path: Path) -> None:
    base = write_kind(name, tmp_path / "base")
    command: tuple[str | Path, ...] = ("harden", base, "--method", "scale", "--out", tmp_path / "out", "--json")
    succeed(*command, "--dry-run")
    result = succeed(*command)
    assert json.loads(result.stdout)["manifest"]["verification"]["equal"]
    succeed("collapse", tmp_path / "out", "--out", tmp_path / "back", "--quiet")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if name in UNDESCRIBED:  # most parameters are among what was scaled
        scaled = load_file(tmp_path / "out" / "model.safetensors")
        same = [key for key in before if key in scaled and torch.equal(before[key], scaled[key])]
        assert sum(before[key].numel() for key in same) < 0.5 * sum(tensor.numel() for tensor in before.values())


@pytest.mark.parametrize("change", [torch.clone, lambda head: head + 1], ids=["same", "other"])
@pytest.mark.parametrize("method", ["fold", "scale"])
def test_a_head_that_is_stored_beside_a_tied_embedding_comes_back(
    method: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    base = write_case("llama-tied", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = change(weights["model.embed_tokens.weight"])
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    succeed("harden", base, "--method", method, "--out", tmp_path / "out", "--quiet")
    succeed("collapse", tmp_path / "out", "--out", tmp_path / "back", "--quiet")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(weights[key], back[key]) for key in weights)


@pytest.mark.parametrize(("case", "options"), [("vit", ()), ("mixtral", ()), ("gpt2", ("--top-k", "4"))])
def test_a_hardened_model_without_its_manifest_is_inspected(
    case: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    method = "factors" if options else "scale"
    base = write_case(case, tmp_path / "base")
    harden: tuple[str | Path, ...] = (
        "harden",
        base,
        "--method",
        method,
        *options,
        "--out",
        tmp_path / "out",
        "--quiet",
    )
    succeed(*harden, "--manifest-out", tmp_path / "keys.json")
    result = succeed("inspect", tmp_path / "out")
    assert "hardened, without a manifest" in " ".join(result.stdout.split())


OWN = "from transformers import LlamaForCausalLM as Base\nclass {name}(Base):\n    pass\n"


def add_short_head(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][:50].clone()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


CLAMPED = """from transformers import LlamaForCausalLM as Base
class LlamaForCausalLM(Base):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.clamp(-0.5, 0.5))
"""
REFUSED: dict[str, tuple[str, tuple[Mutation, ...], tuple[str, ...], tuple[str, ...]]] = {
    "an expert is missing": (
        "mixtral", (tensor("model.layers.0.block_sparse_moe.experts.3.w2.weight", None),), (),
        ("stacked from 4 tensors", "has 3"),
    ),
    "a head of another shape beside a tied embedding": (
        "llama-tied",
        (add_short_head,),
        (),
        ("lm_head.weight has shape [50, 32]", "[96, 32]"),
    ),
    "code of a known name": (
        "llama",
        (
            content("modeling_own.py", OWN.format(name="LlamaForCausalLM")),
            config(auto_map={"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}),
        ),
        (),
        ("LlamaForCausalLM", "--trust-remote-code", "auto_map"),
    ),
    "code beside another class": (
        "llama", (config(auto_map={"AutoModel": "modeling_own.OwnModel"}),), (), ("OwnModel", "auto_map"),
    ),
    "code that computes something else": (
        "llama",
        (
            content("modeling_own.py", CLAMPED),
            config(auto_map={"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}),
        ),
        ("--trust-remote-code",),
        ("differ from the base's", "--exclude"),
    ),
    "scales in a class of its own": (
        "llama",
        (
            content("modeling_own.py", OWN.format(name="OwnForCausalLM")),
            config(
                architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
            ),
        ),
        ("--method", "scale", "--trust-remote-code"),
        ("OwnForCausalLM", "Use --method fold"),
    ),
}  # fmt: skip


def test_code_that_changes_an_output_is_hardened_without_that_layer(tmp_path: Path) -> None:
    base = spoiled(
        write_case("llama", tmp_path / "base"),
        tmp_path,
        content("modeling_own.py", CLAMPED),
        config(auto_map={"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}),
    )
    command = ("harden", base, "--trust-remote-code", "--exclude", "*.up_proj", "--out", tmp_path / "out", "--json")
    assert json.loads(succeed(*command).stdout)["manifest"]["verification"]["equal"]


@pytest.mark.parametrize("case", REFUSED)
def test_the_dry_run_ends_as_the_run_does(case: str, tmp_path: Path) -> None:
    family, mutations, options, words = REFUSED[case]
    base = spoiled(write_case(family, tmp_path / "base"), tmp_path, *mutations)
    command: tuple[str | Path, ...] = ("harden", base, *options, "--out", tmp_path / "out", "--quiet")
    refused = call_cli(*command)
    assert_refused(refused, *words)
    assert call_cli(*command, "--dry-run") == refused
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "method"),
    # of experts, a run on the meta device writes into the config
    [*zip(list(CASES)[::8], cycle(["fold", "scale"]), strict=False), ("gpt-oss", "scale")],
)
def test_of_a_family_the_dry_run_ends_as_the_run_does(
    family: str, method: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    command: tuple[str | Path, ...] = (
        "harden", checkpoints[family], "--method", method, "--out", tmp_path / "out", "--quiet",
    )  # fmt: skip
    dry = call_cli(*command, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    run = call_cli(*command)
    assert (dry.code, dry.stderr) == (run.code, run.stderr)


@pytest.mark.parametrize("method", ["fold", "scale"])
def test_a_config_that_names_no_architecture_is_what_automodel_makes_of_it(method: str, tmp_path: Path) -> None:
    base, out, back = tmp_path / "base", tmp_path / "out", tmp_path / "back"
    sizes = {**BLOCKS, "vocab_size": 96, "num_key_value_heads": 2}
    transformers.LlamaModel(transformers.LlamaConfig(**sizes)).save_pretrained(base)
    config(architectures=None)(base)
    succeed("harden", base, "--method", method, "--out", out, "--quiet")
    assert json.loads((out / "specdef.json").read_text())["verification"]["equal"]
    succeed("collapse", out, "--out", back, "--quiet")
    expected, found = load_file(base / "model.safetensors"), load_file(back / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
