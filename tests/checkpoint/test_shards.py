"""The layout of output shards, decided before anything is written."""

from __future__ import annotations

import itertools
import json
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from specdef_cli.checkpoint.shards import (
    OutputShard,
    TensorGroup,
    TensorSpec,
    assign_shards,
    plan_shards,
    shard_header,
    shard_index,
)


def group(name: str, size: int, dtype: str = "U8") -> TensorGroup:
    return TensorGroup(name, (TensorSpec(name, dtype, (size,)),))


def test_shards_are_filled_greedily_in_order() -> None:
    shards = plan_shards([group(name, size) for name, size in zip("abcde", (4, 6, 5, 5, 1), strict=True)], 10)
    assert [[group.label for group in shard.groups] for shard in shards] == [["a", "b"], ["c", "d"], ["e"]]
    assert [shard.name for shard in shards] == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [shard.nbytes for shard in shards] == [10, 10, 1]


def test_one_shard_has_the_usual_name_and_no_index() -> None:
    shards = plan_shards([group("a", 4)], 10)
    assert [shard.name for shard in shards] == ["model.safetensors"]
    assert shard_index(shards) is None


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=30), limit=st.integers(1, 40))
def test_no_group_is_lost_reordered_or_put_where_it_does_not_fit(sizes: list[int], limit: int) -> None:
    groups = [group(f"t{number}", size) for number, size in enumerate(sizes)]
    shards = plan_shards(groups, limit)
    assert [group for shard in shards for group in shard.groups] == groups
    assert all(shard.groups and (shard.nbytes <= limit or len(shard.groups) == 1) for shard in shards)
    # Greedy: the first group of each shard did not fit into the one before.
    for before, after in itertools.pairwise(shards):
        assert before.nbytes + after.groups[0].nbytes > limit


@settings(max_examples=50, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8", "BOOL"]), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=12,
    )
)
def test_headers_are_aligned_and_leave_no_hole(specs: list[tuple[str, list[int]]]) -> None:
    groups = tuple(
        TensorGroup(f"t{number}", (TensorSpec(f"t{number}", dtype, tuple(shape)),))
        for number, (dtype, shape) in enumerate(specs)
    )
    shard = OutputShard("model.safetensors", groups)
    header, offsets = shard_header(shard)
    (length,) = struct.unpack("<Q", header[:8])
    assert len(header) == 8 + length
    assert len(header) % 8 == 0
    entries = json.loads(header[8:])
    assert entries.pop("__metadata__") == {"format": "pt"}
    position = 0
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        assert begin == position
        assert offsets[name] == 8 + length + begin
        itemsize = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1, "BOOL": 1}[entry["dtype"]]
        assert offsets[name] % itemsize == 0
        position = end
    assert position == shard.nbytes


def test_one_element_tensors_come_after_large_ones_of_their_width() -> None:
    outputs = (TensorSpec("tombstone", "BF16", (1,)), TensorSpec("large", "BF16", (64,)))
    _, offsets = shard_header(OutputShard("model.safetensors", (TensorGroup("layer", outputs),)))
    assert offsets["large"] < offsets["tombstone"]
    assert offsets["large"] % 8 == 0


def test_the_index_names_every_tensor_and_the_total() -> None:
    shards = plan_shards([group("b", 6), group("a", 6)], 10)
    index = shard_index(shards)
    assert index is not None
    name, text = index
    assert name == "model.safetensors.index.json"
    assert json.loads(text) == {
        "metadata": {"total_size": 12},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20), processes=st.integers(1, 6))
def test_every_shard_has_one_process_and_none_is_overloaded(sizes: list[int], processes: int) -> None:
    shards = plan_shards([group(f"t{number}", size) for number, size in enumerate(sizes)], 1)
    parts = assign_shards(shards, processes)
    assert len(parts) == processes
    assert sorted(shard.name for part in parts for shard in part) == sorted(shard.name for shard in shards)
    # Longest processing time first is at most 4/3 of the optimum, which is at least the mean and the largest.
    loads = [sum(shard.nbytes for shard in part) for part in parts]
    assert max(loads) <= 4 / 3 * max(sum(sizes) / processes, max(sizes), sum(sorted(sizes)[-processes - 1 :][:2]))
