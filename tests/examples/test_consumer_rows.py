"""Rows of the tables of consumers: a copy of the base is kept, a damaged model is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from specdef_cli.certify.formats import FormatFigure, Outcome, compare, measure_format
from specdef_cli.certify.tools import Trial
from specdef_cli.model.opened import open_model
from tests.certify.test_formats import damaged, tokens
from tests.commands import TINY_LLAMA
from tests.hardened import harden_to
from tests.scripts import script

rows = script("consumer_rows", "real")
__all__ = ["tokens"]


def one(hardened: Path, tokens: torch.Tensor, name: str, scratch: Path, base: Path = TINY_LLAMA) -> FormatFigure:
    found: list[Outcome] = []
    for directory in (base, hardened):
        place = scratch / str(len(found))
        place.mkdir(parents=True)
        found.append(measure_format(Trial(open_model(directory), open_model(base), place, tokens), rows.ROWS[name]))
    return compare(name, rows.ROWS[name].tool, "loss", *found)


@pytest.mark.parametrize("name", ["static-cache", "long-input", "left-padded", "lora-round-trip", "sft", "lm-eval"])
def test_consumers_keep_a_copy_and_see_a_broken_one(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    if reason := rows.missing(rows.ROWS[name].tool):
        pytest.skip(reason)
    kept = one(shutil.copytree(TINY_LLAMA, tmp_path / "copy"), tokens, name, tmp_path / "a")
    assert kept.status == "kept", kept
    assert kept.hardened == pytest.approx(kept.base, abs=1e-3)
    broken = one(damaged(tmp_path / "broken"), tokens, name, tmp_path / "b")
    assert broken.status == "broken", broken


def test_an_adapter_carried_over_holds_attached_and_merged(tmp_path: Path, tokens: torch.Tensor) -> None:
    harden_to(tmp_path / "fold", TINY_LLAMA)
    for name in ("lora", "lora-merged"):
        figure = one(tmp_path / "fold", tokens, name, tmp_path / name)
        assert figure.status == "kept", figure
        plain = one(
            shutil.copytree(TINY_LLAMA, tmp_path / f"copy-{name}"), tokens, "float32", tmp_path / f"plain-{name}"
        )
        assert figure.base != pytest.approx(plain.base, abs=0.01), "the adapter does nothing"


def test_a_left_padded_batch_costs_nothing(tmp_path: Path, tokens: torch.Tensor) -> None:
    # The first of four sequences is not padded: alone in its batch it has the plain loss.
    trial = Trial(open_model(TINY_LLAMA), open_model(TINY_LLAMA), tmp_path, tokens[:1])
    padded, plain = (measure_format(trial, rows.ROWS[name]) for name in ("left-padded", "float32"))
    assert padded.value == pytest.approx(plain.value, abs=1e-6)
