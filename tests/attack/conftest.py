"""A random byte-level Llama on disk, and the same hardened by hand from the algebra, without the hardening room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from specdef_cli.attack.data.rows import AttackData
from specdef_cli.attack.one_run import RunResult, RunSpec
from specdef_cli.attack.train import TrainRun
from specdef_cli.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, BaseCheckpoint, FactoredLayer, Manifest
from specdef_cli.model.described import SHIM_SOURCE, shim_config
from specdef_cli.model.opened import OpenedModel
from tests.byte_tokenizer import byte_tokenizer

HardenDirectory = Callable[..., Path]


def train_run(spec: RunSpec, model: OpenedModel, data: AttackData, **how: Any) -> RunResult:
    """A run of a model that stands for its control too."""
    return TrainRun(model, model, data, **how)(spec)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with d=32 and two layers, one file of float32 weights."""
    directory = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, eos_token_id=256, pad_token_id=257,
            initializer_range=0.1,
        )
    )  # fmt: skip
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def harden_directory() -> HardenDirectory:
    """``(base, out, alpha, top_k, *globs) → out``: an insert directory in the rotated gauge, written down densely."""

    def harden(base: Path, out: Path, alpha: float, top_k: int, *globs: str, control: str | None = None) -> Path:
        shutil.copytree(base, out)
        tensors = load_file(base / "model.safetensors")
        layers: dict[str, dict[str, int | bool]] = {}
        inserted = []
        for name in [name for name in tensors if any(fnmatchcase(name, f"{glob}.weight") for glob in globs)]:
            weight = tensors[name].double()
            rows, columns = weight.shape
            left, values, _ = torch.linalg.svd(weight)
            scale = torch.ones(rows, dtype=torch.float64)
            scale[:top_k] = alpha
            module = name.removesuffix(".weight")
            tensors[f"{module}.inflated.weight"] = (scale[:, None] * (left.mT @ weight)).float().contiguous()
            tensors[f"{module}.compensation.weight"] = (left / scale).float().contiguous()
            tensors[name] = torch.zeros(1)
            layers[module] = {"in_features": columns, "out_features": rows, "bias": False}
            inserted.append(
                FactoredLayer(
                    module,
                    name,
                    rows,
                    columns,
                    None,
                    False,
                    alpha,
                    top_k,
                    "rotated",
                    tuple(values[:top_k].tolist()),
                    0.0,
                )
            )
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(shim_config(config, layers)))
        shutil.copy(SHIM_SOURCE, out)
        origin = BaseCheckpoint(control or str(base))
        manifest = Manifest(FORMAT_VERSION, "0", "factors", origin, "float32", 0, factored=tuple(inserted))
        (out / MANIFEST_NAME).write_text(manifest.to_json())
        return out

    return harden


@pytest.fixture(scope="session")
def hardened(base: Path, harden_directory: HardenDirectory) -> Path:
    """``base`` with every o_proj and down_proj hardened at α=10³, k=4."""
    return harden_directory(base, base.parent / "hardened", 1e3, 4, "*.o_proj", "*.down_proj")
