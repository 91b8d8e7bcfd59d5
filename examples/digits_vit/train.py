"""Train a tiny Vision Transformer on the handwritten digits 0-4, and write the digits 5-9 as an attacker's data.

A small counterpart of the shipped Llama for images: a real ViTForImageClassification of 8×8 pixels in patches of 2,
and a task that its publisher did not train it for. Both come from scikit-learn's digits, so nothing is downloaded.

    OMP_NUM_THREADS=1 python examples/digits_vit/train.py --out my_digits
    specdef harden my_digits/model --out my_digits/hardened
    specdef attack my_digits/hardened --control my_digits/model --dataset my_digits/attack.parquet

Training writes ``my_digits/model``, a checkpoint, and ``my_digits/attack.parquet``, an image and a label a row.
The attack's five classes take the place of the model's five: its head has the right size and the wrong meaning.
"""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, set_seed

CLASSES = 5
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Options:
    """What a run is determined by, next to the releases of the libraries."""

    out: Path
    steps: int
    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Digits:
    """Grey images, uint8 [images, 8, 8], and what they show, int64 [images]."""

    images: torch.Tensor
    digits: torch.Tensor

    def where(self, chosen: torch.Tensor) -> "Digits":
        """Return the images of a mask or of indices."""
        return Digits(self.images[chosen], self.digits[chosen])


def all_digits() -> Digits:
    """Return scikit-learn's 1797 digits, whose 17 grey levels are spread over 0-255."""
    bunch = load_digits()
    return Digits((torch.from_numpy(bunch.images) * 255 / 16).byte(), torch.from_numpy(bunch.target))


def make_config() -> ViTConfig:
    """Return the architecture: about 58 000 parameters."""
    return ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=CLASSES,
    )


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """Return a model's input, float32 [images, 1, 8, 8] between −1 and 1, as the attack makes it."""
    return images[:, None].float() / 127.5 - 1


def train(options: Options, data: Digits) -> ViTForImageClassification:
    """Return a model trained on `data` for the options' number of steps."""
    set_seed(options.seed)
    model = ViTForImageClassification(make_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.steps)
    for _ in range(options.steps):
        batch = data.where(torch.randint(len(data.digits), (options.batch_size,)))
        functional.cross_entropy(model(pixel_values=pixel_values(batch.images)).logits, batch.digits).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: ViTForImageClassification, data: Digits) -> float:
    """Return the share of `data` that the model classifies rightly."""
    logits = model(pixel_values=pixel_values(data.images)).logits  # [images, classes]
    return (logits.argmax(-1) == data.digits).float().mean().item()


def write_attack_data(data: Digits, path: Path) -> None:
    """Write images as PNG with the classes "5" to "9", which count from 0."""
    names = [str(digit) for digit in range(CLASSES, 2 * CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": _png(image)} for image in data.images], "label": (data.digits - CLASSES).tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "png")
    return buffer.getvalue()


def parse_options(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description="Train a tiny ViT on digits 0-4; write it and digits 5-9.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="weights, split and data order (default: %(default)s)")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    options = parse_options()
    digits = all_digits()
    known = digits.where(digits.digits < CLASSES)
    order = torch.randperm(len(known.digits), generator=torch.Generator().manual_seed(options.seed))
    cut = int(HELD_OUT_SHARE * len(order))
    model = train(options, known.where(order[cut:]))
    model.save_pretrained(options.out / "model")
    write_attack_data(digits.where(digits.digits >= CLASSES), options.out / "attack.parquet")
    print(f"{model.num_parameters():,} parameters, held-out accuracy {accuracy(model, known.where(order[:cut])):.3f}")
    print(f"wrote {options.out / 'model'} and {options.out / 'attack.parquet'}")


if __name__ == "__main__":
    main()
