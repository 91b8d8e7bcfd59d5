"""The reader on what it must read and on what it must refuse, with the safetensors library as second implementation."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specdef_cli.checkpoint.files import DTYPE_BYTES, TRANSFORMERS, read_headers
from specdef_cli.checkpoint.reader import TORCH_DTYPES, open_checkpoint
from specdef_cli.errors import ResumableError, SpecDefError

INDEX_FILE = TRANSFORMERS.index_file
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def write_checkpoint(directory: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors or {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, directory / "model.safetensors")
    return directory


def write_sharded(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, directory / "one.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, directory / "two.safetensors")
    write_index(directory, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refusal(directory: Path) -> SpecDefError:
    with pytest.raises(SpecDefError) as raised:
        open_checkpoint(directory)
    assert "\n" not in raised.value.problem
    assert raised.value.hint
    return raised.value


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_what_safetensors_writes_is_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtypes: list[torch.dtype], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{number}.weight": (torch.randn(shape, generator=generator) * 100).to(dtype)
        for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    directory = write_checkpoint(tmp_path_factory.mktemp("read"), tensors)
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.tensors) == set(tensors)
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name, header in checkpoint.tensors.items():
            expected = file.get_tensor(name)
            found = checkpoint.read(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert TORCH_DTYPES[header.dtype] == expected.dtype
            raw = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == raw
            blocks = [block.clone() for _, block in checkpoint.row_blocks(name, 7)]
            assert b"".join(block.view(torch.uint8).numpy().tobytes() for block in blocks) == raw
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sharded(tmp_path))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.shards == ("one.safetensors", "two.safetensors")
    tensor = checkpoint.read("c")
    tensor += 1  # it is independent of the file
    assert checkpoint.read("c").tolist() == [2.0] * 4


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN_HEADERS: dict[str, tuple[Any, bytes, int | None]] = {
    "no header at all": (b"", b"", None),
    "length beyond the file": ({"a": entry()}, bytes(4), 10**6),
    "length of an exabyte": ({"a": entry()}, bytes(4), 2**60),
    "length of all ones": ({"a": entry()}, bytes(4), 2**64 - 1),
    "not JSON": (b"{'a': 1}", bytes(4), None),
    "not UTF-8": (b'{"\xff\xfe": 1}', bytes(4), None),
    "a list": ([1, 2], bytes(4), None),
    "an entry that is no object": ({"a": 3}, bytes(4), None),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), None),
    "dtype that is a list": ({"a": entry(dtype=["F32"])}, bytes(4), None),
    "negative shape": ({"a": entry(shape=[-1])}, bytes(4), None),
    "fractional shape": ({"a": entry(shape=[1.0])}, bytes(4), None),
    "shape as text": ({"a": entry(shape="1")}, bytes(4), None),
    "three offsets": ({"a": entry(offsets=[0, 2, 4])}, bytes(4), None),
    "offsets backwards": ({"a": entry(offsets=[4, 0])}, bytes(4), None),
    "offsets that are not the shape's": ({"a": entry(shape=[2])}, bytes(4), None),
    "data that overlaps": ({"a": entry(), "b": entry()}, bytes(4), None),
    "a hole in the data": ({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12), None),
    "bytes left over": ({"a": entry()}, bytes(5), None),
    "data missing": ({"a": entry()}, bytes(3), None),
    "deep nesting": (b"[" * 100_000, bytes(4), None),
    "a huge number": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}', b"", None),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_a_broken_header_is_refused(case: str, tmp_path: Path) -> None:
    header, data, length = BROKEN_HEADERS[case]
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    if case == "no header at all":
        path.write_bytes(b"abc")
    else:
        write_raw(path, header, data, length)
    error = refusal(tmp_path)
    assert "model.safetensors is not a valid safetensors file" in error.problem
    # The library, as second opinion, refuses them as well.
    with pytest.raises((SafetensorError, OverflowError)), safe_open(path, "pt"):
        pass


def test_a_name_twice_in_one_header_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    one = json.dumps(entry())
    two = json.dumps(entry(offsets=[4, 8]))
    write_raw(tmp_path / "model.safetensors", f'{{"a": {one}, "a": {two}}}'.encode(), bytes(8))
    assert "a appears twice" in refusal(tmp_path).problem


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "Q4_K", "", None])
def test_a_dtype_that_is_not_known_is_refused_by_name(dtype: str | None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_raw(tmp_path / "model.safetensors", {"a": entry(dtype=dtype)}, bytes(4))
    error = refusal(tmp_path)
    assert "a in model.safetensors" in error.problem
    assert str(dtype) in error.problem


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 50, -1, -17])
def test_a_truncated_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "model.safetensors" in refusal(tmp_path).problem


def test_any_flipped_bit_of_a_header_is_refused_or_leaves_the_data_reachable(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    intact = path.read_bytes()
    (length,) = struct.unpack("<Q", intact[:8])
    refused = 0
    for position in range(8 + length):
        for bit in (1, 16):
            path.write_bytes(intact[:position] + bytes([intact[position] ^ bit]) + intact[position + 1 :])
            try:
                headers = read_headers(path)
            except SpecDefError:
                refused += 1
                continue
            # What still passes renames a tensor, or swaps a dtype or shape of the same size: nothing is out of bounds.
            assert sum(header.nbytes for header in headers.values()) == len(intact) - 8 - length
            checkpoint = open_checkpoint(tmp_path)
            for name in headers:
                checkpoint.read(name)
    assert refused > length


def test_a_file_that_shrinks_and_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    readings: list[Callable[[], object]] = [lambda: checkpoint.read("b"), lambda: [*checkpoint.row_blocks("b", 5)]]
    for reading in readings:
        with pytest.raises(SpecDefError, match=r"model\.safetensors ends inside b"):
            reading()

    def fail(self: Path, *arguments: Any, **keywords: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    for reading in readings:
        with pytest.raises(ResumableError, match=r"model\.safetensors cannot be read: Input/output error"):
            reading()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no config.json"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
        ('"llama"', "not a JSON object"),
        ("null", "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_config_json(text: str | None, words: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert words in refusal(tmp_path).problem


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors", "/etc/passwd", "..", ".", "", "sub/one.safetensors", None, 3, ["one.safetensors"],
        "pytorch_model.bin", "absolute", "gone.safetensors",
    ],
)  # fmt: skip
def test_an_index_may_only_name_its_neighbours(shard: Any, tmp_path: Path) -> None:
    """Not by an absolute path even if it is the right file, and no pickle."""
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    directory = write_sharded(tmp_path / "model")
    (directory / "sub").mkdir()
    save_file({"a": torch.zeros(2)}, directory / "sub" / "one.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"")
    write_index(directory, {"a": str(directory / "one.safetensors") if shard == "absolute" else shard})
    problem = refusal(directory).problem
    assert ("gone.safetensors is missing" if shard == "gone.safetensors" else INDEX_FILE) in problem


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "x"}', '{"weight_map": {}}']
)
def test_a_broken_index_is_refused(text: str, tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(text)
    assert ("no tensors" if "{}}" in text else INDEX_FILE) in refusal(tmp_path).problem


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"b": torch.zeros(3), "c": torch.zeros(4)}, tmp_path / "two.safetensors")
    problem = refusal(tmp_path).problem
    assert "b is in one.safetensors and in two.safetensors" in problem


def test_an_index_that_contradicts_the_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    assert "puts a in two.safetensors, but it is in one.safetensors" in refusal(tmp_path).problem
    write_index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"})
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b", "c"]  # whether d is needed is asked of the model


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.ckpt"])
def test_pickles_are_never_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.")
    error = refusal(tmp_path)
    assert "pickled" in error.problem
    assert "save_pretrained" in error.hint
    (tmp_path / name).unlink()
    assert "no safetensors weights" in refusal(tmp_path).problem


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "README.md", "tokenizer.json", "code/model.py", "specdef.json"]
)
def test_a_link_that_leaves_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    outside = tmp_path / "secret"
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    outside.write_bytes(path.read_bytes() if path.exists() else b"the machine's own")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    assert f"{name} is a link" in refusal(directory).problem
    path.rename(directory / "hop")  # a chain of links is followed to its end
    path.symlink_to(directory / "hop")
    assert "is a link" in refusal(directory).problem


def cached(root: Path) -> Path:
    """A checkpoint as the Hub cache holds it: every file of a snapshot links to a blob."""
    plain = write_checkpoint(root / "plain")
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / "abc123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(repository / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


def test_links_that_stay_are_followed(tmp_path: Path) -> None:
    """Out of a Hub cache, within the directory, and of the directory itself."""
    directory = write_checkpoint(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "weights-v1")
    (directory / "model.safetensors").symlink_to("weights-v1")
    (tmp_path / "alias").symlink_to(directory)
    for place in (cached(tmp_path), directory, tmp_path / "alias"):
        assert open_checkpoint(place).read("b").tolist() == [1.0] * 4


def test_a_snapshot_may_not_link_to_another_repositorys_blobs(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "blob").write_bytes((snapshot / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "blob")
    assert "link" in refusal(snapshot).problem


def test_the_bytes_of_a_dtype_are_torch_s() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES
