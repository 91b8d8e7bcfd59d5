"""What of a checkpoint's life after release still works after hardening: other dtypes, quantization, caches, adapters.

A published model is cast, quantized, compiled and adapted by people who never heard of its hardening. What hardening
does to the weights (large factors on some channels, small ones on others, an extra layer) is invisible in the dtype
that it was verified in, and may be fatal in another. So the base and the hardened checkpoint are put through the same
formats, and what a format costs the one is compared with what it costs the other.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdef_cli.certify.adapters import AdapterError
from specdef_cli.certify.formats import (
    DEFAULT_FORMATS,
    FORMATS,
    Change,
    Format,
    NotApplicableError,
    RoundingCache,
    Subject,
)
from specdef_cli.certify.quantizers import MissingPackageError
from specdef_cli.checkpoint.reader import open_checkpoint
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.verify import fixed_inputs
from specdef_cli.runtime import load_model, load_tokenizer, without_progress_bars

Measure = Literal["loss", "relative error"]
Status = Literal["kept", "degraded", "broken", "skipped"]

LIMITS: dict[Measure, tuple[float, float]] = {
    # A perplexity 1 % higher is less than 4-bit quantization itself costs; the paper calls a doubled one diverged.
    "loss": (math.log(1.01), math.log(2)),
    # Two runs that round differently in bfloat16 part by about 1e-2.
    "relative error": (0.05, 0.5),
}
"""By how much a hardened figure may differ from the base's: up to the first it is kept, beyond the second broken.

In either direction: an adapter that got lost lowers the loss.
"""


@dataclass(frozen=True)
class DeploymentFigure:
    """How base and hardened checkpoint fare in one format.

    Attributes:
        format: A key of :data:`~specdef_cli.certify.formats.FORMATS`.
        measure: ``loss`` is the mean next-token cross-entropy in nats on the given tokens; ``relative error`` is
            ‖y − y₀‖/‖y₀‖, y₀ the base's float32 outputs on a fixed batch.
        base, hardened: The measure of each in this format; ``None`` where it is not finite or was not measured.
        status: The hardened figure against the base's, by :data:`LIMITS`. A figure that is not finite is broken.
        note: Why it was skipped or failed, or what the format did otherwise than its name says.
    """

    format: str
    measure: Measure
    base: float | None
    hardened: float | None
    status: Status
    note: str = ""


def measure_deployment(
    base: Path,
    hardened: Path,
    tokens: Tensor | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_figure: Callable[[DeploymentFigure], None] = lambda _: None,
) -> tuple[DeploymentFigure, ...]:
    """Put a base and its hardened checkpoint through formats, one model at a time.

    Args:
        base, hardened: Checkpoint directories.
        tokens: int64, shape [sequences, length], e.g. from :func:`token_batch`. With it a causal language model is
            measured by its loss; every other model, or without it, by the relative error of its outputs.
        formats: Names of formats; ``compile`` is the one that is not among them by default.
        device: Where to run; by default the CPU.
        trust_remote_code: Whether code that comes with the directories may run.
        on_figure: Called with each figure as soon as it is measured.

    Raises:
        SpecDefError: A format is unknown, a directory cannot be loaded, or the model takes neither tokens nor pixels.
    """
    for name in formats:
        if name not in FORMATS:
            raise SpecDefError(f"there is no deployment format {name!r}", f"Choose from {', '.join(FORMATS)}.")
    bench = _Bench(base, hardened, tokens, device, trust_remote_code)
    figures = []
    for name in formats:
        figures.append(bench.figure(name))
        on_figure(figures[-1])
    return tuple(figures)


def token_batch(
    directory: Path, text: str, *, sequences: int = 32, length: int = 128, trust_remote_code: bool = False
) -> Tensor:
    """The first tokens of a text as int64, shape [sequences, length]; fewer sequences where the text is short.

    Args:
        directory: The base, whose tokenizer is used.
        text: Of the kind that the base was made for, and that it has not seen.
        sequences, length: How many tokens are wanted.
        trust_remote_code: As in :func:`measure_deployment`.

    Raises:
        SpecDefError: The directory has no tokenizer, or the text does not fill one sequence.
    """
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise SpecDefError(f"{directory} has no tokenizer", "Copy the base model's tokenizer files there.")
    enough = text[: 16 * sequences * length]  # more characters than that a token does not have on average
    ids = tokenizer(enough, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(sequences, len(ids) // length)
    if not count:
        raise SpecDefError(
            f"the text has {len(ids)} tokens, and one sequence needs {length}", "Give more text, or shorter sequences."
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


class _Bench:
    """Two checkpoints, what they are measured by, and the reference outputs that several formats share."""

    def __init__(
        self, base: Path, hardened: Path, tokens: Tensor | None, device: str | None, trust_remote_code: bool
    ) -> None:
        self.base, self.hardened = base, hardened
        self.device, self.trust_remote_code = device, trust_remote_code
        architecture = (open_checkpoint(base).config.get("architectures") or [""])[0]
        self.causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self.tokens = tokens if self.causal else None
        self.measure: Measure = "relative error" if self.tokens is None else "loss"
        self._references: dict[Change, Tensor] = {}

    def figure(self, name: str) -> DeploymentFigure:
        """The figure of one format."""
        wanted = FORMATS[name]
        figure = partial(DeploymentFigure, name, self.measure)
        try:
            self._require_possible(wanted)
            base, _ = self._measured(self.base, wanted)
        except (NotApplicableError, MissingPackageError) as error:
            return figure(None, None, "skipped", str(error))
        except (AdapterError, RuntimeError) as error:
            return figure(None, None, "skipped", f"the base fails: {_first_line(error)}")
        if base is None:
            return figure(None, None, "skipped", "the base itself is not finite in this format")
        try:
            hardened, note = self._measured(self.hardened, wanted)
        except (AdapterError, RuntimeError) as error:
            return figure(base, None, "broken", _first_line(error))
        return figure(base, hardened, judge(self.measure, base, hardened), note)

    def _require_possible(self, wanted: Format) -> None:
        if wanted.round_states is not None and not self.causal:
            raise NotApplicableError("only the key/value cache of a causal language model is measured")
        available = psutil.virtual_memory().available
        for directory in (self.base, self.hardened):
            needed = sum(
                header.nbytes if wanted.dtype is None else math.prod(header.shape) * wanted.dtype.itemsize
                for header in open_checkpoint(directory).tensors.values()
            )
            if needed > 0.8 * available:
                raise NotApplicableError(
                    f"loading takes {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free"
                )

    def _measured(self, directory: Path, wanted: Format) -> tuple[float | None, str]:
        """The measure of one checkpoint (``None`` if it is not finite), and the format's note."""
        reference = None if self.tokens is not None else self._reference(wanted.reference)
        with self._loaded(directory, wanted.dtype) as model:
            inputs = [fixed_inputs(model)] if self.tokens is None else _token_inputs(self.tokens, model.device)
            changed = wanted.change(Subject(directory, model))
            outputs = (_outputs(changed, each, wanted) for each in inputs)
            if reference is None:
                losses = [
                    next_token_loss(logits, each["input_ids"]) for logits, each in zip(outputs, inputs, strict=True)
                ]
                value = math.fsum(losses) / len(losses)
            else:
                value = _relative_error(next(outputs), reference)
        return (value if math.isfinite(value) else None), changed.note

    def _reference(self, change: Change) -> Tensor:
        if change not in self._references:
            with self._loaded(self.base, torch.float32) as model:
                inputs = fixed_inputs(model)
                self._references[change] = _outputs(change(Subject(self.base, model)), inputs, FORMATS["float32"])
        return self._references[change]

    @contextlib.contextmanager
    def _loaded(self, directory: Path, dtype: torch.dtype | None) -> Iterator[PreTrainedModel]:
        with without_progress_bars():
            model = load_model(directory, dtype=dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        try:
            yield model.eval()
        finally:
            del model
            gc.collect()


def judge(measure: Measure, base: float, hardened: float | None) -> Status:
    """Kept, degraded or broken, by :data:`LIMITS`; ``None`` stands for a figure that is not finite."""
    kept, broken = LIMITS[measure]
    if hardened is None or abs(hardened - base) > broken:
        return "broken"
    return "kept" if abs(hardened - base) <= kept else "degraded"


def _token_inputs(tokens: Tensor, device: torch.device) -> list[dict[str, Tensor]]:
    # One sequence at a time: the logits of a large vocabulary take more memory than the text.
    return [{"input_ids": sequence.to(device)} for sequence in tokens.split(1)]


def _outputs(subject: Subject, inputs: dict[str, Tensor], wanted: Format) -> Tensor:
    """The first output (logits, or the last hidden state) in float32 on the CPU."""
    if "pixel_values" in inputs:
        inputs = inputs | {"pixel_values": inputs["pixel_values"].to(next(subject.model.parameters()).dtype)}
    with torch.inference_mode():
        if wanted.round_states is None:
            outputs = subject.model(**inputs)
        else:
            cache = RoundingCache(wanted.round_states, subject.model.config)
            outputs = subject.model(**inputs, past_key_values=cache, use_cache=True)
            if not cache.get_seq_length():
                raise NotApplicableError("the model did not use the key/value cache that it was given")
    first: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
    return first.float().cpu()


def next_token_loss(logits: Tensor, tokens: Tensor) -> float:
    """Mean next-token cross-entropy in nats; ``logits`` [1, length, vocabulary], ``tokens`` [1, length]."""
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:].cpu()))


def _relative_error(outputs: Tensor, reference: Tensor) -> float:
    difference = torch.linalg.vector_norm(outputs.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
