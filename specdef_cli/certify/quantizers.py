"""What a weight becomes once an engine has quantized it: each function rounds a matrix and returns it in float32.

A hardened checkpoint will be quantized by others, with their tools. So the rounding is that of the real libraries where
they have it: bitsandbytes for LLM.int8 and NF4, the ``gguf`` package for llama.cpp's block formats. Both are optional
(``pip install specdef-cli[deploy]``) and imported when first used. ``gguf`` can only read Q4_K, so that quantizer is
written here after llama.cpp's reference; its blocks are packed in llama.cpp's layout and read back by ``gguf``.

Only weights are rounded. What an engine does to activations comes on top.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Quantizer = Callable[[Tensor], Tensor]
"""W of shape [m, n] (n: inputs), float32 → the rounded W, same shape, float32."""

GgufType = Literal["Q8_0", "Q4_0", "Q4_K"]
Floats = NDArray[np.float32]

FLOAT8_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448

Q4_K_SUPER_BLOCK, Q4_K_BLOCK = 256, 32
_Q4_K_LEVELS = 15  # 4 bit a weight
_Q4_K_SCALE_LEVELS = 63  # 6 bit a block's scale, and as many its minimum
# How llama.cpp searches a block's scale: for (15 + shift)/(max − min), 21 shifts from −1 to 1.
_Q4_K_SHIFTS = tuple(np.float32(-1.0 + 0.1 * step) for step in range(21))


class MissingPackageError(ImportError):
    """The library that a format needs is not installed."""


def to_float8(values: Tensor) -> Tensor:
    """Round to float8_e4m3fn without a scale; what is too large becomes ±448, as engines cast.

    Args:
        values: Any shape and floating dtype; the result has both again.
    """
    return values.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn).to(values.dtype)


def float8(weight: Tensor, *, per_row: bool) -> Tensor:
    """float8_e4m3fn with one float32 scale for the tensor, or one for each output row, that maps its maximum to 448.

    Args:
        weight: W, shape [..., n], float32; a row is what the last dimension holds.
        per_row: Whether each row has its own scale.
    """
    largest = weight.abs().amax(-1, keepdim=True) if per_row else weight.abs().amax()
    scale = torch.where(largest > 0, largest / FLOAT8_LARGEST, torch.ones_like(largest))
    return to_float8(weight / scale) * scale


def int8_rows(weight: Tensor) -> Tensor:
    """The weights of LLM.int8 (Dettmers et al., arXiv 2208.07339, Section 2.1): 8 bit, one absmax scale a row.

    Args:
        weight: W, shape [m, n], float32.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    functional = _package("bitsandbytes.functional")
    quantized, row_maxima, _ = functional.int8_vectorwise_quant(weight)
    restored: Tensor = functional.int8_vectorwise_dequant(quantized, row_maxima)
    return restored.float()


def nf4(weight: Tensor, *, double: bool) -> Tensor:
    """4-bit NormalFloat in blocks of 64 (QLoRA: Dettmers et al., arXiv 2305.14314, Section 3).

    Args:
        weight: W, shape [m, n], float32. Blocks run on from one row into the next.
        double: Whether the blocks' scales are quantized too: 8 bit, 256 scales sharing one.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    functional = _package("bitsandbytes.functional")
    # Flattened, as the blocks run: bitsandbytes 0.50 restores a matrix wrongly on CPUs where n is no multiple of 64.
    quantized, state = functional.quantize_nf4(weight.flatten(), blocksize=64, compress_statistics=double)
    restored: Tensor = functional.dequantize_nf4(quantized, state)
    return restored.reshape(weight.shape)


def gguf(weight: Tensor, kind: GgufType) -> Tensor:
    """One of llama.cpp's block formats: blocks of 32 inputs with float16 scales (Q4_K: super-blocks of 256).

    Args:
        weight: W, shape [m, n], float32.
        kind: The type that is asked for; :func:`gguf_type` says which one a row of n is long enough for.

    Raises:
        MissingPackageError: ``gguf`` is not installed.
    """
    quants = _package("gguf.quants")
    actual = gguf_type(kind, weight.shape[-1])
    code = quants.GGMLQuantizationType[actual]
    values = np.ascontiguousarray(weight.numpy(force=True), dtype=np.float32)
    with np.errstate(all="ignore"):  # a scale beyond float16 becomes infinite here as it does in the engine
        packed = pack_q4_k(values) if actual == "Q4_K" else quants.quantize(values, code)
        restored = quants.dequantize(packed, code)
    return torch.from_numpy(np.ascontiguousarray(restored, dtype=np.float32)).reshape(weight.shape).to(weight.device)


def gguf_type(kind: GgufType, inputs: int) -> str:
    """The type that llama.cpp stores a row of ``inputs`` weights in when asked for ``kind``.

    >>> gguf_type("Q4_K", 4096), gguf_type("Q4_K", 128), gguf_type("Q8_0", 100)
    ('Q4_K', 'Q5_0', 'F16')
    """
    if kind == "Q4_K" and inputs % Q4_K_SUPER_BLOCK == 0:
        return kind
    if inputs % Q4_K_BLOCK:
        return "F16"
    return "Q5_0" if kind == "Q4_K" else kind


def pack_q4_k(values: Floats) -> NDArray[np.uint8]:
    """Quantize to Q4_K as llama.cpp's reference does without an importance matrix (``quantize_row_q4_K_ref``).

    A weight is d·s·q − e·t: q of 4 bit for each weight, s and t of 6 bit for each block of 32, d and e in float16 for
    each super-block of 256.

    Args:
        values: Shape [m, n], n a multiple of 256.

    Returns:
        The packed rows, shape [m, n·144/256].
    """
    blocks = values.reshape(-1, Q4_K_SUPER_BLOCK // Q4_K_BLOCK, Q4_K_BLOCK)  # [super-blocks, 8, 32]
    scales, depths = _fit_blocks(blocks)  # [super-blocks, 8] each
    scale_unit, scale_codes = _six_bits(scales)
    depth_unit, depth_codes = _six_bits(depths)
    step = scale_unit.astype(np.float32) * scale_codes
    offset = depth_unit.astype(np.float32) * depth_codes
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    codes = _levels((blocks + offset[..., None]) * inverse[..., None]).astype(np.uint8)  # [super-blocks, 8, 32]
    pairs = codes.reshape(len(codes), 4, 2, Q4_K_BLOCK)
    low_and_high = pairs[:, :, 0] | pairs[:, :, 1] << 4  # two blocks share a run of 32 bytes
    packed = np.concatenate(
        [
            scale_unit.view(np.uint8),
            depth_unit.view(np.uint8),
            _pack_six_bits(scale_codes.astype(np.uint8), depth_codes.astype(np.uint8)),
            low_and_high.reshape(len(codes), -1),
        ],
        axis=-1,
    )  # [super-blocks, 144]
    return packed.reshape(*values.shape[:-1], -1)


def _fit_blocks(blocks: Floats) -> tuple[Floats, Floats]:
    """Scale and depth (minus the minimum) of every block: the least squares fit to the best of 21 roundings."""
    importance = np.sqrt(np.square(blocks).mean(-1, keepdims=True)) + np.abs(blocks)
    total, first_moment = importance.sum(-1), (importance * blocks).sum(-1)
    minimum, maximum = np.minimum(blocks.min(-1), 0), blocks.max(-1)
    flat = maximum == minimum
    scale = np.where(flat, 0, (maximum - minimum) / _Q4_K_LEVELS).astype(np.float32)

    def error(scale: Floats, minimum: Floats, codes: Floats) -> Floats:
        difference = scale[..., None] * codes + minimum[..., None] - blocks
        return (importance * np.square(difference)).sum(-1)

    def codes_at(levels: np.float32) -> Floats:
        span = np.where(flat, 1, maximum - minimum)
        return _levels((levels / span)[..., None] * (blocks - minimum[..., None]))

    best = error(scale, minimum, codes_at(np.float32(_Q4_K_LEVELS)))
    for shift in _Q4_K_SHIFTS:
        # The minimum found so far is the next candidate's start: the order of the shifts matters.
        codes = codes_at(_Q4_K_LEVELS + shift)
        sum_codes, sum_squares = (importance * codes).sum(-1), (importance * codes * codes).sum(-1)
        cross = (importance * codes * blocks).sum(-1)
        determinant = total * sum_squares - sum_codes * sum_codes
        solvable = determinant > 0
        divisor = np.where(solvable, determinant, 1)
        candidate = (total * cross - first_moment * sum_codes) / divisor
        candidate_minimum = (sum_squares * first_moment - sum_codes * cross) / divisor
        through_zero = np.divide(cross, sum_squares, out=np.zeros_like(cross), where=sum_squares != 0)
        candidate = np.where(candidate_minimum > 0, through_zero, candidate)
        candidate_minimum = np.minimum(candidate_minimum, 0)
        candidate_error = error(candidate, candidate_minimum, codes)
        better = solvable & ~flat & (candidate_error < best)
        best = np.where(better, candidate_error, best)
        scale, minimum = np.where(better, candidate, scale), np.where(better, candidate_minimum, minimum)
    return scale, -minimum


def _levels(values: Floats) -> Floats:
    return np.clip(np.rint(values), 0, _Q4_K_LEVELS)


def _six_bits(values: Floats) -> tuple[NDArray[np.float16], Floats]:
    """A float16 unit for each super-block, shape [super-blocks, 1], and every block's multiple of it, 0 to 63."""
    largest = np.maximum(values.max(-1, keepdims=True), 0)
    inverse = np.divide(_Q4_K_SCALE_LEVELS, largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.clip(np.rint(inverse * values), 0, _Q4_K_SCALE_LEVELS)
    return (largest / _Q4_K_SCALE_LEVELS).astype(np.float16), codes


def _pack_six_bits(scales: NDArray[np.uint8], depths: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Eight scales and eight depths of 6 bit in 12 bytes: the last four of each are split, 4 bit and 2 bit."""
    high_scales, high_depths = scales[:, 4:] >> 4 << 6, depths[:, 4:] >> 4 << 6
    split = (scales[:, 4:] & 0x0F) | (depths[:, 4:] & 0x0F) << 4
    return np.concatenate([scales[:, :4] | high_scales, depths[:, :4] | high_depths, split], axis=-1)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError("install specdef-cli[deploy]") from error
