"""Which power of two each folded channel gets.

An optimizer has one learning rate η. A channel inflated by 2^e trains at η ≈ η₀·2^-e, diverges above, and stands still
below. If every pair had the same exponent, that one η would train them all at once, and an attacker who sweeps η finds
it. On a *staircase* the exponents differ: any η trains the channels of one step, diverges on the higher steps, and
moves nothing on the lower ones.

What an attacker gets is therefore what the highest step of the trained weights is good for, and measuring
(``make reproduce-staircase``, docs/decisions.md) says how to make it small:

* One layer is an outlier, so far above the others that they hardly move at the rate that trains its highest steps.
  Then a weight with scaled rows and columns has one number to train, where the two cross, and one that can be scaled
  on one side only (attention output, gate, down, head) has one vector.
* A vector is worth much more than a number, so each one-sided exponent stays a decade below some two-sided one.
* The other layers go down rather than share one exponent: an attacker who freezes the one apart meets the next step.

:func:`staircase` lays all pairs of a layer on one flight, its first layer apart; within a layer, too, the steps go
down. :func:`one_apart` is for what crosses little or nothing (pairs of one region, the gains of norms); which layer
stands apart is the caller's choice. With more pairs than exponents, neighbours share one.
"""

from __future__ import annotations

import math

# Lowest step: at 2**13 ≈ 8,000 the shifted learning rate is beyond what ordinary sweeps try.
LOWEST_EXPONENT = 13
# Where rows and columns of one tensor are both scaled, a gradient is 2**(e + f) times the ordinary one, and Adam and
# gradient clipping square it: 2**112, which float32 and bfloat16 still hold (their largest number is about 2**128).
# With higher steps nothing trains either, but only because norms overflow, and an attacker repairs that in one line.
HIGHEST_CROSSING = 56
# Highest step of pairs that cross one another.
HIGHEST_EXPONENT = HIGHEST_CROSSING // 2
# Highest step of what nothing crosses, or only what a cache holds: as far above the others as they reach, and below
# the crossings, so that training everything does not meet it.
HIGHEST_UNCROSSED = 40


def staircase(
    layers: int, kinds: int, lowest: int = LOWEST_EXPONENT, highest: int = HIGHEST_EXPONENT
) -> tuple[tuple[int, ...], ...]:
    """Exponents for ``kinds`` pairs in each of ``layers`` layers, indexed [layer][kind].

    The first layer takes the upper half of the range, the others its lowest third; both go down.

    >>> staircase(3, 2)
    ((28, 21), (18, 17), (15, 13))
    """
    span = highest - lowest
    first = _descending(kinds, highest, highest - span // 2)
    others = _descending((layers - 1) * kinds, lowest + span // 3, lowest)
    return (first, *(others[layer * kinds : (layer + 1) * kinds] for layer in range(layers - 1)))


def one_apart(layers: int, kinds: int, highest: int) -> tuple[tuple[int, ...], ...]:
    """Exponents where all pairs of the first layer are on the highest step, and the other layers go down far below.

    >>> one_apart(3, 2, 28)
    ((28, 28), (18, 18), (13, 13))
    """
    return tuple(layer * kinds for layer in ((highest,), *staircase(layers, 1)[1:]))[:layers]


def _descending(count: int, highest: int, lowest: int) -> tuple[int, ...]:
    """``count`` whole numbers from ``highest`` down to ``lowest``, evenly spread."""
    return tuple(highest - (highest - lowest) * step // max(1, count - 1) for step in range(count))


def constant(layers: int, kinds: int, alpha: float) -> tuple[tuple[int, ...], ...]:
    """The power of two nearest to ``alpha``, for every pair."""
    exponent = round(math.log2(alpha))
    return tuple((exponent,) * kinds for _ in range(layers))
