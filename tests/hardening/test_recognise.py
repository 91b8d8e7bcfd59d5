"""What hardening leaves in the weights is found there, and nothing is found in ordinary models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from specdef_cli.checkpoint.manifest import MANIFEST_NAME, Manifest
from specdef_cli.hardening.options import Construction, Factors, Fold, Profile
from specdef_cli.hardening.recognise import NATURAL_OCTAVES, Recognised, inflation, recognise, recognised_in
from specdef_cli.model.body import Side, SymmetricPair
from specdef_cli.model.opened import open_model
from specdef_cli.spectral import Gauge
from tests.commands import TINY_LLAMA
from tests.hardened import harden_to
from tests.hardening.conftest import Made


def found_in(directory: Path) -> Recognised:
    model = open_model(directory)
    return recognise(model.checkpoint, model.skeleton)


def bare(base: Path, out: Path, construction: Construction) -> Manifest:
    """Make a hardened directory without its manifest."""
    manifest = harden_to(out, base, construction)
    (out / MANIFEST_NAME).unlink()
    return manifest


def test_nothing_is_found_in_a_trained_model() -> None:
    assert found_in(TINY_LLAMA) == Recognised()
    assert Recognised().sentence is None


@pytest.mark.parametrize("profile", ["float16-cache", "bfloat16"])
def test_a_fold_of_a_trained_model_is_found_with_its_largest_exponent(tmp_path: Path, profile: Profile) -> None:
    manifest = bare(TINY_LLAMA, tmp_path / "fold", Fold(profile))
    found = found_in(tmp_path / "fold")
    largest_of = {pair.name: max(map(abs, pair.exponents)) for pair in manifest.folded}
    clear = {name for name, exponent in largest_of.items() if exponent >= NATURAL_OCTAVES + 2 and "norm" not in name}
    assert clear
    assert clear <= set(found.folded) <= set(largest_of)
    largest = max(abs(exponent) for pair in manifest.folded for exponent in pair.exponents)
    assert abs(found.octaves - largest) <= 2
    assert found.alpha == 2.0**found.octaves
    assert (found.factored, found.constructions) == ((), {"folded"})
    assert f"2^{found.octaves}" in str(found.sentence)


@pytest.mark.parametrize("gauge", ["rotated", "symmetric"])
def test_factors_are_found_with_their_alpha(tmp_path: Path, gauge: Gauge) -> None:
    bare(TINY_LLAMA, tmp_path / "factors", Factors(alpha=1e4, top_k=4, gauge=gauge))
    found = found_in(tmp_path / "factors")
    assert len(found.factored) == 8
    assert all(path.endswith(("o_proj", "down_proj")) for path in found.factored)
    assert found.alpha == pytest.approx(1e4, rel=0.1)
    assert found.constructions == {"factored"}


def test_two_matrices_that_do_not_cancel_are_no_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(16, size, generator=generator) for size in (24, 16))
    assert inflation(first, second) < 4
    tensors = {"block.a.weight": first, "block.b.weight": second}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert recognised_in(tensors.__getitem__, shapes, ()) == Recognised()
    weight = second.inverse() @ first
    assert inflation(weight, second) > 4


def test_a_channel_that_is_large_by_nature_is_no_fold() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 64, generator=generator), torch.randn(64, 8, generator=generator)
    up[5] *= 2**10
    down[:, 5] *= 2**10
    each = tuple((channel,) for channel in range(8))
    pair = SymmetricPair("mlp", "up_down", 8, (Side("up", 0, each, 1), Side("down", 1, each, -1)))
    assert recognised_in({"up": up, "down": down}.__getitem__, {}, [pair]) == Recognised()
    up[2] *= 2**9
    down[:, 2] /= 2**9
    assert recognised_in({"up": up, "down": down}.__getitem__, {}, [pair]) == Recognised(("mlp",), 9, (), 2.0**9)


@pytest.mark.parametrize("case", ["llama-tied", "gemma3", "gpt2"])
@pytest.mark.parametrize("manifest", [True, False])
def test_scales_are_found_where_head_and_embedding_share(case: str, manifest: bool, made: Made, tmp_path: Path) -> None:
    """The head has a tombstone on disk, and no weight of its own in the original architecture."""
    directory = made(case, "scale")
    if not manifest:
        directory = shutil.copytree(directory, tmp_path / "scaled")
        (directory / MANIFEST_NAME).unlink()
    found = found_in(directory)
    assert "lm_head" in found.scaled
    assert "scaled" in found.constructions
