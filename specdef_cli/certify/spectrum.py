"""Are the stored weights what the manifest says was done? Read from the files, not from the record of writing them.

Of factors the largest singular values of the stored W~ must be α times those of W that the manifest lists. Of
a fold every changed tensor must be the base's, multiplied by the manifest's powers of two, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from specdef_cli.checkpoint.headers import TORCH_DTYPES
from specdef_cli.checkpoint.manifest import FactoredLayer, Manifest, ScaledModule, ScaledSlice
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.shards import scale_slice
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.scale import scale_vector
from specdef_cli.model.described import require_as_described
from specdef_cli.spectral.subspace import layer_seed, top_subspace

TOLERANCE = 0.02
"""Relative error of a singular value: bfloat16 storage alone costs some 1e-3."""

SMALLEST = 1e-3
"""Values below this share of the largest one count as that much: of a weight of rank below k they are rounding."""


@dataclass(frozen=True)
class LayerSpectrum:
    """The top of one inflated layer's spectrum."""

    module: str
    """Path of the layer."""
    planned: tuple[float, ...]
    """α times the k largest singular values of W, largest first."""
    measured: tuple[float, ...]
    """The k largest singular values of the stored W~; infinite where it holds NaN or infinity."""

    @property
    def worst(self) -> float:
        """The largest relative difference between the two."""
        smallest = SMALLEST * max(self.planned)
        pairs = zip(self.measured, self.planned, strict=True)
        return max(abs(found - wanted) / max(wanted, smallest) for found, wanted in pairs)


@dataclass(frozen=True)
class SpectrumFigures:
    """What the stored weights turned out to be."""

    layers: tuple[LayerSpectrum, ...]
    """The layers that are stored as factors."""
    folded_tensors: int
    """How many tensors a fold changed."""
    deviating: tuple[str, ...]
    """Names of those that are not the base's times the manifest's powers of two."""
    largest_exponent: int
    """Of the fold; 0 without one."""

    @property
    def as_planned(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.deviating and all(layer.worst <= TOLERANCE for layer in self.layers)


def measure_spectrum(base: Checkpoint, hardened: Checkpoint, manifest: Manifest) -> SpectrumFigures:
    """Check every changed tensor, one in memory at a time."""
    require_as_described(hardened, manifest)
    slices: dict[str, list[ScaledSlice]] = {}
    for pair in manifest.folded:
        for part in pair.slices:
            slices.setdefault(part.tensor, []).append(part)
    deviating = [name for module in manifest.scaled for name in _deviating(base, hardened, module)]
    for name, parts in slices.items():
        if name not in base.tensors:
            raise SpecDefError(f"the base has no {name}, which {hardened.directory} was made from", "Give its base.")
        expected = base.read(name).to(TORCH_DTYPES[hardened.tensors[name].dtype])
        for part in parts:
            scale_slice(expected, part)
        if not torch.equal(expected, hardened.read(name)):
            deviating.append(name)
    scaled = [part for module in manifest.scaled for part in module.slices]
    changed = [*scaled, *(part for parts in slices.values() for part in parts)]
    return SpectrumFigures(
        layers=tuple(_layer(hardened, layer) for layer in manifest.factored),
        folded_tensors=len(slices) + len({part.tensor for part in scaled}),
        deviating=tuple(deviating),
        largest_exponent=max((abs(value) for part in changed for value in part.exponents), default=0),
    )


def _deviating(base: Checkpoint, hardened: Checkpoint, module: ScaledModule) -> Iterator[str]:
    """Tensors of a scaled module that are not the base's times the manifest's powers of two, or do not undo them."""
    stored = {module.tensor: module.inflated_tensor, module.bias: module.inflated_bias}
    for name in dict.fromkeys(part.tensor for part in module.slices):
        if name not in base.tensors:
            raise SpecDefError(f"the base has no {name}, which {hardened.directory} was made from", "Give its base.")
        tensor = stored[name]
        assert tensor is not None
        expected = base.read(name).to(TORCH_DTYPES[hardened.tensors[tensor].dtype])
        for part in module.slices:
            if part.tensor == name:
                scale_slice(expected, part)
        if not torch.equal(expected, hardened.read(tensor)):
            yield tensor
    for name, side in module.scales.items():
        found = hardened.read(name)
        if not torch.equal(scale_vector(module.shape[side.axis], side, found.dtype), found):
            yield name


def _layer(hardened: Checkpoint, layer: FactoredLayer) -> LayerSpectrum:
    weight = hardened.read(layer.inflated_tensor).float()
    planned = tuple(layer.alpha * value for value in layer.singular_values)
    if not torch.isfinite(weight).all():
        return LayerSpectrum(layer.module, planned, (math.inf,) * len(planned))
    found = top_subspace(weight, layer.top_k, layer_seed(1, layer.tensor)).singular_values
    return LayerSpectrum(layer.module, planned, tuple(found.tolist()))
