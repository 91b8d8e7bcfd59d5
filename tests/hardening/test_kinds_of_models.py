"""Models of every kind of input, and what checkpoints really lack or hold twice: planned, verified, given back."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.commands import assert_refused, call_cli, succeed
from tests.hardened import given_back
from tests.hardening.mutations import Mutation, config, content, edit_tensors, spoiled, tensor
from tests.tiny_families import CASES, write_case
from tests.tiny_kinds import BLOCKS, write_kind
from tests.weights import tensors

OTHERS = ("wav2vec2", "wavlm", "ast", "whisper", "marian", "segformer", "vision and text", "bart classifier",
          "masked patches")  # fmt: skip
UNDESCRIBED = ("opt", "bloom", "cohere", "bart", "deepseek")
"""Text models of no family that the package describes."""


@pytest.mark.parametrize("name", [*OTHERS, *UNDESCRIBED])
def test_a_scaled_model_is_verified_and_given_back_whole(name: str, tmp_path: Path) -> None:
    base = write_kind(name, tmp_path / "base")
    succeed("harden", base, "--method", "scale", "--out", tmp_path / "out", "--dry-run")
    given_back(base, tmp_path, "scale")
    if name in UNDESCRIBED:  # most parameters are among what was scaled
        before, scaled = tensors(base), tensors(tmp_path / "out")
        same = [key for key in before if key in scaled and torch.equal(before[key], scaled[key])]
        assert sum(before[key].numel() for key in same) < 0.5 * sum(tensor.numel() for tensor in before.values())


@pytest.mark.parametrize("change", [torch.clone, lambda head: head + 1], ids=["same", "other"])
@pytest.mark.parametrize("method", ["fold", "scale"])
def test_a_head_that_is_stored_beside_a_tied_embedding_comes_back(
    method: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    base = write_case("llama-tied", tmp_path / "base")
    edit_tensors(base, lambda t: t.update({"lm_head.weight": change(t["model.embed_tokens.weight"])}))
    given_back(base, tmp_path, method)


@pytest.mark.parametrize(("case", "options"), [("vit", ()), ("mixtral", ()), ("gpt2", ("--top-k", "4"))])
def test_a_hardened_model_without_manifest_is_inspected(case: str, options: tuple[str, ...], tmp_path: Path) -> None:
    base = write_case(case, tmp_path / "base")
    places = ("--out", tmp_path / "out", "--manifest-out", tmp_path / "keys.json")
    succeed("harden", base, "--method", "factors" if options else "scale", *options, *places, "--quiet")
    result = succeed("inspect", tmp_path / "out")
    assert "hardened, without a manifest" in " ".join(result.stdout.split())


OWN = "from transformers import LlamaForCausalLM as Base\nclass {name}(Base):\n    pass\n"


def code(source: str, name: str = "LlamaForCausalLM", **changes: Any) -> tuple[Mutation, Mutation]:
    """A directory that brings the code of its class."""
    auto_map = {"AutoModelForCausalLM": f"modeling_own.{name}"}
    return content("modeling_own.py", source), config(auto_map=auto_map, **changes)


def add_short_head(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"][:50].clone()}))


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
        "llama-tied", (add_short_head,), (), ("lm_head.weight has shape [50, 32]", "[96, 32]"),
    ),
    "code of a known name": (
        "llama", code(OWN.format(name="LlamaForCausalLM")), (), ("LlamaForCausalLM", "--trust-remote-code", "auto_map"),
    ),
    "code beside another class": (
        "llama", (config(auto_map={"AutoModel": "modeling_own.OwnModel"}),), (), ("OwnModel", "auto_map"),
    ),
    "code that computes something else": (
        "llama", code(CLAMPED), ("--trust-remote-code",), ("differ from the base's", "--exclude"),
    ),
    "scales in a class of its own": (
        "llama", code(OWN.format(name="OwnForCausalLM"), "OwnForCausalLM", architectures=["OwnForCausalLM"]),
        ("--method", "scale", "--trust-remote-code"), ("OwnForCausalLM", "Use --method fold"),
    ),
}  # fmt: skip


def test_code_that_changes_an_output_is_hardened_without_that_layer(tmp_path: Path) -> None:
    base = spoiled(write_case("llama", tmp_path / "base"), tmp_path, *code(CLAMPED))
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
def test_a_family_s_dry_run_ends_as_its_run(
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
    base = tmp_path / "base"
    sizes = {**BLOCKS, "vocab_size": 96, "num_key_value_heads": 2}
    transformers.LlamaModel(transformers.LlamaConfig(**sizes)).save_pretrained(base)
    config(architectures=None)(base)
    given_back(base, tmp_path, method)
