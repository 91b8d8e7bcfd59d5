"""Sizes as users write them."""

from __future__ import annotations

import pytest

from specdef_cli.errors import SpecDefError
from specdef_cli.option import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), (" 1.5 kb ", 1500), ("2GiB", 2**31), ("1tb", 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "5", "GB", "-5GB", "0GB", "0.0001KB", "5 GBs", "1..5GB", "nanGB", "infGB", "1e3GB", "9" * 400 + "GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SpecDefError) as raised:
        parse_size(text)
    assert repr(text) in raised.value.problem
    assert "5GB" in raised.value.hint
