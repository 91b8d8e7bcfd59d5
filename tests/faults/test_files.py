"""Which files of a directory are its model, what becomes of the others, and directories that are something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from specdef_cli.model import load_model
from tests.commands import assert_refused, call_cli, snapshot, succeed
from tests.hardening.mutations import Mutation, content, edit_json, spoiled
from tests.tiny_models import forward

FOLD = ("--method", "fold")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def split(directory: Path, factor: float = 1.0) -> None:
    """Write the weights, times ``factor``, as two shards with an index, beside the single file."""
    tensors = load_file(directory / SINGLE)
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (2 * i // len(names))}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: (tensors[name] * factor).contiguous() for name in names if weight_map[name] == shard}
        save_file(part, directory / shard, {"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def without_single(directory: Path) -> None:
    split(directory)
    (directory / SINGLE).unlink()


def without_shards(directory: Path) -> None:
    split(directory)
    for shard in directory.glob("model-*.safetensors"):
        shard.unlink()


LAYOUTS: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "shards of other weights beside a single file": (lambda d: split(d, 1.5), (INDEX, "model-00001-of-00002")),
    "an index whose shards are gone": (without_shards, (INDEX,)),
    "an index that is broken beside a single file": (content(INDEX, "{"), (INDEX,)),
    "shards alone": (without_single, ()),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_weights_are_those_that_transformers_loads(case: str, llama: Path, tmp_path: Path) -> None:
    mutation, named = LAYOUTS[case]
    directory, out = spoiled(llama, tmp_path, mutation), tmp_path / "out"
    result = succeed("harden", directory, "--out", out, *FOLD, "--no-verify")
    for word in named:
        assert word in result.stderr, result.stderr
    base = LlamaForCausalLM.from_pretrained(directory, dtype="auto").eval()
    assert torch.equal(forward(load_model(out)), forward(base))
    assert call_cli("harden", directory, "--dry-run", *FOLD).stderr == result.stderr


def sentence_transformer(directory: Path) -> None:
    """The files around a transformer with a dense layer after it, as sentence-transformers saves them."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(12, 32)}, directory / "2_Dense" / SINGLE)


def in_many_formats(directory: Path) -> None:
    for name in ("pytorch_model.bin", "onnx/model.onnx", "model.Q8_0.gguf", "optimizer.pt", "tf_model.h5"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"x")
    (directory / "onnx" / "config.json").write_text("{}")


def copied_below(directory: Path) -> None:
    (directory / "original").mkdir()
    shutil.copyfile(directory / SINGLE, directory / "original" / SINGLE)


def under_other_names(directory: Path) -> None:
    tensors = {f"layers.{number}": tensor for number, tensor in enumerate(load_file(directory / SINGLE).values())}
    save_file(tensors, directory / "consolidated.safetensors")


def in_unknown_kinds(directory: Path) -> None:
    data = (directory / SINGLE).read_bytes()
    for name in ("rust_model.ot", "saved_model/variables.data-00000-of-00001", "model.safetensors.bak",
                 "onnx/model.onnx.data"):  # fmt: skip
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "images").mkdir()
    for name, data in {"tokenizer.model": b"\n\0", "LICENSE": "© 2026".encode("cp1252"), "images/a.png": b"\0",
                          "chat_template.jinja": b"{{ x }}", "code.py": b""}.items():  # fmt: skip
        (directory / name).write_bytes(data)


def adapter_below(directory: Path) -> None:
    (directory / "lora").mkdir()
    (directory / "lora" / "adapter_config.json").write_text("{}")
    save_file({"base_model.x": torch.ones(2, 2)}, directory / "lora" / "adapter_model.safetensors")


def linked(directory: Path) -> None:
    (directory / "assets").mkdir()
    (directory / "assets" / "a.txt").write_text("a")
    (directory / "alias").symlink_to("assets")
    (directory / "gone.txt").symlink_to("nowhere")


# What is added → files that are carried over, and files that are named as left out.
COMPANIONS: dict[str, tuple[Mutation, set[str], set[str]]] = {
    "modules of sentence-transformers": (
        sentence_transformer,
        {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"},
        set(),
    ),
    "other formats": (
        in_many_formats,
        {"onnx/config.json"},
        {"pytorch_model.bin", "onnx/model.onnx", "model.Q8_0.gguf", "optimizer.pt", "tf_model.h5"},
    ),
    "kinds that nobody knows": (
        in_unknown_kinds,
        {"tokenizer.model", "LICENSE", "images/a.png", "chat_template.jinja", "code.py"},
        {"rust_model.ot", "saved_model/variables.data-00000-of-00001", "model.safetensors.bak", "onnx/model.onnx.data"},
    ),
    "a copy of the model below": (copied_below, set(), {"original/model.safetensors"}),
    "a copy under other names": (under_other_names, set(), {"consolidated.safetensors"}),
    "an adapter below": (adapter_below, set(), {"lora/adapter_config.json", "lora/adapter_model.safetensors"}),
    "links": (linked, {"assets/a.txt"}, {"alias", "gone.txt"}),
    "hidden files": (content(".env", "SECRET=1"), set(), {".env"}),
    "weights of another part": (
        lambda d: save_file({"projector.weight": torch.ones(7, 5)}, d / "projector.safetensors"),
        {"projector.safetensors"},
        set(),
    ),
}


@pytest.mark.parametrize("case", COMPANIONS)
def test_every_file_is_carried_over_or_named(case: str, llama: Path, tmp_path: Path) -> None:
    mutation, carried, named = COMPANIONS[case]
    directory, out, back = spoiled(llama, tmp_path, mutation), tmp_path / "out", tmp_path / "back"
    result = succeed("harden", directory, "--out", out, *FOLD)
    before, after = snapshot(directory), snapshot(out)
    assert {name: before[name] for name in carried} == {name: after.get(name) for name in carried}
    for name in named:
        assert name in result.stderr
        assert name not in after
    said = result.stderr
    assert all(name in after or name in said or name == "README.md" for name in before)
    succeed("collapse", out, "--out", back, "--quiet")
    assert {name: snapshot(back).get(name) for name in carried} == {name: before[name] for name in carried}


def test_a_module_that_is_only_pickled_is_refused(llama: Path, tmp_path: Path) -> None:
    directory = spoiled(llama, tmp_path, sentence_transformer)
    (directory / "2_Dense" / SINGLE).rename(directory / "2_Dense" / "pytorch_model.bin")
    command = ("harden", directory, "--out", tmp_path / "out", *FOLD)
    assert_refused(call_cli(*command), "2_Dense", "Dense", "save_pretrained")
    (directory / "2_Dense" / "pytorch_model.bin").unlink()  # as from the Hub, where pickles are not downloaded
    assert_refused(call_cli(*command), "2_Dense", "Dense", "save_pretrained")


# --- directories that are something else -----------------------------------------------------------------------------


def emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def holding(name: str, text: str = "{}") -> Mutation:
    def apply(directory: Path) -> None:
        emptied(directory)
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)

    return apply


def moved_below(*parts: str) -> Mutation:
    """The model lies in a directory below."""

    def apply(directory: Path) -> None:
        elsewhere = directory.rename(directory.parent / "moved")
        target = directory.joinpath(*parts)
        target.parent.mkdir(parents=True)
        elsewhere.rename(target)

    return apply


def checkpoints(directory: Path) -> None:
    moved_below("checkpoint-90")(directory)
    shutil.copytree(directory / "checkpoint-90", directory / "checkpoint-1000")


def adapter_beside(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")
    save_file({"base_model.x": torch.ones(2, 2)}, directory / "adapter_model.safetensors")


ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
ELSE: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "an adapter": (holding("adapter_config.json", ADAPTER), ("adapter of PEFT for org/base", "merge_and_unload")),
    "an adapter without a base": (holding("adapter_config.json", "["), ("adapter of PEFT", "merge_and_unload")),
    "a model with an adapter": (adapter_beside, ("adapter", "loads both", "Move adapter_config.json")),
    "shards without an index": (
        lambda d: without_single(d) or (d / INDEX).unlink(),
        ("model-00001-of-00002.safetensors", INDEX, "Fetch"),
    ),
    "another file name": (
        lambda d: (d / SINGLE).rename(d / "weights.safetensors") and None,
        ("weights.safetensors", "rename it to model.safetensors"),
    ),
    "weights named in config.json": (
        edit_json("config.json", transformers_weights="other.safetensors"),
        ("'other.safetensors'", "transformers_weights"),
    ),
    "GGUF alone": (holding("m.gguf"), ("llama.cpp", "m.gguf", "GgufConfig(dequantize=True)")),
    "GGUF and a config": (
        lambda d: (d / SINGLE).rename(d / "m.gguf") and None, ("llama.cpp", "GgufConfig(dequantize=True)"),
    ),
    "a pipeline of diffusers": (holding("model_index.json"), ("pipeline of diffusers", "denoiser")),
    "sentence-transformers, the transformer below": (
        lambda d: moved_below("0_Transformer")(d) or ((d / "modules.json").write_text("[]") and None),
        ("sentence-transformers", "0_Transformer"),
    ),
    "sentence-transformers without a transformer": (holding("modules.json", "[]"), ("without a transformer",)),
    "an attack's output": (holding("report.json"), ("specdef attack", "attacked")),
    "a certificate": (holding("certificate.json"), ("specdef certify",)),
    "the Hub's cache": (moved_below("snapshots", "abc"), ("Hub's cache", "snapshots/abc")),
    "a data set": (holding("dataset_info.json"), ("data set", "--dataset")),
    "DeepSpeed": (holding("zero_to_fp32.py"), ("DeepSpeed", "save_pretrained")),
    "the authors' own format": (holding("params.json"), ("params.json", "transformers loads")),
    "a directory above": (moved_below("inner"), ("it holds a directory", "inner")),
    "training checkpoints": (checkpoints, ("checkpoint-1000",)),
    "empty": (emptied, ("it is empty",)),
    "one JSON file": (holding("tokenizer.json"), ("no config.json",)),
}  # fmt: skip
COMMANDS: dict[str, Callable[[Path, Path], tuple[Any, ...]]] = {
    "harden": lambda model, out: ("harden", model, "--out", out, *FOLD, "--quiet"),
    "inspect": lambda model, out: ("inspect", model, "--quiet"),
    "attack": lambda model, out: ("attack", model, "--control", model, "--out", out, "--quiet"),
}


@pytest.mark.parametrize("case", ELSE)
def test_a_directory_that_is_something_else_is_called_by_its_name(case: str, llama: Path, tmp_path: Path) -> None:
    mutation, words = ELSE[case]
    directory = spoiled(llama, tmp_path, mutation)
    before = snapshot(tmp_path)
    for command in COMMANDS.values():
        assert_refused(call_cli(*command(directory, tmp_path / "out")), *words)
    assert snapshot(tmp_path) == before
