"""``specdef.json`` survives a round trip and is checked field by field."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from specdef_cli.checkpoint.changes import FactoredLayer, FoldedPair, ScaledSlice
from specdef_cli.checkpoint.manifest import FORMAT_VERSION, BaseCheckpoint, Manifest
from specdef_cli.errors import SpecDefError

LAYER = FactoredLayer(
    "model.o_proj", "model.o_proj.weight", 4, 8, "model.o_proj.bias", False, 1e4, 2, "rotated", (2.0, 1.5), 1e-7
)
PAIR = FoldedPair(
    "layers.0.vo",
    "value_output",
    (3, 1),
    (13, -13),
    (ScaledSlice("v.weight", 0, None, (3, 1), (13, -13)), ScaledSlice("o.weight", 1, 2, (0,), (1,))),
)
MANIFEST = Manifest(
    format=FORMAT_VERSION,
    specdef_version="0.1.0",
    method="factors",
    base=BaseCheckpoint("org/name", "main", "a" * 40),
    dtype="bfloat16",
    seed=3,
    profile="float16-cache",
    folded=(PAIR,),
    factored=(LAYER, dataclasses.replace(LAYER, bias=None)),
    shards={"model.safetensors": "00"},
    verification={"relative": 0.1, "equal": False, "odd": [1, None]},
)


def test_round_trip() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def in_format_1(method: str, profile: str | None, **changes: list[Any]) -> str:
    """A manifest as early versions wrote it, with what each construction had changed."""
    data = json.loads(MANIFEST.to_json())
    data |= {"format": 1, "method": method, "schedule": "staircase", "profile": profile, "folded": [], "scaled": []}
    data["inserted"] = []
    del data["factored"]
    return json.dumps(data | changes)


FACTORS = json.loads(MANIFEST.to_json())["factored"]
FOLDED = json.loads(MANIFEST.to_json())["folded"]
SCALED = [
    {"module": "norm", "kind": "norm", "tensor": "norm.weight", "stem": "norm", "shape": [4], "bias": None,
     "output": {"axis": 0, "indices": [1], "exponents": [3], "period": None}, "input": None, "tied_to": None},
]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "method", "profile"),
    [
        (in_format_1("fold", "coverage", folded=FOLDED), "fold", "float16-cache"),
        (in_format_1("fold", "bfloat16", folded=FOLDED), "fold", "bfloat16"),
        (in_format_1("insert", None, scaled=SCALED), "scale", None),
        (in_format_1("insert", None, inserted=FACTORS), "factors", None),
        (in_format_1("mixed", "coverage", folded=FOLDED, scaled=SCALED), "scale", "float16-cache"),
        (in_format_1("fold", "coverage", folded=FOLDED, config_changes=[]), "fold", "float16-cache"),
    ],
    ids=["fold", "another profile", "scales", "factors", "mixed", "an early field"],
)
def test_format_1_is_read_under_the_names_of_today(written: str, method: str, profile: str | None) -> None:
    found, data = Manifest.from_json(written), json.loads(written)
    assert (found.format, found.method, found.profile) == (FORMAT_VERSION, method, profile)
    again = json.loads(found.to_json())
    assert again["factored"] == data["inserted"]
    for name in ("folded", "scaled", "shards", "verification", "base", "seed", "dtype"):
        assert again[name] == data[name]
    assert Manifest.from_json(found.to_json()) == found


def test_an_early_fold_that_changed_the_config_is_refused() -> None:
    changes = [{"key": "rms_norm_eps", "before": 1e-6, "after": 4e-6}]
    with pytest.raises(SpecDefError, match="config_changes"):
        Manifest.from_json(in_format_1("fold", "coverage", folded=FOLDED, config_changes=changes))


def edited(path: list[Any], value: Any) -> str:
    data = json.loads(MANIFEST.to_json())
    here = data
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["seed"], "3"),
        (["seed"], True),
        (["seed"], 1.5),
        (["method"], "other"),
        (["profile"], 3),
        (["base"], None),
        (["base", "name"], None),
        (["base", "commit"], 3),
        (["unknown"], 1),
        (["factored"], {}),
        (["factored", 0], "x"),
        (["factored", 0, "alpha"], [1e4]),
        (["factored", 1, "out_features"], "4"),
        (["factored", 0, "singular_values"], [1.0, "x"]),
        (["factored", 0, "gauge"], "round"),
        (["folded", 0, "slices", 1, "exponents"], [None]),
        (["folded", 0, "channels"], 3),
        (["shards"], []),
        (["shards", "model.safetensors"], 0),
        (["folded", 0, "slices", 1, "indices"], None),
        (["schedule"], "staircase"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_field_of_another_type_is_named(path: list[Any], value: Any) -> None:
    with pytest.raises(SpecDefError) as raised:
        Manifest.from_json(edited(path, value), "dir/specdef.json")
    assert raised.value.problem.startswith("dir/specdef.json is not a valid manifest")
    assert str(next(key for key in reversed(path) if isinstance(key, str))) in raised.value.problem


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", "[" * 100_000])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(SpecDefError, match="not a valid manifest"):
        Manifest.from_json(text)


def test_another_format_is_named() -> None:
    with pytest.raises(SpecDefError, match="has format 3; this version reads formats 1 and 2"):
        Manifest.from_json(edited(["format"], 3))


def test_numbers_that_json_writes_without_a_point_are_floats() -> None:
    found = Manifest.from_json(edited(["factored", 0, "alpha"], 10000))
    assert found == MANIFEST
    assert type(found.factored[0].alpha) is float
