"""One checkpoint on its way through a format: where it lies, what it is measured by, and how its loss is taken."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli.model import without_progress_bars
from specdef_cli.model.opened import OpenedModel

MAX_LOGITS = 2**24
"""Logits of one forward pass: 128 MB in float64, in which their loss is taken."""


class NotApplicableError(Exception):
    """A format means nothing for this model, or cannot be had here; the message says why."""


class RefusedError(Exception):
    """A tool refuses the checkpoint; the message is its own, in one line."""


@dataclass(frozen=True)
class Trial:
    """A checkpoint and what it is measured by.

    Attributes:
        scratch: A directory for a tool's own files (a GGUF file, an adapter); what is there already is used again, so
            it belongs to this checkpoint and these tokens alone.
        tokens: int64, shape [sequences, length]; ``None`` for what is no language model.
    """

    model: OpenedModel
    base: OpenedModel
    scratch: Path
    tokens: Tensor | None = None
    device: str | None = None

    @property
    def directory(self) -> Path:
        """Where the model's files are, for tools that take a path."""
        return self.model.directory

    @contextlib.contextmanager
    def loaded(self, dtype: torch.dtype | None = None, **loading: Any) -> Iterator[PreTrainedModel]:
        """The checkpoint's model in evaluation mode; its memory is free again afterwards.

        Args:
            dtype: What to load the weights as; ``None`` for the dtype that they are stored in.
            loading: Passed on to ``from_pretrained``.
        """
        with load(self.model, dtype, self.device, **loading) as model:
            yield model

    def required_tokens(self) -> Tensor:
        """The tokens; raises :class:`NotApplicableError` where there are none."""
        if self.tokens is None:
            raise NotApplicableError("only causal language models are measured")
        return self.tokens


@contextlib.contextmanager
def load(
    opened: OpenedModel,
    dtype: torch.dtype | None,
    device: str | None = None,
    **loading: Any,
) -> Iterator[PreTrainedModel]:
    """A model in evaluation mode, without progress bars; its memory is free again afterwards."""
    with without_progress_bars():
        model = opened.load(dtype=dtype, device=device, **loading)
    try:
        yield model.eval()
    finally:
        del model
        gc.collect()


def mean_loss(model: Any, tokens: Tensor) -> float:
    """Mean next-token cross-entropy in nats of plain forward passes; may be not finite.

    Args:
        model: Takes ``input_ids`` and returns ``logits``.
        tokens: int64, shape [sequences, length].
    """
    with torch.inference_mode():
        return mean_over_batches(
            tokens, model.config, lambda batch: model(input_ids=batch.to(next(model.parameters()).device)).logits
        )


def mean_over_batches(tokens: Tensor, config: Any, logits: Callable[[Tensor], Tensor]) -> float:
    """Mean next-token cross-entropy in nats over sequences of one length.

    Args:
        tokens: int64, shape [sequences, length].
        logits: From tokens [batch, length] to [batch, length, vocabulary].
    """
    # The logits of a large vocabulary take more memory than the text; a small model spends its time on calls.
    size = max(1, MAX_LOGITS // (tokens.shape[1] * config.get_text_config().vocab_size))
    losses = [len(batch) * next_token_loss(logits(batch), batch) for batch in tokens.split(size)]
    return math.fsum(losses) / len(tokens)


def next_token_loss(logits: Tensor, tokens: Tensor) -> float:
    """Mean next-token cross-entropy in nats; ``logits`` [batch, length, vocabulary], ``tokens`` [batch, length]."""
    predictions, targets = logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(predictions.double().cpu(), targets.cpu()))
