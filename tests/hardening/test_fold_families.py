"""harden --method fold → plain transformers computes every bit of the base; collapse → every byte is back.

The judge of the function is a process to which this package does not exist.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specdef_cli.checkpoint.manifest import Manifest, read_manifest
from specdef_cli.hardening.options import CollapseOptions, Fold, HardenOptions
from specdef_cli.hardening.run import collapse, harden
from specdef_cli.model.shim import SHIM_SOURCE
from tests.commands import call_cli, environment
from tests.tiny_families import CASES, write_case
from tests.weights import tensors

# Case → kinds that a fold uses there. up_down is absent where an activation stands between the two weights,
# norm_readers where gains are stored as 1+w or do not exist, query_key and value_output where a clamp follows.
ATTENTION = {"value_output", "query_key"}
EVERY = ATTENTION | {"up_down", "norm_readers"}
KINDS = {
    **dict.fromkeys(CASES, EVERY),
    **dict.fromkeys(("gpt2", "gpt-neox", "gpt-neox-serial", "bert", "roberta", "vit", "gpt-oss"), EVERY - {"up_down"}),
    **dict.fromkeys(("gemma2", "olmo", "olmo2-bias"), EVERY - {"norm_readers"}),
    "gemma3": {"value_output", "up_down"},
    "olmo-clip": {"up_down"},
}
# What loads each folded directory: the dtype, and how the directory was made.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "sharded": {"max_shard_size": 12_000},
    "bfloat16 profile": {"construction": Fold("bfloat16")},
    "quantizable": {"construction": Fold("quantizable", "none")},
}
SHARDED = ("llama", "gpt2", "mixtral-stacked")  # elsewhere, the same bytes in other files
Make = Callable[[str, str], Path]
PROGRAM = Path(__file__).with_name("plain_transformers.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def build(case: str) -> Path:
        if case not in made:
            made[case] = write_case(case, root / case)
        return made[case]

    return build


@pytest.fixture(scope="module")
def folded(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("folds")
    made: set[tuple[str, str]] = set()

    def build(case: str, variant: str) -> Path:
        out = root / f"{case}-{variant}"
        if (case, variant) not in made:
            harden(HardenOptions(str(base(case)), out, verify=False, **VARIANTS[variant]))
            made.add((case, variant))
        return out

    return build


@pytest.fixture(scope="module")
def judged(base: Callable[[str], Path], folded: Make) -> dict[str, dict[str, list[str]]]:
    """What the other process found, by ``case variant``."""
    jobs = [
        {
            "name": f"{case} {variant}",
            "base": str(base(case)),
            "folded": str(folded(case, variant)),
            "dtype": "bfloat16" if variant == "bfloat16" else "float32",
        }
        for case in CASES
        for variant in VARIANTS
        if variant != "sharded" or case in SHARDED
    ]
    return judged_elsewhere(jobs)


def judged_elsewhere(jobs: list[dict[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """What a process that has nothing but transformers finds, by the name of each job."""
    process = subprocess.run(
        [sys.executable, PROGRAM],
        input=json.dumps(jobs),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found: dict[str, dict[str, list[str]]] = json.loads(process.stdout)
    assert len(found) == len(jobs)
    return found


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        # As bytes: -0.0 is not 0.0 here.
        left, right = (value.contiguous().reshape(-1).view(torch.uint8) for value in (found[name], tensor))
        assert torch.equal(left, right), name


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_computes_every_bit_of_the_base(case: str, judged: dict[str, Any], folded: Make) -> None:
    mine = {name: result for name, result in judged.items() if name.split()[0] == case}
    assert len(mine) == len(VARIANTS) - (case not in SHARDED)
    for name, result in mine.items():
        assert result["different"] == [], name
        assert "eager" in result["compared"]
        if not case.startswith(("bert", "roberta", "vit", "t5-encoder", "llama-base", "llama-classifier")):
            assert "generation" in result["compared"]
        if case not in ("gpt-oss", "gemma2") and not case.startswith("t5"):  # those have no SDPA in transformers
            assert "sdpa" in result["compared"]
    assert not (folded(case, "float32") / SHIM_SOURCE.name).exists()


@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_the_family_is_folded_far(case: str, base: Callable[[str], Path], folded: Make) -> None:
    """The counterpart to unchanged outputs: the weights did change, in both directions, and only in range."""
    manifest = read_manifest(folded(case, "float32"))
    assert {pair.kind for pair in manifest.folded} == KINDS[case]
    assert manifest.method == "fold"
    assert manifest.profile == "float16-cache"
    for pair in manifest.folded:
        assert len(pair.channels) == len(set(pair.channels)) == 2, pair.name
        up, down = pair.exponents
        if pair.kind in ("value_output", "query_key"):  # what a float16 cache holds
            assert (up, down) == (9, -9)
        else:
            assert 13 <= up <= 47
            assert -47 <= down <= -13
    assert highest_crossing(manifest) <= 56
    before, after = tensors(base(case)), tensors(folded(case, "float32"))
    touched = {part.tensor for pair in manifest.folded for part in pair.slices}
    for name, tensor in after.items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, before[name]) == (name not in touched), name
    assert len(list(folded(case, "sharded").glob("*.safetensors"))) > 2


def highest_crossing(manifest: Manifest) -> int:
    """The largest sum of a row's and a column's exponent in one tensor (or block of one), without their signs."""
    exponents: dict[tuple[str, int | None], dict[int, int]] = {}
    for pair in manifest.folded:
        for part in pair.slices:
            by_axis = exponents.setdefault((part.tensor, part.block), {})
            by_axis[part.axis] = max(by_axis.get(part.axis, 0), *map(abs, part.exponents))
    return max(sum(by_axis.values()) for by_axis in exponents.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["float32", "bfloat16", "sharded"])
def test_collapse_gives_every_byte_back(
    case: str, variant: str, base: Callable[[str], Path], folded: Make, tmp_path: Path
) -> None:
    result = collapse(CollapseOptions(str(folded(case, variant)), tmp_path / "back"))
    assert result is not None
    assert result.parameters_removed == 0
    expected = tensors(base(case))
    if variant == "bfloat16":
        expected = {name: tensor.bfloat16() for name, tensor in expected.items()}
    assert_same_bytes(tensors(tmp_path / "back"), expected)
    config, original = (json.loads((where / "config.json").read_text()) for where in (tmp_path / "back", base(case)))
    if variant == "bfloat16":
        original["dtype"] = "bfloat16"
    assert config == original


def test_the_two_tensors_of_a_pair_may_lie_in_different_shards(folded: Make, base: Callable[[str], Path]) -> None:
    directory = folded("llama", "sharded")
    where = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    apart = [
        pair.name for pair in read_manifest(directory).folded if len({where[part.tensor] for part in pair.slices}) > 1
    ]
    assert len(apart) > 3
    assert_same_bytes(tensors(directory), tensors(folded("llama", "float32")))


@pytest.mark.parametrize("case", CASES)
def test_the_default_folds_and_adds_no_code(
    case: str, base: Callable[[str], Path], folded: Make, tmp_path: Path
) -> None:
    result = harden(HardenOptions(str(base(case)), tmp_path / "out"))
    assert result is not None
    manifest = result.manifest
    assert manifest.method == "fold"
    assert manifest.folded == read_manifest(folded(case, "float32")).folded
    assert manifest.verification["equal"]
    assert not (tmp_path / "out" / SHIM_SOURCE.name).exists()
    assert len(result.notes) == len(set(result.notes))
    assert all(len(note) < 400 for note in result.notes)


def test_the_notes_name_what_is_left_and_why(base: Callable[[str], Path], tmp_path: Path) -> None:
    def notes(case: str, *arguments: str) -> str:
        result = call_cli("harden", base(case), "--out", tmp_path / "x", "--dry-run", "--json", *arguments)
        assert result.code == 0, result.stderr
        return "\n".join(json.loads(result.stdout)["notes"])

    assert "Not hardened: model.embed_tokens, model.norm. Training these" in notes("llama-tied")
    assert "mlp.experts.down_proj," in notes("gpt-oss")
    assert "1+w" in notes("gemma2")
