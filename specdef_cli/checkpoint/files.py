"""The files of a checkpoint directory: their names, their formats, where they may lie; whole on disk, or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from specdef_cli.errors import SpecDefError, WrongUsage


@dataclass(frozen=True)
class Library:
    """A library that writes checkpoint directories: it decides how their files are named and who can load them."""

    name: str
    weights: str

    @property
    def is_transformers(self) -> bool:
        """Whether it has model types, takes code and dtypes from ``config.json``, and its models have logits."""
        return self.name == "transformers"

    @property
    def single_file(self) -> str:
        """The name of a single weight file."""
        return f"{self.weights}.safetensors"

    @property
    def index_file(self) -> str:
        """The file that says which shard holds which tensor."""
        return f"{self.weights}.safetensors.index.json"


TRANSFORMERS = Library("transformers", "model")
DIFFUSERS = Library("diffusers", "diffusion_pytorch_model")


def library_of(config: Mapping[str, Any]) -> Library:
    """Tell which library wrote a ``config.json``: diffusers names classes, transformers model types."""
    return DIFFUSERS if "_class_name" in config and "model_type" not in config else TRANSFORMERS


SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Loading one runs code."""
OTHER_FORMATS = (
    ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel", ".npz", ".ot", ".distcp",
    ".llamafile", ".pte", ".engine", ".nemo", ".mlpackage", ".xml",
)  # fmt: skip
"""``.xml`` is OpenVINO's graph, whose weights are a .bin beside it."""
PICKLED_WEIGHTS = ("*pytorch_model*.bin", *(f"*{suffix}" for suffix in PICKLES if suffix != ".bin"))
"""Trainer keeps its arguments in a .bin file too."""
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
    """Whether a file holds weights or their index, by its name."""
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


_OTHER_WEIGHTS = (
    (
        PICKLED_WEIGHTS,
        "pickled weights, which are never loaded",
        "Convert it first: in {library}, {loads}).save_pretrained(...).",
    ),
    (
        ("*.gguf",),
        "weights for llama.cpp",
        "Convert it first: in transformers, AutoModelForCausalLM.{loads}, gguf_file='{name}', "
        "quantization_config=GgufConfig(dequantize=True)).save_pretrained(...).",
    ),
    (
        ("*.h5", "*.msgpack"),
        "weights of TensorFlow or Flax",
        "Convert it first: in transformers 4, {loads}, from_tf=True), or from_flax=True, and .save_pretrained(...).",
    ),
    (("*.onnx",), "a graph for ONNX", "Give the model that it was exported from."),
)
"""Names of files, what they hold, and what to do about it."""


def held_instead(names: Iterable[str], source: str, library: Library = TRANSFORMERS) -> tuple[str, str] | None:
    """Name weights in another format, and how to convert them; ``None`` where there are none."""
    ordered = sorted(names)
    for patterns, what, hint in _OTHER_WEIGHTS:
        for name in ordered:
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                loads = f"from_pretrained('{source}'"
                return f"{what} ({name})", hint.format(library=library.name, loads=loads, name=name)
    return None


def locate(model: str, revision: str | None = None) -> Path | tuple[str, str | None]:
    """Resolve ``model`` to a directory, or to repository and revision."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model and path.exists():
        held = held_instead([path.name], str(path.parent))
        if held is not None:
            raise SpecDefError(f"{model} holds {held[0]}", held[1])
        raise SpecDefError(f"{model} is a file", "Give the directory that holds config.json and the safetensors files.")
    repository, _, suffix = model.partition("@")
    if suffix and revision and suffix != revision:
        raise WrongUsage(f"two revisions are named: {suffix} and {revision}", "Give the revision once.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or model.startswith((".", "~")):
        address = re.match(r"\w+://(?:[\w.-]+\.\w+/)?([\w.-]+/[\w.-]+)", model)
        hint = "Check the path, or give org/name; --subfolder names a folder of it."
        if address:
            hint = f"Give {address[1]}."
        elif re.fullmatch(r"\w[\w.-]*/[\w.-]+/", model):
            hint = f"Check the path; a Hub id has no slash at its end: {model[:-1]}."
        raise SpecDefError(f"{model!r} is neither a directory nor a Hub id", hint)
    return repository, revision or suffix or None


def require_inside(directory: Path, path: Path) -> None:
    """Check that ``path`` lies in ``directory``, or in the blobs of the Hub cache that ``directory`` is part of."""
    root = directory.resolve()
    # In the Hub cache, snapshots/<commit>/<file> links to blobs/<hash>; the directory may be a folder of the snapshot.
    caches = (place.parent.parent for place in (root, *root.parents) if place.parent.name == "snapshots")
    allowed = (root, *(cache / "blobs" for cache in caches))
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise SpecDefError(
            f"{path.relative_to(directory)} is a link that leaves {directory}", "Replace the link by the file itself."
        )


UNFINISHED_SUFFIX = ".partial"
"""A killed write leaves a hidden file of this suffix."""


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary sibling's name, flush it, and rename it into place.

    Any number of processes may write the same file: whichever comes last wins, and no reader sees a part.

    Raises:
        OSError: The disk; an earlier file of that name is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED_SUFFIX}")
    try:
        with sibling.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
    finally:
        sibling.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face libraries format theirs."""
    write_durably(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def takes_files(directory: Path) -> bool:
    """Whether a file can be made in a directory. Permissions do not tell: a file system may refuse all the same."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def remove_unfinished(directory: Path) -> None:
    """Remove the files that killed writes have left. The caller must be the only writer there."""
    for path in directory.glob(f".*{UNFINISHED_SUFFIX}"):
        path.unlink(missing_ok=True)


# The format's own limit on its JSON header; a larger length is a corrupt file.
MAX_HEADER_BYTES = 100_000_000


# What json.loads raises on data made to be refused (deep nesting is a RecursionError), and what a wrong type then does.
INVALID_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Bytes of an element, by safetensors' names of what is read here."""
FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its shard's header describes it.

    Attributes:
        dtype: As safetensors names it, e.g. ``BF16``.
        begin, end: Its bytes, counted from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


GIT_LFS = b"version https://git-lfs.github.com/"
"""First bytes of a Git LFS pointer."""


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read the header of a safetensors file and check it; tensors are in the order of their data."""
    shard = path.name

    def corrupt(reason: str) -> SpecDefError:
        return SpecDefError(f"{shard} is not a valid safetensors file: {reason}", "Fetch the file again.")

    try:
        with path.open("rb") as file:
            size, start = path.stat().st_size, file.read(8)
            if len(start) < 8:
                raise corrupt("it is shorter than a header")
            if start == GIT_LFS[:8]:
                raise lfs_pointer(shard)
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise corrupt(f"its header claims {length} bytes")
            text = file.read(length)
    except OSError as error:
        raise SpecDefError(f"{shard} cannot be read: {error}", "Check the disk and the file.") from error
    try:
        entries = json.loads(text, object_pairs_hook=unique_keys)
        headers = [
            _tensor_header(name, entry, shard, 8 + length) for name, entry in entries.items() if name != "__metadata__"
        ]
    except INVALID_JSON as error:
        raise corrupt(f"its header is invalid: {error}") from error
    headers.sort(key=lambda header: (header.begin, header.end))
    position = 8 + length
    for header in headers:
        if header.begin != position:
            raise corrupt(f"the data of {header.name} does not follow the tensor before it")
        position = header.end
    if position != size:
        raise corrupt(f"its header describes {position} bytes and the file has {size}")
    return {header.name: header for header in headers}


def _tensor_header(name: str, entry: dict[str, Any], shard: str, data_start: int) -> TensorHeader:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    if not all(isinstance(value, int) and value >= 0 for value in (begin, end, *shape)):
        raise ValueError(f"{name} has an invalid shape or offset")
    if dtype not in DTYPE_BYTES:
        raise SpecDefError(
            f"{name} in {shard} is stored as {dtype}, which is not read here",
            "Give the checkpoint in an ordinary dtype, such as the unquantized one.",
        )
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise ValueError(f"{name} is {dtype} {list(shape)}, which is {expected} bytes and not {end - begin}")
    return TensorHeader(name, dtype, shape, shard, data_start + begin, data_start + end)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} appears twice")
    return result


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is there, and is such a pointer."""
    try:
        with path.open("rb") as file:
            return file.read(len(GIT_LFS)) == GIT_LFS
    except OSError:
        return False


def lfs_pointer(name: str) -> SpecDefError:
    return SpecDefError(
        f"{name} is a pointer of Git LFS, which stands for the file",
        "Run `git lfs pull` in the clone, or fetch the model with `hf download`.",
    )
