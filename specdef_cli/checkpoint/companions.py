"""The files of a checkpoint that are not weights: tokenizer, generation config, code, pooling settings, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from specdef_cli.checkpoint.links import require_inside

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".mlmodel", ".npz"}
)
# Written anew for every output.
REWRITTEN = frozenset({"config.json", "README.md", "specdef.json", "certificate.json", "model.safetensors.index.json"})


def companion_files(directory: Path) -> tuple[Path, ...]:
    """Files to carry over, as paths relative to ``directory``: no weights, nothing hidden or rewritten."""
    found = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if any(part.startswith(".") or part == "__pycache__" for part in relative.parts) or not path.is_file():
            continue
        if path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json") or str(relative) in REWRITTEN:
            continue
        found.append(relative)
    return tuple(found)


def carry_over(source: Path, target: Path) -> None:
    """Copy the companion files of ``source`` to ``target``; ``open_checkpoint`` has refused stray links already.

    Raises:
        SpecDefError: One is a link that leaves the checkpoint.
    """
    for relative in companion_files(source):
        require_inside(source, source / relative)
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, destination)
