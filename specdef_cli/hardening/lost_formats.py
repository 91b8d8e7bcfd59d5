"""What a hardened checkpoint does not survive, told from its factors.

A factor does harm where a format gives one scale to neighbours, or ends at 65504. Rows of a weight have scales of their
own in every format that is common today; columns share theirs, in the weight and in the activations that are read, so
that an inflated column takes its neighbours' digits. Measured with the real tools (docs/formats.md): a fold is garbage
there without a message, but for llama.cpp's quantizer, which stops; where code comes with the model, llama.cpp and
bitsandbytes stop before they begin, and float16 is garbage all the same.

A merge adds the weights of two models: a scaled channel and its plain one give neither.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdef_cli.checkpoint.manifest import FoldedPair
from specdef_cli.hardening.fold import CACHED_EXPONENT, CACHED_KINDS

BLOCKS = ("float16 weights", "8- and 4-bit quantization (bitsandbytes, GGUF)", "float8")
CACHE = "a float16 key/value cache (llama.cpp's default)"
MERGES = "merging with models that are not hardened alike"


def lost_formats(folded: Sequence[FoldedPair], *, inserted: bool) -> tuple[str, ...]:
    """The formats in which the result is not expected to compute what the base does.

    Args:
        folded: The rescaled pairs.
        inserted: Whether layers were replaced.

    Returns:
        Names for a sentence.
    """
    rows_alone = all(pair.kind == "query_key" for pair in folded) and not _beyond_float16(folded)
    found = BLOCKS if inserted or not rows_alone else ()
    cache = (CACHE,) if _beyond_float16(folded) else ()
    return (*found, *cache, MERGES)


def serving_advice(lost: Sequence[str]) -> str:
    """What :func:`lost_formats` found, in a sentence or two."""
    dtype = "" if set(lost) <= {MERGES} else "Serve it in float32 or bfloat16. "
    return f"{dtype}It does not survive: {', '.join(lost)}."


def _beyond_float16(folded: Sequence[FoldedPair]) -> bool:
    return any(
        abs(exponent) > CACHED_EXPONENT for pair in folded if pair.kind in CACHED_KINDS for exponent in pair.exponents
    )
