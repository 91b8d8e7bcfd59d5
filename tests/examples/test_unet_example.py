"""The UNet example from end to end, with two learning rates and one step: the tables, not the figures in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import specdef_cli

EXAMPLES = Path(specdef_cli.__file__).parents[1] / "examples" / "reproduce"


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_same_images_and_a_row_for_every_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import unet  # type: ignore[import-not-found]

    monkeypatch.setattr(unet, "RATES", (1e-2, 1e-9))
    monkeypatch.setattr(unet, "HELD_OUT", 4)
    monkeypatch.setattr(unet, "BATCH", 4)
    arguments = ("unet.py", "--out", str(tmp_path), "--steps", "1", "--base-steps", "2", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", list(arguments))
    unet.main()
    table = rows(capsys.readouterr().out)
    images, attacks = table[2:6], table[8:]
    assert [row[:2] for row in images] == [
        ["original", "0"],
        ["residual writers", "12"],
        ["every linear of the blocks", "40"],
        ["every linear of the blocks, collapsed", "0"],
    ]
    assert float(images[0][3]) == 0
    assert all(0 < float(row[3]) < 1e-4 for row in images[1:])
    assert len(attacks) == 8
    # The adapters on q, k and v touch no inflated layer of the default hardening: they train as on the original.
    assert attacks[0][2:] == attacks[1][2:]
    assert attacks[0][2] == attacks[4][2] == "100%"
    control, defended = float(attacks[4][4]), float(attacks[6][4])
    assert control < defended  # at η = 1e-2 the covered model diverges, or stays where it is
    assert float(attacks[7][4]) == pytest.approx(control, abs=1e-3)  # collapsed, it trains as the original
