"""Which files of a directory are its model, what becomes of the others, and directories that are something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
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


def added(files: Mapping[str, bytes | str]) -> Mutation:
    """Files of this content beside those of the model, or below."""

    def apply(directory: Path) -> None:
        for name, data in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            content(name, data)(directory)

    return apply


MODULES = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Dense", "Dense")]
DENSE = f"2_Dense/{SINGLE}"
# The files around a transformer with a dense layer after it, as sentence-transformers saves them.
SENTENCES: dict[str, bytes | str] = {
    "modules.json": json.dumps(
        [{"idx": int(n), "name": n, "path": path, "type": f"sentence_transformers.models.{kind}"}
         for n, path, kind in MODULES]
    ),
    "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}", DENSE: save({"linear.weight": torch.ones(12, 32)}),
}  # fmt: skip
OTHER_FORMATS = ("pytorch_model.bin", "onnx/model.onnx", "model.Q8_0.gguf", "optimizer.pt", "tf_model.h5")
UNKNOWN = (
    "rust_model.ot",
    "saved_model/variables.data-00000-of-00001",
    "model.safetensors.bak",
    "onnx/model.onnx.data",
)
NO_WEIGHTS: dict[str, bytes | str] = {
    "tokenizer.model": b"\n\0", "LICENSE": "© 2026".encode("cp1252"), "images/a.png": b"\0",
    "chat_template.jinja": b"{{ x }}", "code.py": b"",
}  # fmt: skip
ADAPTER: dict[str, bytes | str] = {
    "adapter_config.json": "{}", "adapter_model.safetensors": save({"base_model.x": torch.ones(2, 2)}),
}  # fmt: skip


def under_other_names(directory: Path) -> None:
    tensors = {f"layers.{number}": tensor for number, tensor in enumerate(load_file(directory / SINGLE).values())}
    save_file(tensors, directory / "consolidated.safetensors")


def linked(directory: Path) -> None:
    added({"assets/a.txt": "a"})(directory)
    (directory / "alias").symlink_to("assets")
    (directory / "gone.txt").symlink_to("nowhere")


# What is added → files that are carried over, and files that are named as left out.
COMPANIONS: dict[str, tuple[Mutation, Iterable[str], Iterable[str]]] = {
    "modules of sentence-transformers": (added(SENTENCES), SENTENCES, ()),
    "other formats": (
        added({**dict.fromkeys(OTHER_FORMATS, b"x"), "onnx/config.json": "{}"}), ["onnx/config.json"], OTHER_FORMATS,
    ),
    "kinds that nobody knows": (
        lambda d: added({**dict.fromkeys(UNKNOWN, (d / SINGLE).read_bytes()), **NO_WEIGHTS})(d), NO_WEIGHTS, UNKNOWN,
    ),
    "a copy of the model below": (
        lambda d: added({f"original/{SINGLE}": (d / SINGLE).read_bytes()})(d), (), [f"original/{SINGLE}"],
    ),
    "a copy under other names": (under_other_names, (), ["consolidated.safetensors"]),
    "an adapter below": (
        added({f"lora/{name}": data for name, data in ADAPTER.items()}), (), [f"lora/{name}" for name in ADAPTER],
    ),
    "links": (linked, ["assets/a.txt"], ["alias", "gone.txt"]),
    "hidden files": (added({".env": "SECRET=1"}), (), [".env"]),
    "weights of another part": (
        added({"projector.safetensors": save({"projector.weight": torch.ones(7, 5)})}), ["projector.safetensors"], (),
    ),
}  # fmt: skip


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
    directory = spoiled(llama, tmp_path, added(SENTENCES))
    pickled = (directory / DENSE).rename(directory / "2_Dense" / "pytorch_model.bin")
    for _ in range(2):
        refused = call_cli("harden", directory, "--out", tmp_path / "out", *FOLD)
        assert_refused(refused, "2_Dense", "Dense", "save_pretrained")
        pickled.unlink(missing_ok=True)  # as from the Hub, where pickles are not downloaded


# --- directories that are something else -----------------------------------------------------------------------------


def emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def holding(name: str, text: str = "{}") -> Mutation:
    return lambda directory: emptied(directory) or added({name: text})(directory)


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


PEFT = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
ELSE: dict[str, tuple[Mutation, tuple[str, ...]]] = {
    "an adapter": (holding("adapter_config.json", PEFT), ("adapter of PEFT for org/base", "merge_and_unload")),
    "an adapter without a base": (holding("adapter_config.json", "["), ("adapter of PEFT", "merge_and_unload")),
    "a model with an adapter": (added(ADAPTER), ("adapter", "loads both", "Move adapter_config.json")),
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


@pytest.mark.parametrize("case", ELSE)
def test_a_directory_that_is_something_else_is_called_by_its_name(case: str, llama: Path, tmp_path: Path) -> None:
    mutation, words = ELSE[case]
    directory, out = spoiled(llama, tmp_path, mutation), ("--out", tmp_path / "out")
    before = snapshot(tmp_path)
    assert_refused(call_cli("harden", directory, *out, *FOLD), *words)
    assert_refused(call_cli("inspect", directory), *words)
    assert_refused(call_cli("attack", directory, "--control", directory, *out), *words)
    assert snapshot(tmp_path) == before
