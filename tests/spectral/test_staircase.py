"""The staircase of exponents, up to the depth of the largest published models."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdef_cli.spectral.staircase import HIGHEST_EXPONENT, LOWEST_EXPONENT, constant, staircase

# Layers of Llama 3.1 70B and 405B, and one more group for the final norm; five pairs in two directions.
DEEP = [(81, 10), (127, 10)]


def flat(steps: tuple[tuple[int, ...], ...]) -> list[int]:
    return list(itertools.chain.from_iterable(steps))


@given(st.integers(1, 200), st.integers(1, 300))
def test_every_step_is_in_range_and_none_goes_down(layers: int, kinds: int) -> None:
    steps = staircase(layers, kinds)
    assert [len(layer) for layer in steps] == [kinds] * layers
    exponents = flat(steps)
    assert exponents[0] == LOWEST_EXPONENT
    assert all(LOWEST_EXPONENT <= exponent <= HIGHEST_EXPONENT for exponent in exponents)
    assert exponents == sorted(exponents)
    if layers * kinds > 1:
        assert exponents[-1] == HIGHEST_EXPONENT


@pytest.mark.parametrize(("layers", "kinds"), DEEP)
def test_in_a_deep_model_neighbours_share_and_every_exponent_is_used_alike(layers: int, kinds: int) -> None:
    counts = Counter(flat(staircase(layers, kinds)))
    assert set(counts) == set(range(LOWEST_EXPONENT, HIGHEST_EXPONENT + 1))
    below_the_top = [count for exponent, count in counts.items() if exponent != HIGHEST_EXPONENT]
    assert max(below_the_top) - min(below_the_top) <= 1


@pytest.mark.parametrize(("layers", "kinds"), [(4, 10), (16, 10), *DEEP])
def test_each_kind_alone_climbs_the_whole_staircase(layers: int, kinds: int) -> None:
    """An attacker may train all q_proj and nothing else."""
    span = HIGHEST_EXPONENT - LOWEST_EXPONENT
    for kind in zip(*staircase(layers, kinds), strict=True):
        assert kind[-1] - kind[0] >= span * (layers - 1) // layers - 1
        assert len(set(kind)) >= min(layers, span)


def test_with_fewer_pairs_than_exponents_no_two_are_the_same() -> None:
    assert len(set(flat(staircase(4, 4)))) == 16


@pytest.mark.parametrize(("alpha", "exponent"), [(2, 1), (1e4, 13), (8192, 13), (2.0**28, 28), (2.0**27.6, 28)])
def test_constant_takes_the_nearest_power_of_two(alpha: float, exponent: int) -> None:
    assert constant(3, 2, alpha) == ((exponent, exponent),) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_highest_step_leaves_room_for_squared_gradients(dtype: torch.dtype) -> None:
    """Where two deflated channels cross, a gradient is 2**(2·28) times the ordinary one, and Adam squares it.

    32,768 such entries of size 1 can be summed by gradient clipping, and the weights there stay normal down to 2**-70.
    """
    information = torch.finfo(dtype)
    largest = 2.0 ** (2 * HIGHEST_EXPONENT)
    assert 2.0**15 * largest**2 < information.max
    assert information.tiny <= 2.0 ** (-2 * HIGHEST_EXPONENT - 70)
