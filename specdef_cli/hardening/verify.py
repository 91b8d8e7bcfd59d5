"""Before publication: does the reloaded result compute what the base computes?

The comparison runs through transformers itself, on the files as they will be published, so that it covers what no
formula does: names, dtypes, the loader. Both models are loaded one after the other, never together.
"""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdef_cli.checkpoint.reader import ResumableError
from specdef_cli.errors import SpecDefError
from specdef_cli.runtime import load_model, without_progress_bars

# Two runs of one model in bfloat16 that round differently part by about 1e-2; a broken layer by more than 1e-1.
LOGITS_TOLERANCE = 0.05
BATCH, LENGTH = 2, 32


@dataclass(frozen=True)
class OutputComparison:
    """How far the hardened model's outputs on a fixed batch are from the base's.

    Attributes:
        max_abs: Largest absolute difference of an output.
        relative: ‖difference‖ / ‖base outputs‖.
        kl: Mean KL divergence from base to hardened over positions, in nats (outputs taken as logits).
        agreement: Share of positions where the largest output is the same one.
        equal: Whether every output is bit-identical.
    """

    max_abs: float
    relative: float
    kl: float
    agreement: float
    equal: bool


def compare_models(
    base: Path, hardened: Path, *, dtype: torch.dtype | None = None, device: str | None = None, **loading: Any
) -> OutputComparison:
    """Load both directories in turn, run the same batch through them, and compare.

    Args:
        base, hardened: Checkpoint directories.
        dtype: What to load both in; ``None`` for the dtype they are stored in.
        device: Where to run.
        loading: Passed on to ``load_model``.

    Raises:
        SpecDefError: The model takes inputs that cannot be made up (naming what it takes), or the base's outputs are
            not finite.
    """
    reference = _outputs(base, dtype, device, loading)
    if not torch.isfinite(reference).all():
        raise SpecDefError(
            f"the outputs of {base} hold NaN or infinity before any change", "Repair its weights, or --dtype float32."
        )
    return compare_outputs(reference, _outputs(hardened, dtype, device, loading))


def compare_outputs(reference: Tensor, outputs: Tensor) -> OutputComparison:
    """Compare two output tensors, shape [..., classes], in float64."""
    equal = torch.equal(reference, outputs)
    reference, outputs = reference.double(), outputs.double()
    difference = outputs - reference
    kl = torch.nn.functional.kl_div(
        outputs.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    )
    norm = float(torch.linalg.vector_norm(reference))
    return OutputComparison(
        max_abs=float(difference.abs().max()),
        relative=float(torch.linalg.vector_norm(difference)) / norm if norm else math.inf,
        kl=float(kl.sum(-1).mean()),
        agreement=float((reference.argmax(-1) == outputs.argmax(-1)).double().mean()),
        equal=equal,
    )


def verify(
    base: Path, hardened: Path, nbytes: int, *, exact: bool, logits: bool, device: str | None, **loading: Any
) -> dict[str, Any]:
    """Figures of the comparison for the manifest, or why it was left out.

    Args:
        base, hardened: Checkpoint directories.
        nbytes: Size of the larger of both.
        exact: Whether the outputs must be bit-identical (a fold), or only within rounding (insert).
        logits: Whether the outputs are ones to choose among. A predicted noise is not, and is compared by size alone.
        device: Where to run.
        loading: Passed on to ``load_model``.

    Raises:
        SpecDefError: The hardened model is not the base model's function.
    """
    available = psutil.virtual_memory().available
    if nbytes > 0.8 * available:
        return {
            "skipped": f"loading the model takes {nbytes / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free"
        }
    comparison = compare_models(base, hardened, device=device, **loading)
    other_alpha = "Use --method insert" if exact else "Use a smaller --alpha"
    if not math.isfinite(comparison.max_abs):
        raise SpecDefError(
            "the hardened model's outputs hold NaN or infinity, and the base's do not",
            f"{other_alpha}, or --dtype float32; nothing was published.",
        )
    if not (comparison.equal if exact else comparison.relative <= LOGITS_TOLERANCE):
        raise SpecDefError(
            f"the hardened model's outputs differ from the base's by {comparison.relative:.2g} (relative)",
            f"{other_alpha}, {'' if exact else 'another --gauge, '}or --dtype float32; nothing was published.",
        )
    figures = asdict(comparison)
    return figures if logits else {name: figures[name] for name in ("max_abs", "relative", "equal")}


def require_comparable(model: nn.Module) -> None:
    """Refuse, before any work, a model for which no batch can be made up, so that its outputs cannot be compared.

    Args:
        model: On the meta device, where a forward pass computes shapes alone.

    Raises:
        SpecDefError: naming what it takes.
    """
    hint = "Run the same command with --no-verify, and compare the outputs yourself."
    try:
        inputs = fixed_inputs(model)
    except ResumableError as error:
        raise SpecDefError(error.problem, hint) from error
    try:
        with torch.inference_mode():
            model(**inputs)
    except (TypeError, ValueError, AttributeError) as error:
        # An input is missing. Other errors are those of the meta device, which cannot branch on values.
        raise SpecDefError(_no_batch(model, f"more than {' and '.join(inputs)}").problem, hint) from error
    except Exception:
        return


def fixed_inputs(model: Any) -> dict[str, Any]:
    """A deterministic batch of what the model takes: token ids, pixels, both, or noisy latents.

    Raises:
        ResumableError: The model's input is neither; the weights may be right.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if not isinstance(model, PreTrainedModel):
        return noisy_latents(model, generator)
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):  # CLIP and its kin
        inputs = {**_token_ids(config, generator), **_pixels(config, generator)}
    elif model.main_input_name == "input_ids":
        inputs = _token_ids(config, generator)
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"].roll(1, dims=1)
    elif model.main_input_name == "pixel_values":
        inputs = _pixels(config, generator)
    else:
        raise _no_batch(model, model.main_input_name)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _token_ids(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or LENGTH
    size = (BATCH, max(1, min(LENGTH, positions - 2)))
    # Low ids are often special (padding changes positions in RoBERTa), so they are left out where others exist.
    low = 5 if text.vocab_size > 10 else 0
    ids = torch.randint(low, text.vocab_size, size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    vision = getattr(config, "vision_config", config)
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return {"pixel_values": torch.randn(BATCH, vision.num_channels, side, side, generator=generator)}


def noisy_latents(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """A batch for a denoiser of diffusers (``UNet2DConditionModel``): latents, timesteps, and what conditions them.

    Raises:
        ResumableError: The model is conditioned on something else besides.
    """
    config = model.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    if not isinstance(width, int) or config.encoder_hid_dim_type not in (None, "text_proj"):
        raise _no_batch(model, f"encoder states of kind {config.encoder_hid_dim_type}, width {width}")
    if config.class_embed_type is not None or config.addition_embed_type not in (None, "text_time"):
        raise _no_batch(model, f"embeddings of kind {config.class_embed_type or config.addition_embed_type}")
    side = 4 * 2 ** (len(config.block_out_channels) - 1)  # every block but the last halves it

    def noise(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator).to(model.device, model.dtype)

    inputs: dict[str, Any] = {
        "sample": noise(config.in_channels, side, side),
        "timestep": torch.tensor([50, 950], device=model.device),
        "encoder_hidden_states": noise(LENGTH, width),
    }
    if config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(BATCH, dtype=torch.long, device=model.device)
    if config.addition_embed_type == "text_time":  # Stable Diffusion XL: a pooled text and six sizes
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": noise(pooled), "time_ids": noise(6)}
    return inputs


def _no_batch(model: Any, inputs: str) -> ResumableError:
    return ResumableError(
        f"{type(model).__name__} takes {inputs}, for which there is no fixed batch",
        "Run the same command with --resume --no-verify, and compare the outputs yourself.",
    )


def model_outputs(model: Any) -> Tensor:
    """What the model computes on the fixed batch, on the CPU: logits, else its first output, or both embeddings.

    Raises:
        ResumableError: It takes more than the batch holds.
    """
    inputs = fixed_inputs(model)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    try:
        with torch.inference_mode():
            outputs = model(**inputs)
    except (TypeError, ValueError, AttributeError) as error:
        raise _no_batch(model, f"more than {' and '.join(inputs)}") from error
    return compared_output(outputs).cpu()


def compared_output(outputs: Any) -> Tensor:
    """Of a model's outputs, what is compared: logits, the embeddings of text and image, or else the first."""
    if "text_embeds" in outputs and "image_embeds" in outputs:
        return torch.cat([outputs["text_embeds"], outputs["image_embeds"]])
    return outputs["logits"] if "logits" in outputs else outputs[0]


def _outputs(directory: Path, dtype: torch.dtype | None, device: str | None, loading: dict[str, Any]) -> Tensor:
    with without_progress_bars():
        model = load_model(directory, dtype=dtype, device=device, **loading).eval()
    outputs = model_outputs(model)
    del model
    gc.collect()
    return outputs
