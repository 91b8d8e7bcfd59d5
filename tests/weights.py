"""The weights of checkpoint directories, and how near two of them are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, by its name on disk."""
    found: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def assert_collapsed(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], changed: Collection[str], tolerance: float
) -> None:
    """The original's tensors: those that were changed within a tolerance, all others to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        if name in changed:
            assert relative(found[name], tensor) < tolerance
        else:
            assert torch.equal(found[name], tensor)


def assert_same_bytes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names, types, shapes and bits: -0.0 is not 0.0 here."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        left, right = (value.contiguous().reshape(-1).view(torch.uint8) for value in (found[name], tensor))
        assert torch.equal(left, right), name
