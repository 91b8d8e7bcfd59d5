"""Files that hold weights in another format than safetensors, by their names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path, PurePath

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Loading one runs code."""
OTHER_FORMATS = (
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel", ".npz", ".ot", ".distcp",
    ".llamafile", ".pte", ".engine", ".nemo", ".mlpackage", ".xml",
)  # fmt: skip
"""``.xml`` is OpenVINO's graph, whose weights are a .bin beside it."""
_BINARY_COMPANIONS = (
    # tokenizers in SentencePiece's form
    "*.model", "*.spm", "*tokenizer.model.v*",
    # a card's pictures and samples
    "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.ico", "*.bmp", "*.avif", "*.pdf",
    "*.wav", "*.mp3", "*.flac", "*.ogg", "*.mp4", "*.webm",
)  # fmt: skip
_LARGE = 100 * 2**20
"""Bytes; tokenizers, pictures and samples have less, and what has more may be anything."""
_HEAD = 2**16
_STATE_OF_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


def holds_weights(path: PurePath) -> bool:
    """Whether the name of a file says that it holds weights of a model, or says where they are."""
    name = path.name.removesuffix(".index.json")
    suffix = PurePath(name).suffix.lower()
    if suffix in PICKLES:
        return not name.startswith(_STATE_OF_TRAINING)
    return suffix == SAFETENSORS or suffix in OTHER_FORMATS


def is_no_weights(path: Path) -> bool:
    """Whether a file is known to hold no weights: it is text, or of a binary kind that goes with a model."""
    try:
        with path.open("rb") as file:
            if b"\0" not in file.read(_HEAD):
                return True
        size = path.stat().st_size
    except OSError:
        return True  # copying it will say why it cannot be read
    return size <= _LARGE and any(fnmatchcase(path.name.lower(), pattern) for pattern in _BINARY_COMPANIONS)
