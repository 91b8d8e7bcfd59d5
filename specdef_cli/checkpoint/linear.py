"""A linear layer by its names in the model and on disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer y = Wx (+ b), W ∈ R^{m×n}, whose weight is one tensor on disk.

    Attributes:
        module: Path of the layer in the transformers model, e.g. ``model.layers.0.self_attn.o_proj``.
        tensor: Name of the weight on disk; it ends in ``.weight``.
        out_features: m, the length of y.
        in_features: n, the length of x.
        bias: Name of the bias on disk, or ``None``.
        transposed: Whether the tensor on disk is Wᵀ (transformers' ``Conv1D``).
    """

    module: str
    tensor: str
    out_features: int
    in_features: int
    bias: str | None
    transposed: bool
