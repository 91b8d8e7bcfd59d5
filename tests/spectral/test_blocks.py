"""Products by blocks of rows against the same products made at once in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdef_cli.spectral import subspace as blocks
from specdef_cli.spectral.subspace import product, row_blocks, transposed_product


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 3000), columns=st.integers(0, 3000))
def test_blocks_cover_every_row_once(rows: int, columns: int) -> None:
    covered = [row for block in row_blocks(rows, columns) for row in range(block.start, block.stop)]
    assert covered == list(range(rows))


@pytest.mark.parametrize("elements", [1, 100, 2**19])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_made_in_the_precision_of_the_vectors(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)  # one row at a time, some rows with a shorter rest, all
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(23, 31, generator=generator).to(dtype)
    right = torch.randn(31, 4, generator=generator, dtype=torch.float64)
    left = torch.randn(23, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(product(matrix, right), matrix.double() @ right, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(transposed_product(left, matrix), left.mT @ matrix.double(), rtol=1e-13, atol=1e-13)
    assert product(matrix, right.float()).dtype == torch.float32
    assert transposed_product(left.float(), matrix).dtype == torch.float32
