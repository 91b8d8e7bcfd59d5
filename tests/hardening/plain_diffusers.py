"""Loads pipelines in a process of its own: ``python plain_diffusers.py NAME ROOT``; prints a JSON object last.

``ROOT`` holds ``pipeline`` and ``hardened``, the same with a hardened UNet. Only ``with_package`` imports specdef_cli.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def with_package(root: Path) -> dict[str, Any]:
    """Images of both, a round trip through ``save_pretrained``, and what may be done to the model."""
    import specdef_cli

    early = [name for name in ("diffusers", "transformers") if name in sys.modules]
    from diffusers import DiffusionPipeline

    def draw(directory: Path, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
        pipeline = DiffusionPipeline.from_pretrained(directory, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        latents = pipeline("a cat", num_inference_steps=3, output_type="latent", generator=generator).images
        return pipeline, latents.float()

    result: dict[str, Any] = {"early": early}
    for dtype in (torch.float32, torch.bfloat16):
        _, expected = draw(root / "pipeline", dtype)
        pipeline, found = draw(root / "hardened", dtype)
        result[str(dtype)] = float((found - expected).norm() / expected.norm())
    unet = pipeline.unet
    result["class"] = type(unet).__module__
    result["swapped"] = sum(type(module) is specdef_cli.SpecDefLinear for module in unet.modules())
    pipeline, before = draw(root / "hardened", torch.float32)
    pipeline.save_pretrained(root / "saved")
    result["again"] = torch.equal(draw(root / "saved", torch.float32)[1], before)
    result["dtype"] = str(unet.half().to(torch.float32).dtype)
    return result


def without_package(root: Path) -> dict[str, str]:
    """What each way to load the hardened UNet raises; empty where it raised nothing, as it should at the very end."""
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
    raised = {name: _raised(attempt) for name, attempt in attempts.items()}
    raised["imported"] = "specdef_cli" if "specdef_cli" in sys.modules else ""
    import specdef_cli  # noqa: F401

    raised["after a late import"] = _raised(attempts["model"])
    return raised


def _raised(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
