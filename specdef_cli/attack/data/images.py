"""Images with classes: kept as they are stored, decoded when a batch needs them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, default_data_collator

from specdef_cli.attack.data.examples import AttackData
from specdef_cli.attack.data.labelled import Example, Head, labelled_data
from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.model.opened import OpenedModel

_DEFAULT_SIZE = 224
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class PixelTransform:
    """From an image to a model's input."""

    channels: int  # 1 or 3
    height: int
    width: int  # and height: pixels of the input, of no effect where there is a processor
    processor: BaseImageProcessor | None = None  # the checkpoint's own, where it has one

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Resize, and bring pixels to [−1, 1]; or whatever the processor does.

        Returns:
            float32, shape [channels, height, width].
        """
        image = image.convert(_MODES[self.channels])
        if self.processor is not None:
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        stored = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = stored.view(1, image.height, image.width, self.channels).permute(0, 3, 1, 2).float()
        resized = functional.interpolate(pixels, (self.height, self.width), mode="bilinear", antialias=True)
        return resized[0] / 127.5 - 1.0


@dataclass(frozen=True)
class Pixels:
    """A map-style data set of images, which are decoded when a batch needs them."""

    examples: list[Example]
    transform: PixelTransform

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        example = self.examples[index]
        return {"pixel_values": self.transform(Image.open(io.BytesIO(example["image"]))), "labels": example["label"]}


def load_pixel_transform(model: OpenedModel) -> PixelTransform:
    """The transform of a checkpoint: its image processor's, else one that fits its configuration."""
    directory, processor = model.directory, None
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        if (directory / "preprocessor_config.json").is_file():
            processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise SpecDefError(
            f"how {directory} reads images cannot be found out: {first_line(error)}",
            "Give a directory with an image classifier's config.json and, where it has one, its image processor.",
        ) from error
    channels = int(getattr(config, "num_channels", 3))
    if channels not in _MODES:
        raise SpecDefError(
            f"{directory} takes images of {channels} channels", "Give a model of grey (1) or colour (3) images."
        )
    size: Any = getattr(config, "image_size", None) or _DEFAULT_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return PixelTransform(channels, height, width, processor)


def image_data(options: AttackOptions, transform: PixelTransform, head: Head) -> AttackData:
    """Images of the named data set: a directory of a folder for each class, a parquet file, a Hub id."""
    encode, prepared = partial(_stored, options=options), partial(Pixels, transform=transform)
    columns = (options.image_column,)
    return labelled_data(options, "images", columns, encode, head, default_data_collator, prepared=prepared)


def _stored(value: Any, options: AttackOptions) -> Example:
    """The file of an image, as `datasets` hands it out undecoded: its bytes, or where they are."""
    stored = value if isinstance(value, dict) else {}
    content = stored.get("bytes")
    try:
        if content is None and stored.get("path"):
            content = Path(stored["path"]).read_bytes()
        if content is None:
            raise UnidentifiedImageError
        Image.open(io.BytesIO(content)).verify()
    except (OSError, SyntaxError) as error:  # what Pillow says of broken files; UnidentifiedImageError is an OSError
        raise SpecDefError(
            f"column {options.image_column!r} of {options.dataset} does not hold images that can be read",
            "Name a column of images (PNG, JPEG, …) with --image-column.",
        ) from error
    return {"image": content}
