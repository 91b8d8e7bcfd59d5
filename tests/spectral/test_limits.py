"""Which α is refused in which dtype and gauge, and that the limits are where functions really break."""

from __future__ import annotations

import math

import pytest
import torch

from specdef_cli.errors import SpecDefError
from specdef_cli.spectral import Gauge
from specdef_cli.spectral.factors import (
    RECONSTRUCTION_TOLERANCE,
    check_alpha,
    largest_safe_alpha,
    symmetric_factors,
)
from tests.commands import refusal
from tests.spectral.test_reparameterize import stored_error


@pytest.mark.parametrize("alpha", [0.0, -0.0, -3.0, 0.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gauge", ["rotated", "symmetric"])
def test_what_is_no_factor_is_refused(alpha: float, gauge: Gauge) -> None:
    with refusal(f"{alpha:g}", "--alpha"):
        check_alpha(alpha, gauge, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gauge", ["rotated", "symmetric"])
def test_what_does_not_fit_the_dtype_is_refused(gauge: Gauge, dtype: torch.dtype) -> None:
    with pytest.raises(SpecDefError, match="1e\\+40"):
        check_alpha(1e40, gauge, dtype)
    safe = largest_safe_alpha(gauge, dtype)
    check_alpha(safe, gauge, dtype)
    check_alpha(1.0, gauge, dtype)
    with pytest.raises(SpecDefError) as raised:
        check_alpha(safe * 1.01, gauge, dtype)
    # The advice is taken as it stands: the α that it names must be accepted.
    advised = float(raised.value.hint.split("--alpha ")[1].split()[0])
    check_alpha(advised, gauge, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_limit_of_the_symmetric_gauge_is_where_the_function_breaks(dtype: torch.dtype) -> None:
    """In order of magnitude: the error's constant depends on the spectrum, and each layer checks its own."""
    limit = largest_safe_alpha("symmetric", dtype)
    assert stored_error(symmetric_factors, limit, dtype) <= 2 * RECONSTRUCTION_TOLERANCE
    assert stored_error(symmetric_factors, 10 * limit, dtype) > RECONSTRUCTION_TOLERANCE
