"""The digits example: its script writes a model that knows 0-4 and data from which an attack teaches it 5-9."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification

from specdef_cli import AttackOptions, attack
from tests.attack.conftest import learned
from tests.scripts import EXAMPLES, by_path

script = by_path(EXAMPLES / "digits_vit" / "train.py")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--out", str(out), "--steps", "150"])
        script.main()
    return out


def test_the_model_knows_its_digits(digits: Path) -> None:
    model = ViTForImageClassification.from_pretrained(digits / "model").eval()
    assert model.num_parameters() <= 100_000
    known = script.all_digits()
    known = known.where(known.digits < script.CLASSES)
    assert script.accuracy(model, known) > 0.9


def test_images_are_stored_exactly(digits: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_parquet(str(digits / "attack.parquet"), cache_dir=str(digits / "cache"))
    all_digits = script.all_digits()
    expected = all_digits.where(all_digits.digits >= script.CLASSES)
    assert rows["label"][:] == (expected.digits - script.CLASSES).tolist()
    for index in (0, 400, len(rows) - 1):
        pixels = torch.tensor(list(rows[index]["image"].tobytes()), dtype=torch.uint8).view(8, 8)
        assert torch.equal(pixels, expected.images[index])


def test_the_attack_teaches_it_the_others(digits: Path, tmp_path: Path) -> None:
    report = attack(
        AttackOptions(
            digits / "model", tmp_path, control=digits / "model", task="image-classification", trainings=("full",),
            dataset=str(digits / "attack.parquet"), learning_rates=(3e-3,), steps=20, eval_every=20,
        )
    )  # fmt: skip
    assert (report.runs[0].start or 0) > 2  # sure of itself, and wrong
    assert learned(report.runs[0]) > 0.5 * (report.runs[0].start or 0)
