"""A tiny random Stable Diffusion pipeline, as a directory that diffusers wrote."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tests.commands import REPOSITORY

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """A random UNet; keywords change its config."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**UNET, **changes})


@torch.no_grad()
def denoise(unet: UNet2DConditionModel) -> torch.Tensor:
    """What it makes of fixed noise and text."""
    generator = torch.Generator().manual_seed(5)
    sample, text = (torch.randn(3, *shape, generator=generator).to(unet.dtype) for shape in ((4, 8, 8), (7, 24)))
    return unet(sample, torch.tensor([3, 400, 999]), text).sample


def write_pipeline(directory: Path) -> Path:
    """A pipeline in float32 around such a UNet."""
    build = runpy.run_path(str(REPOSITORY / "examples" / "reproduce" / "random_pipeline.py"))["random_pipeline"]
    build(UNET).save_pretrained(directory)
    return directory
