"""Labelled data: rows into halves, classes into numbers, images into pixels, and the model's head that goes with it."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from specdef_cli.attack.data import load_preprocessor
from specdef_cli.attack.data.labels import PixelTransform, labels_of, load_pixel_transform
from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.target import Head
from specdef_cli.attack.tasks import task_of
from specdef_cli.checkpoint.reader import read_config
from specdef_cli.errors import SpecDefError
from specdef_cli.model.opened import open_model
from tests.attack.conftest import learned, load, train_run
from tests.attack.test_data_forms import write
from tests.attack.test_tasks import classifier
from tests.byte_tokenizer import byte_tokenizer
from tests.commands import refusal
from tests.runs import spec

CLASSES = 3


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
    labels = [label for label in range(CLASSES) for _ in range(10)]
    rows = {"image": [{"bytes": png(8, [20, 130, 240][label])} for label in labels], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def image_data(vit: Path, dataset: Path | None, labels: int = CLASSES, **changes: Any) -> AttackData:
    return load(dataset, vit, "image-classification", Head(labels), **{"steps": 2, "eval_sequences": 4, **changes})


def text_data(path: Path, head: Head, **changes: Any) -> AttackData:
    return load(path, byte_tokenizer(), "sequence-classification", head, **{"eval_sequences": 4, **changes})


def test_images_become_batches_of_every_class(vit: Path, parquet: Path) -> None:
    data = image_data(vit, parquet)
    assert (len(data.train), len(data.held_out), data.labels, data.resize_head) == (8, 3, CLASSES, False)
    batch = data.collate([data.train[index] for index in range(8)])
    assert set(batch["labels"].tolist()) == set(range(CLASSES)), "though the rows are sorted"
    assert batch["pixel_values"].dtype == torch.float32
    expected = torch.tensor([20, 130, 240])[batch["labels"]] / 127.5 - 1
    torch.testing.assert_close(batch["pixel_values"], expected.view(8, 1, 1, 1).expand(8, 1, 4, 6))
    again = pickle.loads(pickle.dumps(image_data(vit, parquet)))  # as another process gets it
    assert again.fingerprint == data.fingerprint
    torch.testing.assert_close(again.collate([again.train[index] for index in range(8)]), batch)
    assert image_data(vit, parquet, steps=1).fingerprint != data.fingerprint


def test_a_folder_for_each_class(vit: Path, tmp_path: Path) -> None:
    for name, level in (("cat", 10), ("dog", 250)):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for number in range(8):
            (tmp_path / "folders" / name / f"{number}.png").write_bytes(png(5, level, "RGB" if number % 2 else "L"))
    data = image_data(vit, tmp_path / "folders")
    assert {int(data.train[index]["labels"]) for index in range(len(data.train))} == {0, 1}
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


@pytest.mark.parametrize("labels", [CLASSES, 2])
def test_images_train(labels: int, vit: Path, parquet: Path) -> None:
    data = image_data(vit, parquet, labels, steps=6)
    assert data.resize_head == (labels != CLASSES)
    run = spec(task="image-classification", steps=6, eval_every=6, learning_rate=3e-2)
    result = train_run(run, vit, data)
    assert learned(result) > 0.1 * (result.start or 0)


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
        image_data(vit, None)
    with pytest.raises(SpecDefError, match="no tokenizer"):
        load_preprocessor("causal-lm", open_model(vit))


NAMED = {"positive": 0, "negative": 1, "neither": 2}


@pytest.mark.parametrize("kind", ["names", "class labels", "id2label alone", "unknown"])
def test_classes_are_numbered_as_the_checkpoint_numbers_them(kind: str, tmp_path: Path) -> None:
    """Or in sorted order, where it does not know them; sorted rows are drawn from every class."""
    names = sorted(NAMED) if kind != "unknown" else ["glad", "mad", "sad"]
    numbers = {word: number for number, word in enumerate(names)} if kind == "unknown" else NAMED
    directory = classifier(tmp_path / "model", label2id=NAMED)
    if kind == "id2label alone":
        path = directory / "config.json"
        config = {**json.loads(path.read_text()), "id2label": {number: name for name, number in NAMED.items()}}
        path.write_text(json.dumps({key: value for key, value in config.items() if key != "label2id"}))
    table = datasets.Dataset.from_list([{"text": f"{name} {n}", "label": name} for name in names for n in range(20)])
    if kind == "class labels":
        table = table.cast_column("label", datasets.ClassLabel(names=names))
    table.to_parquet(tmp_path / "rows.parquet")
    head = Head(2) if kind == "unknown" else task_of(read_config(directory), directory, None)[1]
    data = text_data(tmp_path / "rows.parquet", head)
    examples = [half[index] for half in data.halves for index in range(len(half))]
    found = {(byte_tokenizer().decode(each["input_ids"]).split(" ")[0], each["label"]) for each in examples}
    assert found == set(numbers.items())
    assert {each["label"] for each in examples[: len(data.train)]} == {0, 1, 2}
    assert (data.labels, data.resize_head, bool(data.remarks)) == (3, kind == "unknown", kind == "unknown")


def test_names_that_the_checkpoint_does_not_know_are_remarked_on() -> None:
    head = Head(2, names={"positive": 0, "negative": 1})
    found = labels_of(["pos", "neg"], head, "label", "d")
    assert found.classes == {"neg": 0, "pos": 1}
    assert "positive, negative" in found.remark
    assert not labels_of(["pos", "neg"], Head(2, names={"LABEL_0": 0, "LABEL_1": 1}), "label", "d").remark
    new = labels_of(["a", "b", "c"], head, "label", "d").remark
    assert "has 2 outputs, and d needs 3" in new
    assert "names" not in new, "a new head has none"
    assert "has 2 outputs, and d needs 1" in labels_of([0.5, 1.5], head, "label", "d").remark


@pytest.mark.parametrize(
    ("written", "names", "classes"),
    [
        (["positive", " Negative"], {"POSITIVE": 0, "NEGATIVE": 1}, {"positive": 0, " Negative": 1}),
        (["it", "IT"], {"IT": 0, "it": 1}, {"IT": 0, "it": 1}),
        # Numbers written as text: in alphabetical order 10 comes before 2.
        ([str(n) for n in range(12)], {f"LABEL_{n}": n for n in range(12)}, {str(n): n for n in range(12)}),
    ],
)
def test_names_are_those_of_the_head(written: list[str], names: dict[str, int], classes: dict[str, int]) -> None:
    found = labels_of(written, Head(len(names), names=names), "label", "d")
    assert (found.classes, found.remark) == (classes, "")


def test_whole_numbers_go_by_the_head() -> None:
    heads = (Head(3), Head(3, "multi_label_classification"), Head(1))
    found = [labels_of([1, 2, 0], head, "label", "d").encoded(2) for head in heads]
    assert found == [2, [0.0, 0.0, 1.0], [2.0]]


@pytest.mark.parametrize("labels", [[None, 1], [[1], 2], [{"a": 1}], [[[1]]], [0.5, float("nan")], [float("inf")]])
def test_labels_that_are_none_are_refused(labels: list[Any]) -> None:
    with pytest.raises(SpecDefError, match="does not hold classes"):
        labels_of(labels, Head(3), "label", "d")


def test_text_pairs_are_read_as_the_tokenizer_joins_them(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", [{"text": f"a{n}", "and": f"b{n}", "label": n % 2} for n in range(60)])
    text = byte_tokenizer().decode(text_data(path, Head(2), text_pair_column="and").held_out[0]["input_ids"])
    number = text[1 : len(text) // 2]
    assert text == byte_tokenizer().decode(byte_tokenizer()(f"a{number}", f"b{number}")["input_ids"])
    refused: list[tuple[str, Callable[[], object]]] = [
        ("no column 'other'", lambda: text_data(path, Head(2), text_pair_column="other")),
        ("the task is causal-lm", lambda: load(path, byte_tokenizer(), text_pair_column="and")),
        ("--prom.* the task is sequence-classification", lambda: text_data(path, Head(2), prompts="p.txt")),
        ("--reta.* the task is sequence-classification", lambda: text_data(path, Head(2), retained="r.txt")),
        ("--eval.* the task is sequence-classification", lambda: text_data(path, Head(2), eval_tasks=("arc_easy",))),
    ]
    for said, read in refused:
        with pytest.raises(SpecDefError, match=said):
            read()


def test_rows_on_both_sides_of_the_split_are_remarked_on(tmp_path: Path) -> None:
    same = write(tmp_path, "same.jsonl", [{"text": "word " * 90}] * 40)
    remarks = load(same, byte_tokenizer()).remarks
    assert any("1 held-out rows, 1 are repeated" in remark for remark in remarks), remarks
    others = write(tmp_path, "others.jsonl", [{"text": f"word {n} " * 60} for n in range(40)])
    assert load(others, byte_tokenizer()).remarks == ()
    labelled = write(tmp_path, "labelled.jsonl", [{"text": f"a{n % 2}", "label": n % 2} for n in range(60)])
    assert any("4 are repeated" in remark for remark in text_data(labelled, Head(2)).remarks)
