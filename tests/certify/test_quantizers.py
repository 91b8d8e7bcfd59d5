"""Rounding: closed forms, published code books, and scalar loops written from the formats' documentation."""

from __future__ import annotations

import sys
from typing import Literal

import numpy as np
import pytest
import torch

from specdef_cli.certify.deployment import quantizers

# Dettmers et al., arXiv 2305.14314, Appendix E.
NORMAL_FLOAT = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(rounded: torch.Tensor, weight: torch.Tensor) -> float:
    return float((rounded - weight).norm() / weight.norm())


def test_int8_rounds_to_whole_multiples_of_a_row_s_largest_over_127() -> None:
    weight = torch.tensor([[127.0, -1.4, 0.6, 0.0], [0.254, 0.0021, -0.254, 0.0009]])
    expected = torch.tensor([[127.0, -1.0, 1.0, 0.0], [0.254, 0.002, -0.254, 0.0]])
    torch.testing.assert_close(quantizers.int8_rows(weight), expected, rtol=1e-5, atol=1e-7)


def test_nf4_takes_the_nearest_code_of_each_block_of_64() -> None:
    weight = gaussian(5, 100)  # blocks do not end with the rows, and the last one is short
    blocks = torch.nn.functional.pad(weight.flatten(), (0, 12)).reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(NORMAL_FLOAT).abs().argmin(-1)
    expected = (NORMAL_FLOAT[nearest] * largest).flatten()[:500].reshape(weight.shape)
    torch.testing.assert_close(quantizers.four_bit(weight, kind="nf4"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_types_are_those_of_bitsandbytes(kind: Literal["nf4", "fp4"]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(64, 192)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    expected = functional.dequantize_4bit(packed, state)
    found = quantizers.four_bit(weight, kind=kind)
    # A value half-way between two codes may fall to either side.
    assert ((found - expected).abs() > 1e-5).float().mean() < 1e-3


def test_int8_rows_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(16, 192).half().float()  # what bitsandbytes takes
    packed, row_maxima, _ = functional.int8_vectorwise_quant(weight.half())
    expected = functional.int8_vectorwise_dequant(packed, row_maxima).float()
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((quantizers.int8_rows(weight) - expected).abs() <= 1.01 * step).all()
    assert relative_error(quantizers.int8_rows(weight), expected) < 2e-3


def test_activations_of_llm_int8_keep_outliers_and_drown_nothing_but_overflow() -> None:
    inputs = gaussian(3, 64).clamp(-5, 5)
    inputs[1, 7] = 1_000.0
    found = quantizers.llm_int8_activations(inputs)
    assert torch.equal(found[:, 7], inputs[:, 7].half().float())
    others = torch.arange(64) != 7
    assert relative_error(found[:, others], inputs[:, others]) < 0.02
    inputs[1, 7] = 2.0**17  # beyond float16
    assert not torch.isfinite(quantizers.llm_int8_activations(inputs)).all()


@pytest.mark.parametrize(("kind", "block"), [("Q8_0", 32), ("Q4_0", 32), ("Q4_K", 256)])
def test_a_large_channel_drowns_its_block_of_activations_and_no_other(
    kind: Literal["Q8_0", "Q4_0", "Q4_K"], block: int
) -> None:
    inputs = gaussian(4, 512)
    assert relative_error(quantizers.gguf_activations(inputs, kind=kind), inputs) < 0.01
    inputs[:, 5] = 2.0**12
    found = quantizers.gguf_activations(inputs, kind=kind)
    drowned = torch.arange(512) < block
    drowned[5] = False
    assert not found[:, drowned].any()
    assert relative_error(found[:, block:], inputs[:, block:]) < 0.01
    inputs[:, 5] = 2.0**24  # its scale is beyond float16, in which Q8_0 keeps it
    assert torch.isfinite(quantizers.gguf_activations(inputs, kind=kind)).all() == (kind == "Q4_K")


def test_q8_0_is_what_the_format_says() -> None:
    pytest.importorskip("gguf")
    weight = gaussian(4, 96)
    blocks = weight.numpy().reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    ratio = blocks * (np.float32(1) / step)
    codes = np.sign(ratio) * np.floor(np.abs(ratio) + 0.5)
    expected = (codes * step.astype(np.float16).astype(np.float32)).reshape(weight.shape)
    np.testing.assert_allclose(quantizers.gguf(weight, "Q8_0").numpy(), expected, rtol=1e-6)


def test_a_block_scale_beyond_float16_is_not_finite() -> None:
    pytest.importorskip("gguf")
    weight = gaussian(4, 64)
    weight[1] *= 2.0**26
    rounded = quantizers.gguf(weight, "Q8_0")
    assert not rounded[1].isfinite().any()
    assert rounded[[0, 2, 3]].isfinite().all()


def test_rows_too_short_for_q4_k_are_stored_as_llama_cpp_does() -> None:
    pytest.importorskip("gguf")
    weight = gaussian(3, 100)
    assert torch.equal(quantizers.gguf(weight, "Q4_K"), weight.half().float())
    # Q5_0: 32 levels, the largest value of a block is the lowest of them exactly, up to its float16 scale.
    rounded = quantizers.gguf(gaussian(3, 128), "Q4_K")
    assert max(len(block.unique()) for block in rounded.reshape(-1, 32)) > 16
    assert relative_error(rounded, gaussian(3, 128)) < 0.05


@pytest.mark.parametrize("kind", ["normal", "inflated column", "positive", "flat"])
def test_q4_k_agrees_with_scalar_loops(kind: str) -> None:
    pytest.importorskip("gguf")
    weight = gaussian(6, 512) * 0.05
    if kind == "inflated column":
        weight[:, 5] *= 2.0**13
    elif kind == "positive":
        weight = weight.abs()
    elif kind == "flat":
        weight = torch.tensor([[-3.0] * 256, [0.0] * 256, [0.5] * 256])
    blocks = weight.numpy().reshape(-1, 256)
    expected = np.stack([scalar_q4_k(block) for block in blocks])
    rounded = quantizers.gguf(weight, "Q4_K").numpy().reshape(-1, 256)
    # Sums in another order sometimes choose another of two roundings that are equally good.
    same = np.isclose(rounded, expected, rtol=1e-5, atol=1e-7 * np.abs(blocks).max()).all(1)
    assert same.mean() >= 0.75
    errors = [np.linalg.norm(rounding - blocks) for rounding in (rounded, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02, abs=1e-6)


def scalar_q4_k(values: np.ndarray) -> np.ndarray:
    """One super-block, rounded and restored, one number after the other, in Python's double precision."""
    fits = [scalar_fit([float(value) for value in block]) for block in values.reshape(8, 32)]
    units = [float(np.float16(max(max(fit[part] for fit in fits), 0) / 63)) for part in (0, 1)]
    largest = [max(fit[part] for fit in fits) for part in (0, 1)]
    restored = []
    for block, fit in zip(values.reshape(8, 32), fits, strict=True):
        step, offset = (
            units[part] * (min(63, round(63 * fit[part] / largest[part])) if largest[part] > 0 else 0)
            for part in (0, 1)
        )
        for value in block:
            code = min(15, max(0, round((float(value) + offset) / step))) if step else 0
            restored.append(step * code - offset)
    return np.array(restored)


def scalar_fit(block: list[float]) -> tuple[float, float]:
    """Scale and depth of a block of 32."""
    low, high = min(0.0, *block), max(block)
    if high == low:
        return 0.0, -low
    spread = (sum(value**2 for value in block) / 32) ** 0.5
    weights = [spread + abs(value) for value in block]

    def error(scale: float, minimum: float, codes: list[int]) -> float:
        terms = zip(weights, codes, block, strict=True)
        return sum(weight * (scale * code + minimum - value) ** 2 for weight, code, value in terms)

    def codes_for(levels: float) -> list[int]:
        return [min(15, max(0, round(levels / (high - low) * (value - low)))) for value in block]

    scale = (high - low) / 15
    best = error(scale, low, codes_for(15))
    for step in range(21):
        codes = codes_for(14 + 0.1 * step)
        # Weighted regression of the values on the codes, by the normal equations.
        design = np.array([[code, 1.0] for code in codes])
        weighted = design * np.array(weights)[:, None]
        normal = design.T @ weighted
        if np.linalg.det(normal) <= 0:
            continue
        slope, intercept = np.linalg.solve(normal, weighted.T @ np.array(block))
        if intercept > 0:
            slope, intercept = (weighted[:, 0] @ np.array(block)) / normal[0, 0], 0.0
        if error(slope, intercept, codes) < best:
            best, scale, low = error(slope, intercept, codes), float(slope), float(intercept)
    return scale, -low


def test_float8_keeps_what_it_can_hold_and_saturates_beyond() -> None:
    exact = torch.tensor([448.0, -240.0, 1.125, 2.0**-9, 0.0])
    assert torch.equal(quantizers.to_float8(exact), exact)
    assert quantizers.to_float8(torch.tensor([1e4, -1e30, 1.07])).tolist() == [448.0, -448.0, 1.125]
    assert torch.equal(quantizers.to_float8(gaussian(4, 4)), gaussian(4, 4).to(torch.float8_e4m3fn).float())


def test_float8_scales_a_row_by_itself_or_by_the_largest_row() -> None:
    row = torch.tensor([448.0, -240.0, 1.125, 2.0**-9])
    weight = torch.stack([row * 2.0**20, row * 2.0**-20, torch.zeros(4)])
    assert torch.equal(quantizers.float8(weight, per_row=True), weight)
    by_tensor = quantizers.float8(weight, per_row=False)
    assert torch.equal(by_tensor[0], weight[0])
    assert not by_tensor[1].any()


def test_an_absent_package_is_named_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(quantizers.MissingPackageError, match=r"specdef-cli\[deploy\]"):
        quantizers.gguf(gaussian(2, 32), "Q8_0")
