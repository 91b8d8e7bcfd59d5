"""Every family: plain transformers computes every bit of the base, and collapse gives every byte back.

The judge of the function is a process to which this package does not exist; of scales, it runs the directory's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from specdef_cli.checkpoint.changes import ScaledModule
from specdef_cli.checkpoint.manifest import Manifest, read_manifest
from specdef_cli.hardening.options import CollapseOptions, HardenOptions
from specdef_cli.hardening.plan import make_plan
from specdef_cli.hardening.run import collapse
from specdef_cli.model.described import SHIM_SOURCE
from specdef_cli.model.opened import open_model
from tests.architectures.test_pairs import EXPECTED
from tests.commands import succeed
from tests.hardening.conftest import Judged, Made
from tests.tiny_families import CASES
from tests.weights import assert_same_bytes, tensors

# What depends on how a family stores its weights is seen in each; what depends on the way, in one of each kind.
SOME = ("llama", "phi3", "gemma3", "gpt2-untied", "gpt-neox", "bert", "t5", "mixtral", "gpt-oss")
MADE = [(case, "fold") for case in CASES]
MADE += [(case, "bfloat16") for case in SOME]
MADE += [(case, way) for way in ("bfloat16 profile", "quantizable") for case in ("llama", "gemma3", "mixtral")]
MADE += [(case, "sharded") for case in ("llama", "mixtral-stacked")]
SCALED = [(case, "scale") for case in CASES]
SCALED += [(case, "scale in bfloat16") for case in ("llama-tied", "gemma3", "gpt2")]


@pytest.fixture(scope="module")
def judged(judge: Callable[[Iterable[tuple[str, str]]], Judged]) -> Judged:
    return judge([*MADE, *SCALED])


@pytest.mark.parametrize(("case", "way"), [*MADE, *SCALED])
def test_plain_transformers_computes_every_bit_of_the_base(case: str, way: str, judged: Judged, made: Made) -> None:
    found = judged[case, way]
    assert found["different"] == []
    assert "eager" in found["compared"]
    if not case.startswith(("bert", "roberta", "vit", "t5-encoder", "llama-base", "llama-classifier")):
        assert "generation" in found["compared"]
    if case not in ("gpt-oss", "gemma2") and not case.startswith("t5"):  # those have no SDPA in transformers
        assert "sdpa" in found["compared"]
    assert (made(case, way) / SHIM_SOURCE.name).exists() == way.startswith("scale")


@pytest.mark.parametrize("case", CASES)
def test_every_pair_of_the_family_is_folded_far(case: str, checkpoints: dict[str, Path], made: Made) -> None:
    """The counterpart to unchanged outputs: the weights did change, in both directions, and only in range."""
    manifest = read_manifest(made(case, "fold"))
    plan = make_plan(open_model(checkpoints[case]), HardenOptions(str(checkpoints[case]), Path("unused")))
    assert manifest.folded == plan.folded
    assert len(plan.notes) == len(set(plan.notes))
    assert all(len(note) < 400 for note in plan.notes)
    assert manifest.verification["equal"]
    assert {pair.kind for pair in manifest.folded} == set(EXPECTED[case][0])
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
    before, after = tensors(checkpoints[case]), tensors(made(case, "fold"))
    touched = {part.tensor for pair in manifest.folded for part in pair.slices}
    for name, tensor in after.items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, before[name]) == (name not in touched), name


def highest_crossing(manifest: Manifest) -> int:
    """The largest sum of a row's and a column's exponent in one tensor (or block of one), without their signs."""
    exponents: dict[tuple[str, int | None], dict[int, int]] = {}
    for pair in manifest.folded:
        for part in pair.slices:
            by_axis = exponents.setdefault((part.tensor, part.block), {})
            by_axis[part.axis] = max(by_axis.get(part.axis, 0), *map(abs, part.exponents))
    return max(sum(by_axis.values()) for by_axis in exponents.values())


@pytest.mark.parametrize(("case", "way"), [made for made in [*MADE, *SCALED] if "pro" not in made[1]])
def test_collapse_gives_bytes_back(
    case: str, way: str, checkpoints: dict[str, Path], made: Made, tmp_path: Path
) -> None:
    result: Any = collapse(CollapseOptions(str(made(case, way)), tmp_path / "back"))
    assert (result.parameters_removed > 0) == way.startswith("scale")
    expected, config = tensors(checkpoints[case]), json.loads((checkpoints[case] / "config.json").read_text())
    if way.endswith("bfloat16"):
        expected = {name: tensor.bfloat16() for name, tensor in expected.items()}
        config["dtype"] = "bfloat16"
    assert_same_bytes(tensors(tmp_path / "back"), expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_the_two_tensors_of_a_pair_may_lie_in_different_shards(made: Made) -> None:
    directory = made("llama", "sharded")
    where = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    apart = [
        pair.name for pair in read_manifest(directory).folded if len({where[part.tensor] for part in pair.slices}) > 1
    ]
    assert len(apart) > 3
    assert_same_bytes(tensors(directory), tensors(made("llama", "fold")))


def test_the_notes_name_what_is_left_and_why(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def notes(case: str, *arguments: str) -> str:
        result = succeed("harden", checkpoints[case], "--out", tmp_path / "x", "--dry-run", "--json", *arguments)
        return "\n".join(json.loads(result.stdout)["notes"])

    assert "Not hardened: model.embed_tokens, model.norm. Training only these" in notes("llama-tied")
    assert "mlp.experts.down_proj," in notes("gpt-oss")
    assert "1+w" in notes("gemma2")


def unscaled(module: ScaledModule, files: dict[str, torch.Tensor]) -> torch.Tensor:
    """W from the files of a module that holds its own weight, in float64."""
    weight = files[f"{module.stem}.inflated.weight"].double()
    for name, side in {"output_scale": module.output, "input_scale": module.input}.items():
        if side is not None:
            scale = files[f"{module.stem}.{name}.weight"].double()
            weight = weight * scale.reshape([-1 if axis == side.axis else 1 for axis in range(weight.dim())])
    return weight


@pytest.mark.parametrize("case", CASES)
def test_vectors_times_the_stored_weight_are_the_weight(case: str, checkpoints: dict[str, Path], made: Made) -> None:
    directory = made(case, "scale")
    manifest, files, expected = read_manifest(directory), tensors(directory), tensors(checkpoints[case])
    assert manifest.method == "scale"
    assert not manifest.factored
    assert not manifest.folded
    own = [module for module in manifest.scaled if module.tied_to is None]
    for module in own:
        assert torch.equal(unscaled(module, files), expected[module.tensor].double())
        stored, plain = files[module.inflated_tensor], expected[module.tensor]
        exponents = (stored.double().abs() / plain.double().abs()).log2().nan_to_num(0)
        assert exponents.abs().max() > 12
        assert files[module.tombstone].shape == (1,)
    # What is not scaled is untouched, and nothing is stored twice.
    scaled_tensors = {name for module in own for name in (module.tensor, module.bias)}
    assert all(torch.equal(files[name], expected[name]) for name in expected.keys() - scaled_tensors if name in files)
    assert expected.keys() - scaled_tensors <= files.keys()
