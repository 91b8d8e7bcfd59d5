"""Loads pipelines in a process of its own: ``python plain_diffusers.py NAME ROOT``; asserts what must hold.

``ROOT`` holds ``pipeline`` and ``hardened``, the same with a hardened UNet. Only ``with_package`` imports specdef_cli.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def with_package(root: Path) -> None:
    """Images of both, a round trip through ``save_pretrained``, and what may be done to the model."""
    import specdef_cli

    assert not {"diffusers", "transformers"} & set(sys.modules)
    from diffusers import DiffusionPipeline

    def draw(directory: Path, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
        pipeline = DiffusionPipeline.from_pretrained(directory, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        latents = pipeline("a cat", num_inference_steps=3, output_type="latent", generator=generator).images
        return pipeline, latents.float()

    for dtype, most in ((torch.bfloat16, 5e-2), (torch.float32, 1e-5)):
        _, expected = draw(root / "pipeline", dtype)
        pipeline, found = draw(root / "hardened", dtype)
        assert (found - expected).norm() < most * expected.norm(), dtype
    assert type(pipeline.unet).__module__.startswith("diffusers.")
    assert sum(type(module) is specdef_cli.SpecDefLinear for module in pipeline.unet.modules()) == 12
    pipeline.save_pretrained(root / "saved")
    assert torch.equal(draw(root / "saved", torch.float32)[1], found)
    assert pipeline.unet.half().to(torch.float32).dtype == torch.float32


def without_package(root: Path) -> None:
    """Every way to load the hardened UNet raises, for the right reason, until the package is imported."""
    from diffusers import AutoModel, DiffusionPipeline, UNet2DConditionModel
    from safetensors.torch import load_file

    unet = root / "hardened" / "unet"
    stripped = root / "stripped"
    shutil.copytree(unet, stripped)
    config = json.loads((stripped / "config.json").read_text())
    del config["quantization_config"]
    (stripped / "config.json").write_text(json.dumps(config))
    attempts: dict[str, Callable[[], Any]] = {
        "pipeline": lambda: DiffusionPipeline.from_pretrained(root / "hardened"),
        "pipeline in bfloat16": lambda: DiffusionPipeline.from_pretrained(root / "hardened", dtype=torch.bfloat16),
        "model": lambda: UNet2DConditionModel.from_pretrained(unet),
        "subfolder": lambda: UNet2DConditionModel.from_pretrained(root / "hardened", subfolder="unet"),
        "AutoModel": lambda: AutoModel.from_pretrained(unet),
        "not by meta": lambda: UNet2DConditionModel.from_pretrained(unet, low_cpu_mem_usage=False),
        "stripped": lambda: UNet2DConditionModel.from_pretrained(stripped),
        "stripped, not by meta": lambda: UNet2DConditionModel.from_pretrained(stripped, low_cpu_mem_usage=False),
        "state dict": lambda: UNet2DConditionModel.from_config(config).load_state_dict(
            load_file(unet / "diffusion_pytorch_model.safetensors")
        ),
    }
    for name, attempt in attempts.items():
        # The unknown name, or a tombstone where a weight belongs.
        reasons = "shape|size mismatch" if "stripped" in name or name == "state dict" else "got specdef"
        with pytest.raises(Exception, match=reasons):
            attempt()
    assert "specdef_cli" not in sys.modules
    import specdef_cli  # noqa: F401

    attempts["model"]()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    print("\n{}")
