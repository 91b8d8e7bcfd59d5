"""Directories spoiled at random: refused in two lines, or hardened into what transformers itself would load of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from specdef_cli.model import load_model
from tests.commands import assert_refused, call_cli, succeed
from tests.hardening.mutations import spoiled
from tests.tiny_models import forward

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**40, -0.5, 1e400, "", "x", "0", [], {}, [1], {"a": 1}, [None]),
    *("llama", "specdef", "../..", "a\nb", "\0", "☃", "[red]", 10**30),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn]


def config_value(directory: Path, generator: random.Random) -> None:
    path = directory / "config.json"
    data = json.loads(path.read_text())
    key = generator.choice([*sorted(data), "quantization_config", "auto_map", "layer_types", "dtype"])
    if generator.random() < 0.2:
        data.pop(key, None)
    else:
        data[key] = generator.choice(ODD_VALUES)
    path.write_text(json.dumps(data))


def config_bytes(directory: Path, generator: random.Random) -> None:
    flip(directory / "config.json", generator, 3)


def flip(path: Path, generator: random.Random, count: int, within: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(count):
        if data:
            data[generator.randrange(min(len(data), within or len(data)))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def header_bytes(directory: Path, generator: random.Random) -> None:
    flip(directory / "model.safetensors", generator, generator.randint(1, 3), within=2500)


def weight_bytes(directory: Path, generator: random.Random) -> None:
    flip(directory / "model.safetensors", generator, 30)


def size(directory: Path, generator: random.Random) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(len(data))] if generator.random() < 0.7 else data + b"\0" * 9)


def tensors(directory: Path, generator: random.Random) -> None:
    path = directory / "model.safetensors"
    found = load_file(path)
    name = generator.choice(sorted(found))
    tensor, stem = found[name], name.removesuffix(".weight")
    kind = generator.choice(["remove", "rename", "swap", "dtype", "shape", "empty", "scale", "extra"])
    if kind == "remove":
        del found[name]
    elif kind == "rename":
        suffix = generator.choice(["", ".weight", "\n", "/../x", ".inflated.weight"])
        found[name.replace("weight", "wait") + suffix] = found.pop(name)
    elif kind == "swap":
        other = generator.choice(sorted(found))
        found[name], found[other] = found[other].clone(), found[name].clone()
    elif kind == "dtype":
        found[name] = tensor.to(generator.choice(DTYPES))
    elif kind == "shape":
        turned = tensor.mT if tensor.dim() > 1 else tensor
        found[name] = generator.choice([tensor.flatten(), tensor[None], tensor[:-1], turned])
    elif kind == "empty":
        found[name] = tensor[:0]
    elif kind == "scale":
        found[name] = tensor * generator.choice([0.0, 1e30, 1e-30, float("inf"), float("nan")])
    else:
        found[f"{stem}.{generator.choice(['extra', 'inflated.weight', 'bias'])}"] = torch.ones(3)
    save_file({key: value.contiguous() for key, value in found.items()}, path, {"format": "pt"})


def index(directory: Path, generator: random.Random) -> None:
    # Beside a model.safetensors no index would be read.
    shard = (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    names = sorted(load_file(shard))
    weight_map: Any = dict.fromkeys(names, shard.name)
    kind = generator.choice(["value", "name", "whole", "bytes"])
    if kind == "value":
        weight_map[generator.choice(names)] = generator.choice([*ODD_VALUES[:-1], "/etc/passwd", "config.json"])
    elif kind == "name":
        weight_map[generator.choice(["x", "", "a.weight"])] = weight_map.pop(generator.choice(names))
    elif kind == "whole":
        weight_map = generator.choice(ODD_VALUES)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    if kind == "bytes":
        flip(path, generator, 3)


def files(directory: Path, generator: random.Random) -> None:
    path = generator.choice(sorted(directory.iterdir()))
    kind = generator.choice(["remove", "empty", "garbage", "directory", "link", "loop"])
    if kind == "empty":
        path.write_bytes(b"")
        return
    if kind == "garbage":
        path.write_bytes(generator.randbytes(200))
        return
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "loop":
        path.symlink_to(path.name)


MUTATIONS = [config_value, config_bytes, header_bytes, weight_bytes, size, tensors, index, files]


def check(directory: Path, outside: Path, method: str) -> None:
    """A spoiled directory is refused, or what is made of it computes what transformers makes of it."""
    options = ("--top-k", "4") if method == "factors" else ()
    result = call_cli("harden", directory, "--out", outside / "out", "--method", method, "--quiet", *options)
    if result.code:
        assert_refused(result, empty=outside)
        return
    # It was hardened: then transformers finds every weight in the input, in its shape, and the function is the same.
    base, loading = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    hardened = load_model(outside / "out", auto_class=LlamaForCausalLM)  # a config.json may have lost its architectures
    reference, found = forward(base.eval()).double(), forward(hardened).double()
    assert torch.linalg.vector_norm(found - reference) <= 0.05 * torch.linalg.vector_norm(reference)
    succeed("collapse", outside / "out", "--out", outside / "back", "--quiet")


def run_many(
    model: Path,
    tmp_path: Path,
    mutation: Callable[[Path, random.Random], None],
    seeds: range,
    check: Callable[[Path, Path], None],
) -> None:
    """Check a copy of the model that was spoiled, with an empty directory for outputs, for every seed."""
    for seed in seeds:
        where = tmp_path / str(seed)
        directory = spoiled(model, where)
        mutation(directory, random.Random(f"{mutation.__name__} {seed}"))
        (where / "outside").mkdir()
        try:
            check(directory, where / "outside")
        except Exception as error:
            error.add_note(f"seed {seed} of {mutation.__name__}; the directory is {where}")
            raise
        shutil.rmtree(where)


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 150), marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("method", ["factors", "fold"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_no_traceback_no_silent_success(mutation: Any, method: str, seeds: range, llama: Path, tmp_path: Path) -> None:
    run_many(llama, tmp_path, mutation, seeds, partial(check, method=method))


@pytest.fixture(scope="module", params=["factors", "fold"])
def hardened(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "out"
    options = ("--top-k", "4") if request.param == "factors" else ()
    succeed("harden", tiny_model("llama"), "--out", out, "--method", request.param, "--no-verify", *options)
    return out


def manifest_value(directory: Path, generator: random.Random) -> None:
    path = directory / "specdef.json"
    data = json.loads(path.read_text())
    here: Any = data
    while True:
        key = generator.choice(sorted(here) if isinstance(here, dict) else range(len(here)))
        deeper = isinstance(here[key], dict | list) and here[key]
        if not deeper or generator.random() < 0.3:
            break
        here = here[key]
    here[key] = generator.choice(ODD_VALUES)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("mutation", [manifest_value, tensors, header_bytes], ids=lambda mutation: mutation.__name__)
def test_collapse_and_inspect_of_spoiled_directories(mutation: Any, hardened: Path, tmp_path: Path) -> None:
    def check(directory: Path, outside: Path) -> None:
        for result in (
            call_cli("collapse", directory, "--out", outside / "out", "--quiet"),
            call_cli("inspect", directory, "--json"),
        ):
            if result.code:
                assert_refused(result)
        assert (outside / "out").exists() or not list(outside.iterdir())

    run_many(hardened, tmp_path, mutation, range(12 if mutation is manifest_value else 3), check)
