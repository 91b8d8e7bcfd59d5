"""The rate at which descent is seen to diverge, on a quadratic: 2/σ₁."""

from __future__ import annotations

import math

import pytest
import torch

from tests.certify.test_curvature import leaf, quadratic
from tests.examples.test_bound import script

observed_divergence_rate = script("descent").observed_divergence_rate


@pytest.mark.parametrize(("largest", "guess"), [(0.3, 1.0), (40.0, 1e-3), (40.0, 500.0)])
def test_descent_on_a_quadratic_diverges_at_two_over_sigma(largest: float, guess: float) -> None:
    point, loss = quadratic(torch.tensor([largest, 0.2, 0.1], dtype=torch.float64))
    before = point.detach().clone()
    found = observed_divergence_rate(loss, [point], around=guess * 2 / largest, steps=200)
    assert found.stable < 2 / largest * 1.02
    assert found.divergent > 2 / largest
    assert found.divergent / found.stable <= 1.05
    assert found.value == pytest.approx(2 / largest, rel=0.05)
    assert torch.equal(point, before)


def test_no_divergence_where_there_is_none() -> None:
    point = leaf(1.0)
    bounded = observed_divergence_rate(lambda: torch.tanh(point).sum(), [point], around=1.0, steps=3)
    assert bounded.divergent == math.inf
    assert bounded.stable == bounded.value > 1e8
