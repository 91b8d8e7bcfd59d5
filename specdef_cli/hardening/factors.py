"""Factors: the paper's Algorithm 1 on one layer of a checkpoint: read W, write W~ and C, say how well C·W~ restores W.

Where the layer's weight stood, a *tombstone* stays: one element under the original name. A loader that does not know
about the pair then fails on a size mismatch; a missing tensor it would only re-initialise, with a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdef_cli.checkpoint.changes import FactoredLayer, LinearLayer
from specdef_cli.checkpoint.reader import TORCH_DTYPES, Checkpoint
from specdef_cli.checkpoint.shards import Produced, TensorGroup, TensorSpec
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import Factors
from specdef_cli.model.sites import LinearSite, require_findable
from specdef_cli.model.skeleton import Skeleton
from specdef_cli.spectral.factors import (
    RECONSTRUCTION_TOLERANCE,
    check_alpha,
    gaussian_probes,
    reconstruction_error,
    rotated_factors,
    round_down,
    symmetric_factors,
)
from specdef_cli.spectral.subspace import layer_seed, product, top_subspace


@dataclass(frozen=True)
class FactorLayer:
    """The transform that replaces one linear by its two factors, stored in a safetensors dtype."""

    layer: FactoredLayer
    dtype: str
    seed: int

    def group(self) -> TensorGroup:
        outputs = (TensorSpec(name, self.dtype, shape) for name, shape in self.layer.stored.items())
        return TensorGroup(self.layer.module, tuple(outputs), self)

    def __call__(self, checkpoint: Checkpoint, device: torch.device) -> Produced:
        layer, stored = self.layer, TORCH_DTYPES[self.dtype]
        weight = read_weight(checkpoint, layer, device)
        seed = layer_seed(self.seed, layer.tensor)
        subspace = top_subspace(weight, layer.top_k, seed)
        build = rotated_factors if layer.gauge == "rotated" else symmetric_factors
        factors = build(weight, subspace.basis, layer.alpha, stored)
        probes = gaussian_probes(weight.shape[1], seed, device).to(subspace.basis.dtype)
        error = reconstruction_error(product(weight, probes), factors, probes)
        self._require_restored(error)
        tensors = {
            layer.inflated_tensor: factors.inflated,
            layer.compensation_tensor: factors.compensation,
            layer.tensor: torch.zeros(1, dtype=stored),
        }
        if layer.bias is not None and layer.compensation_bias is not None:
            tensors[layer.compensation_bias] = checkpoint.read(layer.bias).to(stored)
        return Produced(tensors, {"singular_values": subspace.singular_values.tolist(), "reconstruction_error": error})

    def _require_restored(self, error: float) -> None:
        layer = self.layer
        if error <= RECONSTRUCTION_TOLERANCE:  # NaN fails this too
            return
        hint = "Use a smaller --alpha, or --dtype float32."
        if layer.gauge == "symmetric" and error < float("inf"):
            # The error of this gauge is proportional to α, but for some noise.
            safe = round_down(max(1.0, 0.8 * layer.alpha * RECONSTRUCTION_TOLERANCE / error))
            hint = f"Use --alpha {safe:g} or less, or --gauge rotated."
        raise SpecDefError(
            f"{layer.module}: alpha {layer.alpha:g} in {self.dtype} leaves a relative error of {error:.2g}", hint
        )


@dataclass(frozen=True)
class CollapseLayer:
    """The transform that multiplies a pair of factors back into one weight."""

    layer: FactoredLayer
    dtype: str

    def group(self) -> TensorGroup:
        outputs = (TensorSpec(name, self.dtype, shape) for name, shape in self.layer.original.items())
        return TensorGroup(self.layer.module, tuple(outputs), self)

    def __call__(self, checkpoint: Checkpoint, device: torch.device) -> Produced:
        """Compute W = C·W~, in float64: C W~ cancels a factor of α, and float32 would lose that many digits."""
        layer, stored = self.layer, TORCH_DTYPES[self.dtype]
        compensation = checkpoint.read(layer.compensation_tensor).to(device).double()
        weight = compensation @ checkpoint.read(layer.inflated_tensor).to(device).double()
        tensors = {layer.tensor: (weight.mT.contiguous() if layer.transposed else weight).to(stored)}
        if layer.bias is not None and layer.compensation_bias is not None:
            tensors[layer.bias] = checkpoint.read(layer.compensation_bias)
        return Produced(tensors)


def factor_layers(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    sites: Sequence[LinearSite],
    wanted: Factors,
    dtype: str | None,
    loaded: torch.dtype | None,
) -> tuple[FactoredLayer, ...]:
    """Plan the factors of every site, from headers alone."""
    layers = []
    planned: dict[str, Any] = {"alpha": wanted.alpha, "top_k": wanted.top_k, "gauge": wanted.gauge}
    for site in sites:
        stored = TORCH_DTYPES[dtype or checkpoint.tensors[site.tensor].dtype]
        check_alpha(wanted.alpha, wanted.gauge, stored)
        if loaded is not None and loaded is not stored:
            check_alpha(wanted.alpha, wanted.gauge, loaded, ", in which config.json has the model loaded,")
        rank = min(site.out_features, site.in_features)
        if wanted.top_k > rank:
            raise SpecDefError(
                f"top-k {wanted.top_k} is more than the rank of {site.module} ({site.out_features}×{site.in_features})",
                f"Use --top-k {rank} or less, or --exclude '{site.module}'.",
            )
        linear = {name: value for name, value in vars(site).items() if name != "role"}
        layers.append(FactoredLayer(**linear, **planned, singular_values=(), reconstruction_error=0.0))
    require_findable(skeleton, layers)
    return tuple(layers)


def factor_groups(
    layers: Iterable[FactoredLayer], checkpoint: Checkpoint, dtype: str | None, seed: int
) -> dict[str, TensorGroup]:
    """The output groups of all replaced layers, by the name of the base's weight."""
    return {
        layer.tensor: FactorLayer(layer, dtype or checkpoint.tensors[layer.tensor].dtype, seed).group()
        for layer in layers
    }


def read_weight(checkpoint: Checkpoint, site: LinearLayer, device: torch.device) -> Tensor:
    """W as it is stored, shape [out_features, in_features]; refused where it is not finite or zero."""
    weight = checkpoint.read(site.tensor).to(device)
    if site.transposed:
        weight = weight.mT.contiguous()
    extremes = torch.stack(torch.aminmax(weight))  # NaN if any element is
    if not extremes.isfinite().all():
        raise SpecDefError(f"{site.tensor} holds NaN or infinity", f"Repair it, or --exclude '{site.module}'.")
    if not extremes.any():
        raise SpecDefError(f"{site.tensor} is zero: there is nothing to inflate", f"--exclude '{site.module}'.")
    return weight
