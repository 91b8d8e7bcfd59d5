"""The staircase of exponents, up to the depth of the largest published models."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdef_cli.hardening.fold import (
    HIGHEST_EXPONENT,
    HIGHEST_UNCROSSED,
    LOWEST_EXPONENT,
    constant,
    one_apart,
    staircase,
)

# Layers of Llama 3.1 70B and 405B, and one more group for the final norm; five pairs in two directions.
DEEP = [(81, 10), (127, 10)]


def flat(steps: tuple[tuple[int, ...], ...]) -> list[int]:
    return list(itertools.chain.from_iterable(steps))


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 13), st.integers(0, 40))
def test_every_step_is_in_range_and_none_goes_up(layers: int, kinds: int, lowest: int, span: int) -> None:
    steps = staircase(layers, kinds, lowest, lowest + span)
    assert [len(layer) for layer in steps] == [kinds] * layers
    exponents = flat(steps)
    assert exponents[0] == lowest + span
    assert all(lowest <= exponent <= lowest + span for exponent in exponents)
    assert exponents == sorted(exponents, reverse=True)
    if layers > 1 and (layers - 1) * kinds > 1:
        assert exponents[-1] == lowest


@pytest.mark.parametrize(("layers", "kinds"), [(2, 1), (4, 10), (16, 10), *DEEP])
def test_at_the_rate_that_trains_the_first_layer_the_others_stand_still(layers: int, kinds: int) -> None:
    first, *others = staircase(layers, kinds)
    highest_of_the_others = max(flat(tuple(others)))
    assert first[0] - highest_of_the_others >= 10
    assert first[(kinds - 1) // 2] - highest_of_the_others >= 6, "the half of the pairs that come first"
    assert first[-1] > highest_of_the_others


@pytest.mark.parametrize(("layers", "kinds"), DEEP)
def test_in_a_deep_model_neighbours_share_and_the_lower_exponents_are_used_alike(layers: int, kinds: int) -> None:
    counts = Counter(flat(staircase(layers, kinds)[1:]))
    assert set(counts) == set(range(LOWEST_EXPONENT, 19))
    above_the_lowest = [count for exponent, count in counts.items() if exponent != LOWEST_EXPONENT]
    assert max(above_the_lowest) - min(above_the_lowest) <= 1


@pytest.mark.parametrize(("layers", "kinds"), [(4, 10), (16, 10), *DEEP])
def test_whoever_freezes_the_first_layers_meets_the_next_steps(layers: int, kinds: int) -> None:
    """Each kind alone goes down over the layers that are left, as far as there are exponents."""
    for kind in zip(*staircase(layers, kinds)[1:], strict=True):
        assert kind[0] - kind[-1] >= 5 * (layers - 2) // (layers - 1) - 1
        assert len(set(kind)) >= min(layers - 1, 5)


@given(st.integers(0, 400), st.integers(1, 8), st.sampled_from([HIGHEST_EXPONENT, HIGHEST_UNCROSSED]))
def test_one_layer_apart_leaves_every_vector_of_the_others_below_them(layers: int, kinds: int, highest: int) -> None:
    """Two scales that cross add up, and what one of the others inflates by itself is a decade and more below that."""
    exponents = one_apart(layers, kinds, highest)
    assert len(exponents) == layers
    assert exponents[:1] == ((highest,) * kinds,)[:layers]
    others = exponents[1:]
    assert all(LOWEST_EXPONENT <= step <= HIGHEST_EXPONENT for layer in others for step in layer)
    assert all(len(set(layer)) == 1 for layer in others)
    steps = [layer[0] for layer in others]
    assert steps == sorted(steps, reverse=True)
    if steps:
        assert highest - steps[0] >= 10
        assert 2 * steps[-1] - steps[0] >= 8
        assert steps[0] <= 18


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
