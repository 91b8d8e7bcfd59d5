"""Inputs of a model that is compared or calibrated, from a text or made up, and a trial run without numbers."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from specdef_cli.errors import ResumableError, SpecDefError
from specdef_cli.model.loading import load_tokenizer

BATCH, LENGTH = 2, 32


def fixed_inputs(model: Any) -> dict[str, Any]:
    """A deterministic batch of what the model takes, in its dtype: token ids, pixels, both, sound, or noisy latents."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if not isinstance(model, PreTrainedModel):
        return noisy_latents(model, generator)
    # A model that was put together from two (a speech encoder and a decoder) takes what its encoder does.
    kind = getattr(getattr(model, "encoder", None), "main_input_name", model.main_input_name)
    try:
        if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):  # CLIP and its kin
            inputs = {**_token_ids(config, generator), **_pixels(config, generator)}
        elif kind == "input_ids":
            inputs = _token_ids(_encoder(config), generator)
        elif kind == "pixel_values":
            inputs = _pixels(config, generator)
        elif kind == "input_values":
            inputs = _sound(config, generator)
        elif kind == "input_features":
            inputs = _features(model, config, generator)
        else:
            raise no_batch(model, kind)
        if config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
            inputs["decoder_input_ids"] = _token_ids(config, generator)["input_ids"]
            if "input_ids" in inputs and isinstance(config.eos_token_id, int):  # which classifiers look for
                inputs["input_ids"][:, -1] = config.eos_token_id
    except AttributeError as error:  # a config that names the sizes of its input in another way
        raise no_batch(model, f"{kind} of sizes that its config.json does not name") from error
    floating = {name for name, tensor in inputs.items() if tensor.is_floating_point()}
    return {name: tensor.to(model.device, model.dtype if name in floating else None) for name, tensor in inputs.items()}


def _encoder(config: Any) -> Any:
    """The config of the part that takes the input."""
    parts = (getattr(config, name, None) for name in ("encoder", "encoder_config", "audio_config"))
    return next((part for part in parts if isinstance(part, PreTrainedConfig)), config)


def _token_ids(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    text = config.get_text_config()
    limits = (getattr(text, name, None) or LENGTH + 2 for name in ("max_position_embeddings", "max_target_positions"))
    size = (BATCH, max(1, min(LENGTH, min(limits) - 2)))
    # Low ids are often special (padding changes positions in RoBERTa), so they are left out where others exist.
    low = 5 if text.vocab_size > 10 else 0
    ids = torch.randint(low, text.vocab_size, size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    vision = getattr(config, "vision_config", None) or _encoder(config)
    size = getattr(vision, "image_size", None) or 32 * LENGTH // 4  # convolutions take any
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", None) or vision.in_channels
    return {"pixel_values": torch.randn(BATCH, channels, height, width, generator=generator)}


def _sound(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """A waveform, or a spectrogram where the config counts mel bins (AST)."""
    sound = _encoder(config)
    if hasattr(sound, "num_mel_bins") and hasattr(sound, "max_length"):
        return {"input_values": torch.randn(BATCH, sound.max_length, sound.num_mel_bins, generator=generator)}
    stride = math.prod(getattr(sound, "conv_stride", ())) or 1
    return {"input_values": torch.randn(BATCH, max(4000, LENGTH * stride), generator=generator)}


def _features(model: Any, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """A spectrogram: of a fixed number of frames, bins first (Whisper), or of any number, frames first."""
    sound = _encoder(config)
    if hasattr(sound, "max_source_positions") and hasattr(sound, "num_mel_bins"):
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else model
        strides = [module.stride[0] for module in encoder.modules() if isinstance(module, nn.Conv1d)]
        frames = sound.max_source_positions * math.prod(strides)
        return {"input_features": torch.randn(BATCH, sound.num_mel_bins, frames, generator=generator)}
    bins = next(
        getattr(sound, name)
        for name in ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", "input_dim")
        if getattr(sound, name, None)
    )
    return {"input_features": torch.randn(BATCH, 4 * LENGTH, bins, generator=generator)}


def noisy_latents(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """A batch for a denoiser of diffusers (``UNet2DConditionModel``): latents, timesteps, and what conditions them."""
    config = model.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    if not isinstance(width, int) or config.encoder_hid_dim_type not in (None, "text_proj"):
        raise no_batch(model, f"encoder states of kind {config.encoder_hid_dim_type}, width {width}")
    if config.class_embed_type is not None or config.addition_embed_type not in (None, "text_time"):
        raise no_batch(model, f"embeddings of kind {config.class_embed_type or config.addition_embed_type}")
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


def no_batch(model: Any, inputs: str) -> ResumableError:
    """The error for a model for which no batch can be made up."""
    return ResumableError(
        f"{type(model).__name__} takes {inputs}, for which there is no fixed batch",
        "Run the same command with --resume --no-verify, and compare the outputs yourself.",
    )


def model_outputs(model: Any) -> Tensor:
    """Run the model on the fixed batch; return :func:`compared_output` on the CPU."""
    inputs = fixed_inputs(model)
    try:
        outputs = run_alike(model, inputs)
    except (TypeError, ValueError, AttributeError) as error:
        raise no_batch(model, f"more than {' and '.join(inputs)}") from error
    return compared_output(outputs).cpu()


def run_alike(model: Any, inputs: dict[str, Any]) -> Any:
    """Run a model; what it draws (which patches to mask, for example) is the same each time."""
    with torch.inference_mode(), torch.random.fork_rng(()):
        torch.manual_seed(0)
        return model(**inputs)


def compared_output(outputs: Any) -> Tensor:
    """Pick the output that is compared: logits, the embeddings of text and image, or else the first."""
    if "text_embeds" in outputs and "image_embeds" in outputs:
        return torch.cat([outputs["text_embeds"], outputs["image_embeds"]])
    return outputs["logits"] if "logits" in outputs else outputs[0]


def token_batch(directory: Path, text: str, *, sequences: int = 32, length: int = 128, tokenizer: Any = None) -> Tensor:
    """The first tokens of a text as int64, shape [sequences, length]; fewer sequences where the text is short.

    Where the tokenizer begins a text with a token of its own (``<bos>``), every sequence does: some models predict
    nothing without it.
    """
    tokenizer = load_tokenizer(directory) if tokenizer is None else tokenizer
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise SpecDefError(f"{directory} has no tokenizer", "Copy the base model's tokenizer files there.")
    first = first_token(tokenizer)
    beginning = [] if first is None else [first]
    own = max(1, length - len(beginning))
    enough = text[: 16 * sequences * length]  # more characters than that a token does not have on average
    ids = tokenizer(enough, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(sequences, len(ids) // own)
    if not count:
        raise SpecDefError(f"the text has {len(ids)} tokens, and one sequence needs {own}", "Give more text.")
    rows = [beginning + ids[own * row : own * (row + 1)] for row in range(count)]
    return torch.tensor(rows, dtype=torch.int64)


def first_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text; ``None`` if it puts none."""
    with_it = tokenizer("a", verbose=False)["input_ids"]
    found = tokenizer.bos_token_id
    return found if found is not None and with_it[:1] == [found] else None


def require_in_vocabulary(sequences: Iterable[Any], config: Any, directory: Path) -> None:
    """Refuse tokens beyond the vocabulary of the model. A tokenizer may know more of them, as long as none occurs."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        return
    largest = max((int(torch.as_tensor(ids).max()) for ids in sequences if len(ids)), default=0)
    if largest >= size:
        raise SpecDefError(
            f"token id {largest} (tokenizer of {directory}) is outside the model's vocabulary of {size}",
            "Copy the tokenizer that belongs to the model into its directory.",
        )


@dataclass(frozen=True)
class Trial:
    """The outcome of :func:`try_out`.

    Attributes:
        inputs: Names of the inputs that were made up.
        certain: Whether the error, if any, would come with real values too.
        read_past: Paths of modules whose parameters are read while the module itself does not run.
    """

    inputs: tuple[str, ...]
    error: Exception | None
    certain: bool
    read_past: frozenset[str]


def try_out(model: nn.Module) -> Trial:
    """Run a model on the meta device once, where it computes shapes alone."""
    inputs: tuple[str, ...] = ()
    reads = _Reads(model)
    training = model.training
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    mixtures = [part.config for part in parts if part._can_set_experts_implementation()]
    usual = [config._experts_implementation_internal for config in mixtures]
    try:
        for config in mixtures:  # other ways to run experts ask for values
            config._experts_implementation_internal = "batched_mm"
        batch = fixed_inputs(model.eval())
        inputs = tuple(batch)
        batch.pop("attention_mask", None)  # all ones, which models look at the values to find out
        batch = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.inference_mode(), torch.device("meta"), reads:
            model(**batch)
    except Exception as error:
        certain = not reads.guessed and not isinstance(error, NotImplementedError) and "meta" not in str(error).lower()
        return Trial(inputs, error, certain, frozenset(reads.found))
    finally:
        reads.remove()
        model.train(training)
        for config, implementation in zip(mixtures, usual, strict=True):
            config._experts_implementation_internal = implementation
    return Trial(inputs, None, True, frozenset(reads.found))


_QUESTIONS = (Tensor.__bool__, Tensor.__contains__, Tensor.item)


class _Reads(TorchFunctionMode):
    """Notices parameters that go into a computation while no module that owns them is running.

    Where a model asks whether a value is so, the answer is no.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.guessed = False
        self._running: Counter[str] = Counter()
        self._owners: dict[int, set[str]] = {}
        self._hooks = []
        for path, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            for parameter in own:
                self._owners.setdefault(id(parameter), set()).add(path)
            if own:
                self._hooks.append(module.register_forward_pre_hook(partial(self._count, path, 1)))
                self._hooks.append(module.register_forward_hook(partial(self._count, path, -1)))

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, path: str, step: int, *_: Any) -> None:
        self._running[path] += step

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _QUESTIONS and args[0].device.type == "meta":
            self.guessed = True
            return False
        result = func(*args, **(kwargs or {}))
        computed = isinstance(result, Tensor) or (
            isinstance(result, tuple | list) and any(map(torch.is_tensor, result))
        )
        for value in chain(args, (kwargs or {}).values()) if computed else ():  # not its dtype or its shape
            owners = self._owners.get(id(value), set()) if isinstance(value, nn.Parameter) else set()
            if not any(self._running[path] for path in owners):
                self.found |= owners
        return result
