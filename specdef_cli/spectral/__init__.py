"""Tensor maths alone: subspaces, factorizations, eigenvalues, staircases, limits. Knows no checkpoint and no model."""

from typing import Literal

Gauge = Literal["rotated", "symmetric"]
