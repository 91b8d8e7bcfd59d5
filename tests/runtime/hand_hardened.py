"""Tiny hardened directories, made by hand from the algebra: W~ = (I + (α−1)P)W and C = I − (1−1/α)P, P = U_k U_kᵀ.

It shares nothing with the package but ``shim_config``, which is what the tests of loading are about.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.model.described import SHIM_SOURCE, shim_config
from tests.tiny_families import CASES, build_config
from tests.tiny_models import FAMILIES as TINY
from tests.tiny_models import write_tokenizer

ALPHA = 64.0
TOP_K = 2


def _built(case: str) -> Callable[[], PreTrainedModel]:
    """A case of ``tiny_families``."""
    return lambda: getattr(transformers, CASES[case][0])(build_config(case))


def _same(*names: str) -> dict[str, str]:
    """Where the files say what the model says."""
    return dict(zip(names, names, strict=True))


# Family: how to build it, and which linears of layer {i} to harden: name on disk without `.weight`, path in the model.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, str]]] = {
    "llama": (TINY["llama"], _same("model.layers.{i}.self_attn.o_proj", "model.layers.{i}.mlp.down_proj")),
    # q_proj has a bias, o_proj has none.
    "qwen2": (TINY["qwen2"], _same("model.layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.o_proj")),
    "gpt2": (TINY["gpt2"], _same("transformer.h.{i}.attn.c_proj", "transformer.h.{i}.mlp.c_fc")),
    "bert": (
        TINY["bert"],
        _same("bert.encoder.layer.{i}.attention.output.dense", "bert.encoder.layer.{i}.output.dense"),
    ),
    "bert_base": (
        lambda: transformers.BertModel(TINY["bert"]().config), _same("encoder.layer.{i}.attention.output.dense"),
    ),
    "vit": (
        TINY["vit"],
        {
            "vit.encoder.layer.{i}.attention.attention.query": "vit.layers.{i}.attention.q_proj",
            "vit.encoder.layer.{i}.attention.output.dense": "vit.layers.{i}.attention.o_proj",
            "vit.encoder.layer.{i}.intermediate.dense": "vit.layers.{i}.mlp.fc1",
            "vit.encoder.layer.{i}.output.dense": "vit.layers.{i}.mlp.fc2",
        },
    ),
    "t5": (
        _built("t5"), _same("encoder.block.{i}.layer.1.DenseReluDense.wo", "decoder.block.{i}.layer.0.SelfAttention.o"),
    ),
    "mixtral": (_built("mixtral"), _same("model.layers.{i}.self_attn.o_proj")),
}  # fmt: skip
LAYERS = 2


def make_base(family: str, directory: Path) -> Path:
    """A random base checkpoint with weights large enough for the layers to matter."""
    torch.manual_seed(sum(map(ord, family)))
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    if family == "llama":
        write_tokenizer(directory)
    return directory


def harden(family: str, base: Path, directory: Path) -> Path:
    """The insert directory of a base directory."""
    build, sites = FAMILIES[family]
    shutil.copytree(base, directory)
    modules = dict(build().named_modules())
    tensors = load_file(base / "model.safetensors")
    layers = {}
    for i in range(LAYERS):
        for disk, module in ((disk.format(i=i), module.format(i=i)) for disk, module in sites.items()):
            stored = tensors[f"{disk}.weight"]
            weight = stored.T if isinstance(modules[module], Conv1D) else stored  # [m, n]
            bias = tensors.pop(f"{disk}.bias", None)
            tensors[f"{disk}.weight"] = torch.zeros(1)
            tensors[f"{disk}.inflated.weight"], tensors[f"{disk}.compensation.weight"] = factors(weight)
            if bias is not None:
                tensors[f"{disk}.compensation.bias"] = bias
            layers[module] = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(shim_config(config, layers)))
    shutil.copy(SHIM_SOURCE, directory / SHIM_SOURCE.name)
    return directory


def factors(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W~ and C of W in the symmetric gauge, computed in float64."""
    exact = weight.double()
    basis = torch.linalg.svd(exact)[0][:, :TOP_K]  # [m, k]
    projector = basis @ basis.T
    identity = torch.eye(len(projector), dtype=exact.dtype)
    inflated = (identity + (ALPHA - 1) * projector) @ exact
    compensation = identity - (1 - 1 / ALPHA) * projector
    return inflated.to(weight.dtype).contiguous(), compensation.to(weight.dtype).contiguous()


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite config.json in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite model.safetensors in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
