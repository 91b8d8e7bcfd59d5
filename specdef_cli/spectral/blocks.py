"""Products with a large matrix, a few rows at a time.

A weight is stored in two bytes an element and computed with in four or eight. Casting it as a whole takes longer than
the arithmetic, because the operating system has to find and clear fresh memory for the copy. A block of rows stays in
the processor's cache instead: a dozen times faster to cast, and peak memory does not grow with the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 2 MiB in float32: best of those tried between half and eight times as much, on 1 MiB of second-level cache a core.
BLOCK_ELEMENTS = 2**19


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive slices of the rows of a matrix, of about ``BLOCK_ELEMENTS`` elements each."""
    height = max(1, BLOCK_ELEMENTS // max(1, columns))
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def product(matrix: Tensor, vectors: Tensor) -> Tensor:
    """M X, shape [m, p], in the precision of X.

    Args:
        matrix: M, shape [m, n], in any floating dtype.
        vectors: X, shape [n, p].
    """
    return torch.cat([matrix[rows].to(vectors.dtype) @ vectors for rows in row_blocks(*matrix.shape)])


def transposed_product(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Xᵀ M, shape [p, n], in the precision of X.

    Args:
        vectors: X, shape [m, p].
        matrix: M, shape [m, n], in any floating dtype.
    """
    total = vectors.new_zeros(vectors.shape[1], matrix.shape[1])
    for rows in row_blocks(*matrix.shape):
        total.addmm_(vectors[rows].mT, matrix[rows].to(vectors.dtype))
    return total
