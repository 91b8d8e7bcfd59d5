"""What an engine's rounding makes of a matrix of weights or activations, in float32: stand-ins for the engine itself.

Closed forms for bitsandbytes' and float8 types; the ``gguf`` package for llama.cpp's block formats, which is optional
(``pip install specdef-cli[deploy]``) and imported when first used. ``gguf`` can only read Q4_K, so that quantizer is
written here after llama.cpp's reference; its blocks are packed in llama.cpp's layout and read back by ``gguf``.
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

LLM_INT8_THRESHOLD = 6.0
FOUR_BIT_BLOCK = 64
_FOUR_BIT = {
    "nf4": torch.tensor(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ]
    ),
    "fp4": torch.tensor(
        [-1.0, -2 / 3, -0.5, -1 / 3, -0.25, -1 / 6, -1 / 192, 0.0, 1 / 192, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0]
    ),
}  # fmt: skip

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
    """8 bit, one absmax scale a row: the weights of LLM.int8 (Dettmers et al., arXiv 2208.07339, Section 2.1).

    Args:
        weight: W, shape [m, n], float32.
    """
    scale = weight.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale).round() * scale


def llm_int8_activations(inputs: Tensor) -> Tensor:
    """What LLM.int8 makes of activations (ibid., Section 3.2): columns with outliers stay float16, others 8 bit.

    Args:
        inputs: X, shape [..., n]. They are cast to float16 first, where 65,520 and more become infinite.
    """
    half = inputs.half().float()
    outliers = (half.abs() >= LLM_INT8_THRESHOLD).flatten(end_dim=-2).any(0)  # [n]
    rounded = int8_rows(torch.where(outliers, torch.zeros_like(half), half))
    return torch.where(outliers, half, rounded).to(inputs.dtype)


def four_bit(weight: Tensor, *, kind: Literal["nf4", "fp4"]) -> Tensor:
    """bitsandbytes' 4-bit types, one scale for 64 weights: NormalFloat (arXiv 2305.14314, Appendix E) and FP4.

    Args:
        weight: W, shape [m, n], float32. Blocks run on from one row into the next.
        kind: Which code book.
    """
    codes = _FOUR_BIT[kind].to(weight.device)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % FOUR_BIT_BLOCK))
    blocks = flat.view(-1, FOUR_BIT_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    nearest = torch.bucketize(blocks / scale, (codes[1:] + codes[:-1]) / 2)
    return (codes[nearest] * scale).flatten()[: weight.numel()].view(weight.shape)


def gguf_activations(inputs: Tensor, *, kind: GgufType) -> Tensor:
    """What llama.cpp's CPU kernels make of activations before they meet a quantized weight: 8 bit in blocks.

    Args:
        inputs: X, shape [..., n]. Blocks of 32 with a float16 scale (Q8_0), where a row is 256-wise and the weight is
            Q4_K of 256 with a float32 scale (Q8_K); as they are where n is no multiple of 32.
        kind: The weight's type.
    """
    actual = gguf_type(kind, inputs.shape[-1])
    if actual == "F16":
        return inputs.half().to(inputs.dtype)
    blocks = inputs.float().unflatten(-1, (-1, Q4_K_SUPER_BLOCK if actual == "Q4_K" else Q4_K_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / torch.where(scale > 0, scale, torch.ones_like(scale))).round()
    stored = scale if actual == "Q4_K" else scale.half().float()
    return (codes * stored).flatten(-2).to(inputs.dtype)


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
