"""What a hardened checkpoint does not survive, told from its factors.

A factor does harm where a format gives one scale to neighbours, or ends at 65504. Rows of a weight have scales of their
own in every format that is common today; columns share theirs, in the weight and in the activations that are read, so
that an inflated column takes its neighbours' digits. Measured with the real tools (docs/formats.md): a fold is garbage
there without a message, but for llama.cpp's quantizer, which stops; where code comes with the model, llama.cpp and
bitsandbytes stop before they begin, and float16 is garbage all the same.

Rows survive 4 bits, but not double quantization, whose scales of 64 weights share a scale of their own across rows.

A merge adds the weights of two models: a scaled channel and its plain one give neither.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdef_cli.checkpoint.manifest import FoldedPair
from specdef_cli.hardening.fold import CACHED_EXPONENT, CACHED_KINDS

FLOAT16 = "float16 weights"
BLOCKS = "8- and 4-bit quantization (bitsandbytes, torchao, GGUF)"
DOUBLE = "double quantization (bitsandbytes)"
FLOAT8 = "float8"
CACHE = "a float16 key/value cache or llama.cpp's flash attention (its defaults)"
MERGES = "merging with models that are not hardened alike"
LLAMA_CPP_BLOCKS = "llama.cpp's quantized files (Q8_0, Q4_0, Q4_K_M)"
LLAMA_CPP_4_BITS = "llama.cpp's 4-bit files (Q4_K_M: 4 % of SmolLM2's perplexity)"
W8A8 = "engines that quantize activations by token (w8a8)"

SCALED_LOADERS = (
    "It brings code to load, with trust_remote_code=True or `import specdef_cli`. What does not run it stops with an "
    "error: llama.cpp, bitsandbytes, mergekit, and the defaults of PEFT's LoRA and TRL's SFTTrainer."
)
"""Of scaled modules, as measured; none of it is silent."""

NARROW_EXPONENT = CACHED_EXPONENT
"""Factors up to this power of two leave weights within float16, and within float8 with a scale a row."""


def lost_formats(folded: Sequence[FoldedPair], profile: str | None, *, with_code: bool) -> tuple[str, ...]:
    """The formats in which the result is not expected to compute what the base does."""
    if folded and not with_code and all(pair.given_up is not None for pair in folded):
        return (LLAMA_CPP_4_BITS if profile == "gguf" else LLAMA_CPP_BLOCKS, DOUBLE, W8A8, MERGES)
    wide = with_code or _beyond(folded, NARROW_EXPONENT)
    columns = wide or any(pair.kind != "query_key" for pair in folded)
    cached = [pair for pair in folded if pair.kind in CACHED_KINDS]
    expected = {
        FLOAT16: wide,
        BLOCKS: columns,
        DOUBLE: not columns,
        FLOAT8: wide,
        CACHE: _beyond(cached, CACHED_EXPONENT),
        MERGES: True,
    }
    return tuple(name for name, lost in expected.items() if lost)


def serving_advice(lost: Sequence[str]) -> str:
    """What :func:`lost_formats` found, in a sentence or two."""
    dtype = "Serve it in float32 or bfloat16. " if FLOAT16 in lost or CACHE in lost else ""
    return f"{dtype}It does not survive: {', '.join(lost)}."


def given_up(folded: Sequence[FoldedPair]) -> str:
    """What formats lose that round the smallest columns to zero, in a sentence; empty where nothing is known of it."""
    shares = {pair.name: pair.given_up for pair in folded if pair.given_up}
    if not shares:
        return ""
    worst = max(shares, key=lambda name: shares[name])
    return (
        f"Quantized, it loses {len(shares)} channels, one a pair: at most {shares[worst]:.2%} of what the pair's "
        f"readers put out ({worst}), as energy."
    )


def _beyond(folded: Sequence[FoldedPair], limit: int) -> bool:
    return any(abs(exponent) > limit for pair in folded for exponent in pair.exponents)
