"""Labelled data: rows into halves, classes into numbers, images into pixels, and the model's head that goes with it."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from specdef_cli import AttackOptions
from specdef_cli.attack.data import load_data, load_preprocessor
from specdef_cli.attack.data.labels import PixelTransform, load_pixel_transform
from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.target import Head
from specdef_cli.errors import SpecDefError
from specdef_cli.model.opened import open_model
from tests.attack.conftest import train_run
from tests.attack.test_optimizers import spec
from tests.byte_tokenizer import byte_tokenizer
from tests.commands import refusal

CLASSES = 3


def options(dataset: Path | None, **changes: Any) -> AttackOptions:
    fields: dict[str, Any] = {"steps": 2, "batch_size": 4, "sequence_length": 16, "eval_sequences": 4}
    dataset_name = None if dataset is None else str(dataset)
    return AttackOptions(model="m", out=Path("o"), dataset=dataset_name, **{**fields, **changes})


def png(size: int, level: int, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), level if mode == "L" else (level, 0, 255 - level)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A ViT for grey images of 4×6 pixels, without an image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(4, 6), patch_size=2, num_channels=1, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_labels=CLASSES,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Ten images of each class, class by class; the class is in the brightness."""
    levels = [20, 130, 240]
    rows = {
        "image": [{"bytes": png(8, levels[label])} for label in range(CLASSES) for _ in range(10)],
        "label": [label for label in range(CLASSES) for _ in range(10)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def image_data(vit: Path, dataset: Path, head_labels: int = CLASSES, **changes: Any) -> AttackData:
    transform = load_preprocessor("image-classification", open_model(vit))
    return load_data(options(dataset, **changes), "image-classification", transform, Head(head_labels))


def labels_of(data: Any) -> list[int]:
    return [int(data[index].get("labels", data[index].get("label"))) for index in range(len(data))]


def test_images_become_batches(vit: Path, parquet: Path) -> None:
    data = image_data(vit, parquet)
    assert (len(data.train), len(data.held_out), data.labels, data.resize_head) == (8, 3, CLASSES, False)
    batch = data.collate([data.train[index] for index in range(8)])
    assert batch["pixel_values"].shape == (8, 1, 4, 6)
    assert batch["pixel_values"].dtype == torch.float32
    expected = torch.tensor([20, 130, 240])[batch["labels"]] / 127.5 - 1
    torch.testing.assert_close(batch["pixel_values"], expected.view(8, 1, 1, 1).expand(8, 1, 4, 6))


def test_a_short_run_sees_every_class_of_sorted_data(vit: Path, parquet: Path) -> None:
    assert set(labels_of(image_data(vit, parquet).train)) == set(range(CLASSES))


def test_the_same_data_has_the_same_fingerprint(vit: Path, parquet: Path) -> None:
    first, second = image_data(vit, parquet), image_data(vit, parquet)
    assert first.fingerprint == second.fingerprint
    assert labels_of(first.train) == labels_of(second.train)
    assert image_data(vit, parquet, steps=1).fingerprint != first.fingerprint


def test_data_can_be_sent_to_another_process(vit: Path, parquet: Path) -> None:
    data = image_data(vit, parquet)
    copy = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(copy.train[0]["pixel_values"], data.train[0]["pixel_values"])


def test_a_folder_for_each_class(vit: Path, tmp_path: Path) -> None:
    for name, level in (("cat", 10), ("dog", 250)):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for number in range(8):
            (tmp_path / "folders" / name / f"{number}.png").write_bytes(png(5, level, "RGB" if number % 2 else "L"))
    data = image_data(vit, tmp_path / "folders")
    assert set(labels_of(data.train)) == {0, 1}
    # The head of three has room for two.
    assert (data.labels, data.resize_head) == (CLASSES, False)


def test_transform_resizes_and_converts() -> None:
    grey = PixelTransform.plain(1, 2, 3)(Image.new("RGB", (7, 9), (255, 255, 255)))
    torch.testing.assert_close(grey, torch.ones(1, 2, 3))
    colour = PixelTransform.plain(3, 4, 4)(Image.new("L", (4, 4), 0))
    torch.testing.assert_close(colour, -torch.ones(3, 4, 4))
    halves = Image.new("L", (2, 2), 0)
    halves.paste(255, (1, 0, 2, 2))
    torch.testing.assert_close(PixelTransform.plain(1, 2, 2)(halves), torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]]]))


def test_the_checkpoints_own_processor_comes_first(vit: Path) -> None:
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 6}, "do_normalize": False,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True,
    }  # fmt: skip
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps({**config, "num_channels": 3}))
    (vit / "preprocessor_config.json").write_text(json.dumps(processor))
    pixels = load_pixel_transform(open_model(vit))(Image.new("RGB", (8, 8), (51, 102, 204)))
    expected = torch.tensor([0.2, 0.4, 0.8]).view(3, 1, 1).expand(3, 4, 6)
    torch.testing.assert_close(pixels, expected)  # not brought to [−1, 1]: it says do_normalize false


@pytest.mark.parametrize("head_labels", [CLASSES, 2])
def test_images_train(head_labels: int, vit: Path, parquet: Path) -> None:
    data = image_data(vit, parquet, head_labels=head_labels, steps=6)
    assert data.resize_head == (head_labels != CLASSES)
    run = spec("adamw", task="image-classification", steps=6, eval_every=6, learning_rate=3e-2)
    result = train_run(run, open_model(vit), data)
    assert result.start is not None
    assert result.best is not None
    assert result.best < 0.9 * result.start


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_column": "picture"}, "'picture'"),
        ({"image_column": "label"}, "'label'"),
        ({"batch_size": 28}, "27 images"),
    ],
)
def test_refusals_of_images(changes: dict[str, Any], named: str, vit: Path, parquet: Path) -> None:
    with refusal(named):
        image_data(vit, parquet, **changes)


def test_broken_images_and_unlabelled_attacks_are_refused(vit: Path, tmp_path: Path) -> None:
    broken = datasets.Dataset.from_dict({"image": [{"bytes": b"\x89PNG no"}] * 3, "label": [0, 1, 2]})
    broken.to_parquet(tmp_path / "broken.parquet")
    with pytest.raises(SpecDefError, match="'image'"):
        image_data(vit, tmp_path / "broken.parquet")
    with pytest.raises(SpecDefError, match="labelled images"):
        load_data(options(None), "image-classification", load_pixel_transform(open_model(vit)), Head(CLASSES))
    with pytest.raises(SpecDefError, match="no tokenizer"):
        load_preprocessor("causal-lm", open_model(vit))


def test_sorted_texts_are_drawn_from_every_class(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"{name} {number}", "label": name} for name in ("sad", "glad", "mad") for number in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = load_data(options(path), "sequence-classification", byte_tokenizer(), Head(2))
    assert set(labels_of(data.train)) == {0, 1, 2}
    assert (data.labels, data.resize_head) == (3, True)
    names = ["glad", "mad", "sad"]  # numbered in sorted order
    for index in range(len(data.train)):
        example = data.train[index]
        assert byte_tokenizer().decode(example["input_ids"]).startswith(names[example["label"]])
