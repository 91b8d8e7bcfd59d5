"""Ways to spoil a checkpoint directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Mutation = Callable[[Path], object]
DOWN = "model.layers.0.mlp.down_proj.weight"
GIT_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
REMOVED = object()


def edit_json(name: str, **changes: Any) -> Mutation:
    """Set keys of a JSON file; ``REMOVED`` takes one away."""

    def apply(directory: Path) -> None:
        data = json.loads((directory / name).read_text())
        for key, value in changes.items():
            if value is REMOVED:
                data.pop(key, None)
            else:
                data[key] = value
        (directory / name).write_text(json.dumps(data))

    return apply


def config(**changes: Any) -> Mutation:
    return edit_json("config.json", **changes)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite config.json in place."""
    data = json.loads((directory / "config.json").read_text())
    change(data)
    (directory / "config.json").write_text(json.dumps(data))


def edit_tensors(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors"
) -> None:
    """Rewrite the weights in place."""
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name, {"format": "pt"})


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Mutation:
    """Replace a tensor; ``None`` removes it."""

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors.pop(name)
        if change is not None:
            tensors[name] = change(weight).contiguous()

    return lambda directory: edit_tensors(directory, apply)


def element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Overwrite one element in the middle."""

    def apply(values: torch.Tensor) -> torch.Tensor:
        values.view(-1)[values.numel() // 2] = value
        return values

    return apply


def content(name: str, data: bytes | str) -> Mutation:
    """Overwrite a file."""

    def apply(directory: Path) -> None:
        (directory / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return apply


def raw_bytes(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Mutation:
    """Change the bytes of a file."""

    def apply(directory: Path) -> None:
        path = directory / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def file_in_place_of(name: str) -> Mutation:
    """A directory where a file was."""

    def apply(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return apply


def spoiled(model: Path, where: Path, *mutations: Mutation) -> Path:
    """A copy of ``model`` below ``where``, with every mutation made in turn."""
    directory = where / "model"
    shutil.copytree(model, directory)
    for mutate in mutations:
        mutate(directory)
    return directory
