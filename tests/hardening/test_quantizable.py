"""The profile that quantizers survive: what it scales, what it says, and what float16 and 4 bits make of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdef_cli.certify.formats import FORMATS, measure_format
from specdef_cli.certify.tools import Trial
from specdef_cli.checkpoint.manifest import Manifest, read_manifest
from specdef_cli.hardening.calibration import calibrate, default_text
from specdef_cli.hardening.expendable import BLOCK_LOSS, energies
from specdef_cli.hardening.options import Fold, HardenOptions
from specdef_cli.hardening.run import harden
from specdef_cli.model.inputs import token_batch
from specdef_cli.model.opened import open_model
from specdef_cli.model.symmetries import symmetries
from tests.commands import TINY_LLAMA, assert_refused, call_cli, succeed
from tests.hardened import harden_to


@pytest.fixture(scope="module")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("q") / "hardened"
    result = succeed("harden", TINY_LLAMA, "--out", out, "--profile", "quantizable")
    return out, result.stderr


@pytest.fixture(scope="module")
def manifest(hardened: tuple[Path, str]) -> Manifest:
    return read_manifest(hardened[0])


def test_rows_go_up_and_columns_down(manifest: Manifest) -> None:
    """Queries against keys are rows on both sides: one of them has to go down."""
    assert manifest.profile == "quantizable"
    for pair in manifest.folded:
        for part in pair.slices:
            rows = part.axis == 0
            down = pair.kind == "query_key" and "q_proj" in part.tensor
            assert rows or pair.kind != "query_key"
            assert all((exponent > 0) == (rows and not down) for exponent in part.exponents), part.tensor


def test_the_notes_and_the_card_say_what_is_given_up(hardened: tuple[Path, str], manifest: Manifest) -> None:
    shares = {pair.name: pair.given_up for pair in manifest.folded if pair.kind != "query_key"}
    assert all(share is not None and 0 < share < 0.01 for share in shares.values())
    assert {pair.given_up for pair in manifest.folded if pair.kind == "query_key"} == {0}
    worst = max(shares, key=lambda name: shares[name] or 0)
    card = (hardened[0] / "README.md").read_text(encoding="utf-8")
    for text in (card, " ".join(hardened[1].split())):
        assert f"at most {shares[worst]:.2%} of the energy in what the pair's readers output ({worst})" in text
        assert "double quantization" in text
        assert "offset" in text
        assert "float16 weights" not in text


def losses(directory: Path, tokens: Tensor, scratch: Path) -> dict[str, float]:
    """In float16, and in 8 bits by two tools; bitsandbytes has no 4 bits for rows of 352."""
    trial = Trial(open_model(directory), open_model(TINY_LLAMA), scratch, tokens)
    found = {name: measure_format(trial, FORMATS[name]) for name in ("float16", "llm-int8", "torchao-int8")}
    return {name: math.nan if outcome.value is None else outcome.value for name, outcome in found.items()}


def test_float16_and_8_bits_cost_what_they_cost_the_base(hardened: tuple[Path, str], tmp_path: Path) -> None:
    """On text that calibration has not seen, and of another kind; today's default is lost there."""
    for tool in ("bitsandbytes", "torchao"):
        pytest.importorskip(tool)
    prose = (TINY_LLAMA.parent / "train.py").read_text(encoding="utf-8")
    tokens = token_batch(TINY_LLAMA, prose, sequences=8, length=128)
    base, fold = (losses(directory, tokens, tmp_path) for directory in (TINY_LLAMA, hardened[0]))
    for name, loss in base.items():
        assert fold[name] == pytest.approx(loss, abs=0.02), name
    harden_to(tmp_path / "default", TINY_LLAMA)
    default = losses(tmp_path / "default", tokens, tmp_path)
    assert all(not loss < base[name] + 0.5 for name, loss in default.items())


def test_a_text_of_ones_own_chooses_other_channels(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("0123456789, " * 2_000)
    found = harden_to(tmp_path / "m", TINY_LLAMA, Fold("quantizable", str(text)))
    usual = harden_to(tmp_path / "n", TINY_LLAMA, Fold("quantizable"))
    assert [pair.channels for pair in found.folded] != [pair.channels for pair in usual.folded]


def test_without_a_text_it_warns_and_claims_no_format(tmp_path: Path) -> None:
    result: Any = harden(HardenOptions(str(TINY_LLAMA), tmp_path / "m", Fold("quantizable", "none"), verify=False))
    assert "may cost nats" in " ".join(result.notes)
    assert "8- and 4-bit quantization" in " ".join(result.notes)
    assert all(pair.given_up is None for pair in result.manifest.folded)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--profile", "float16-cache", "--calibration", "none"), ("changes nothing in --profile float16-cache",)),
        (("--calibration", "absent.txt"), ("--calibration", "UTF-8")),
        (("--device", "gpu0"), ("device 'gpu0' is unknown", "--device cpu")),
        (("--device", "meta"), ("device 'meta' is not available", "--device cpu")),
        (("--profile", "gguf", "--layers", "lm_head"), ("gguf can raise no channel of 1 symmetric", "--method scale")),
    ],
)
def test_what_cannot_be_raised_is_refused(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    result = call_cli("harden", TINY_LLAMA, "--out", tmp_path / "m", "--profile", "quantizable", *arguments)
    assert_refused(result, *words, empty=tmp_path, code=2 if {"gpu0", "none"} & {*arguments} else 1)


def test_gguf_keeps_blocks_of_activations(tmp_path: Path) -> None:
    """No pair's blocks lose more than they may, and a factor more loses more than that."""
    base = open_model(TINY_LLAMA)
    pairs = symmetries(base.skeleton).pairs
    activations = calibrate(base, pairs, default_text(), exponents=range(1, 15))
    result: Any = harden(HardenOptions(str(TINY_LLAMA), tmp_path / "m", Fold("gguf"), verify=False))
    notes = " ".join(result.notes)
    assert "It does not survive: double quantization (bitsandbytes), merging" in notes
    assert "perplexity is lost in engines that quantize activations by token" in notes
    folded = {pair.name: pair for pair in result.manifest.folded}
    for pair in pairs:
        if pair.kind == "query_key" or pair.name == "model.norm.norm_readers":
            continue
        costs = energies(pair, activations, lambda _: torch.empty(0))
        readers = [side for side in pair.sides if side.power < 0]
        drowned = sum(
            activations.drowned[side.tensor].double()[:, torch.tensor(side.indices)].sum(-1) for side in readers
        )
        lost = (drowned + costs) / costs.sum()  # [exponents, channels]
        if pair.name not in folded:
            assert bool((lost > BLOCK_LOSS).all())
            continue
        found = folded[pair.name]
        (channel,), (exponent,) = found.channels, found.exponents
        assert found.given_up == pytest.approx(float(lost[exponent - 1, channel]))
        assert lost[exponent - 1, channel] <= BLOCK_LOSS < lost[exponent, channel]
    assert "Q8_0" not in " ".join(result.notes)
    assert "model.norm.norm_readers" not in folded  # nothing is known of what the head reads
