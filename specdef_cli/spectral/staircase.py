"""Which power of two each folded channel gets.

An optimizer has one learning rate η. A channel inflated by 2^e trains at η ≈ η₀·2^-e, diverges above, and stands still
below. If every pair had the same exponent, that one η would train them all at once, and an attacker who sweeps η finds
it. On a *staircase* every pair has another exponent: any η trains the channels of one step, diverges on the higher
steps, and moves nothing on the lower ones.

Within one kind of weight (all q_proj, say) the steps are spread over the whole range, because an attacker may train
that kind alone; kinds take the steps between. With more pairs than exponents, neighbours share one.
"""

from __future__ import annotations

import math

# Lowest step: at 2**13 ≈ 8,000 the shifted learning rate is beyond what ordinary sweeps try.
LOWEST_EXPONENT = 13
# Highest step: where two inflated channels cross, a gradient is 2**(2·28) times the ordinary one, and Adam and gradient
# clipping square it: 2**112, which float32 and bfloat16 still hold (their largest number is about 2**128). With higher
# steps nothing trains either, but only because norms overflow, and an attacker repairs that in one line.
HIGHEST_EXPONENT = 28


def staircase(
    layers: int, kinds: int, lowest: int = LOWEST_EXPONENT, highest: int = HIGHEST_EXPONENT
) -> tuple[tuple[int, ...], ...]:
    """Exponents for ``kinds`` pairs in each of ``layers`` layers, indexed [layer][kind], from lowest to highest.

    >>> staircase(2, 2)
    ((13, 18), (23, 28))
    """
    steps = max(1, layers * kinds - 1)
    return tuple(
        tuple(lowest + (highest - lowest) * (layer * kinds + kind) // steps for kind in range(kinds))
        for layer in range(layers)
    )


def constant(layers: int, kinds: int, alpha: float) -> tuple[tuple[int, ...], ...]:
    """The power of two nearest to ``alpha``, for every pair."""
    exponent = round(math.log2(alpha))
    return tuple((exponent,) * kinds for _ in range(layers))
