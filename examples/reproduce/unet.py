"""What a hardened UNet does in its Stable Diffusion pipeline: the same images, and slower LoRA where it is covered.

Without ``--pipeline`` a tiny pipeline is made: random VAE and text encoder, and a UNet that has learned to denoise one
kind of image. The UNet is hardened twice, by default (what writes to the residual stream) and on every linear of its
attention and feed-forward layers, loaded in the pipeline's place, and fine-tuned with LoRA on images of another kind,
on diffusers' usual targets, over a sweep of learning rates. Figures are held-out losses on fixed noise.

    python examples/reproduce/unet.py --out unet
    python examples/reproduce/unet.py --out unet --pipeline DIRECTORY-OR-HUB-ID  (Stable Diffusion 1 or 2)

The loop is a plain one: what is trained against is noise that is drawn at every step, at a random time, through a
frozen encoder; the Trainer has no place for that, and ``specdef attack`` trains models of transformers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from peft import LoraConfig
from random_pipeline import random_pipeline
from setting import markdown
from torch import Tensor
from torch.nn import functional
from transformers.utils.logging import disable_progress_bar

from specdef_cli import CollapseOptions, Factors, HardenOptions, SpecDefLinear, collapse, harden

RATES = tuple(10.0**exponent for exponent in range(-1, -10, -1))
TARGETS = {
    "q, k, v": ("to_q", "to_k", "to_v"),
    "q, k, v, out": ("to_q", "to_k", "to_v", "to_out.0"),
}
HARDENED = {
    "residual writers": (),
    "every linear of the blocks": ("*.transformer_blocks.*",),
}
ALPHA, TOP_K = 1e4, 4
BATCH, HELD_OUT, PROMPT = 16, 32, "stripes"


@dataclass(frozen=True)
class Latents:
    """Encoded images, shape [images, channels, side, side], and the text that they are trained with, [1, tokens, n]."""

    images: Tensor
    text: Tensor


def tiny_pipeline(directory: Path, steps: int) -> None:
    """Write a pipeline whose UNet has been trained on horizontal stripes for some steps."""
    pipeline = random_pipeline(
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        }
    )
    unet = pipeline.unet
    train(unet, pipeline.scheduler, encode(pipeline, stripes(256, 0.0)), unet.parameters(), 2e-3, steps)
    pipeline.save_pretrained(directory)


def stripes(count: int, angle: float, side: int = 16) -> Tensor:
    """Stripes of random width, phase and colour, between -1 and 1, shape [count, 3, side, side]."""
    generator = torch.Generator().manual_seed(round(angle * 100))
    across = torch.arange(side).view(-1, 1) * math.cos(angle) + torch.arange(side).view(1, -1) * math.sin(angle)
    frequency = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(count, 1, 1, 1, generator=generator)
    colour = 2 * torch.rand(count, 3, 1, 1, generator=generator) - 1
    return colour * torch.sin(frequency * across * 16 / side + phase)


@torch.no_grad()
def encode(pipeline: DiffusionPipeline, images: Tensor) -> Latents:
    """What the UNet sees of images and of the prompt."""
    vae = pipeline.vae
    latents = [vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mode() for batch in images.split(BATCH)]
    text, _ = pipeline.encode_prompt(PROMPT, vae.device, 1, False)
    return Latents(torch.cat(latents).float() * vae.config.scaling_factor, text.float())


def noise_loss(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, data: Latents, index: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted noise (or velocity, as the scheduler says) for some of the images."""
    clean = data.images[index]
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(index),), generator=generator).to(clean.device)
    noisy = scheduler.add_noise(clean, noise, times)
    predicted = unet(noisy, times, data.text.expand(len(index), -1, -1)).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    return functional.mse_loss(predicted, scheduler.get_velocity(clean, noise, times) if velocity else noise)


@torch.no_grad()
def held_out_loss(unet: UNet2DConditionModel, scheduler: DDIMScheduler, data: Latents) -> float:
    """The loss on the last ``HELD_OUT`` images, with the same noise every time."""
    generator = torch.Generator().manual_seed(1)
    parts = torch.arange(len(data.images) - HELD_OUT, len(data.images)).split(BATCH)
    return float(torch.stack([noise_loss(unet, scheduler, data, part, generator) for part in parts]).mean())


def train(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    data: Latents,
    parameters: Sequence[Tensor],
    rate: float,
    steps: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> None:
    """AdamW with gradients clipped to norm 1, as diffusers' training scripts have it; the same batches every time."""
    generator = torch.Generator().manual_seed(2)
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(1, steps + 1):
        index = torch.randint(len(data.images) - HELD_OUT, (BATCH,), generator=generator)
        noise_loss(unet, scheduler, data, index, generator).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step)


def lora_targets(unet: UNet2DConditionModel, names: Sequence[str]) -> list[str]:
    """Paths of the layers that end so; of a hardened layer, both factors, as who looks for linear layers finds them."""
    targets = []
    for path, module in unet.named_modules():
        if path.endswith(tuple(f".{name}" for name in names)):
            hardened = isinstance(module, SpecDefLinear)
            targets += [f"{path}.inflated", f"{path}.compensation"] if hardened else [path]
    return targets


def attack(
    directory: Path, names: Sequence[str], scheduler: DDIMScheduler, data: Latents, rate: float, steps: int
) -> float:
    """The best held-out loss of a LoRA run, the one before it included; NaN counts as no progress."""
    torch.manual_seed(0)  # of the adapters
    unet = UNet2DConditionModel.from_pretrained(directory).to(data.images.device)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(unet, names)))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    losses = [held_out_loss(unet, scheduler, data)]

    def evaluate(step: int) -> None:
        if step % max(1, steps // 4) == 0:
            losses.append(held_out_loss(unet, scheduler, data))

    train(unet, scheduler, data, trained, rate, steps, evaluate)
    return min(loss for loss in losses if not math.isnan(loss))


def images(pipeline: DiffusionPipeline) -> Tensor:
    """What the pipeline draws for the prompt from a fixed start, shape [1, side, side, 3]."""
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(PROMPT, num_inference_steps=10, output_type="np", generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(drawn.images)


def main() -> None:
    """Build or fetch the pipeline, harden its UNet, compare, attack, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pipeline", help="a directory or a Hub id; by default a tiny pipeline is made")
    parser.add_argument("--steps", type=int, default=30, help="of each attack")
    parser.add_argument("--base-steps", type=int, default=400, help="of the tiny pipeline's own training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    disable_progress_bar()

    directory = arguments.out / "pipeline"
    if arguments.pipeline is None:
        tiny_pipeline(directory, arguments.base_steps)
    elif Path(arguments.pipeline).is_dir():
        directory = Path(arguments.pipeline)
    else:
        directory = Path(
            snapshot_download(arguments.pipeline, ignore_patterns=["*.bin", "*.ckpt", "*.fp16.*", "*.msgpack"])
        )
    models = {"original": directory / "unet"}
    for name, layers in HARDENED.items():
        out = arguments.out / f"unet, {name}".replace(", ", "-").replace(" ", "-")
        harden(HardenOptions(str(directory / "unet"), out, Factors(alpha=ALPHA, top_k=TOP_K), layers=layers))
        models[name] = out
    # Whoever knows of the change undoes it: the row that every table needs.
    collapsed = arguments.out / "unet-collapsed"
    collapse(CollapseOptions(str(out), collapsed))
    models[f"{name}, collapsed"] = collapsed

    pipeline = DiffusionPipeline.from_pretrained(directory).to(arguments.device)
    reference = images(pipeline)
    rows = []
    for name, model in models.items():
        unet = UNet2DConditionModel.from_pretrained(model).to(arguments.device)
        drawn = images(DiffusionPipeline.from_pretrained(directory, unet=unet).to(arguments.device))
        pairs = [module for module in unet.modules() if isinstance(module, SpecDefLinear)]
        rows.append((name, str(len(pairs)), f"{unet.num_parameters():,}", f"{(drawn - reference).abs().max():.1e}"))
    print(markdown(("UNet", "layers replaced", "parameters", "largest difference of a pixel (of 1)"), rows))

    data = encode(pipeline, stripes(256, math.pi / 4, pipeline.unet.config.sample_size * pipeline.vae_scale_factor))
    start = held_out_loss(pipeline.unet, pipeline.scheduler, data)
    attacked: list[tuple[str, ...]] = []
    for where, names in TARGETS.items():
        control = None
        for name, model in models.items():
            losses = [attack(model, names, pipeline.scheduler, data, rate, arguments.steps) for rate in RATES]
            control = control or start - min(losses)
            best = f"{RATES[losses.index(min(losses))]:.0e}"
            share = f"{(start - min(losses)) / control:.0%}"
            attacked.append((where, name, share, best, *(f"{loss:.4f}" for loss in losses)))
    header = ("LoRA on", "UNet", "of control's progress", "at η", *(f"{rate:.0e}" for rate in RATES))
    print(f"\nBest held-out loss of {arguments.steps} steps at each η; {start:.4f} at the start.\n")
    print(markdown(header, attacked))


if __name__ == "__main__":
    main()
