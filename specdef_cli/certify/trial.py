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
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli.errors import SpecDefError
from specdef_cli.runtime import load_model, load_tokenizer, without_progress_bars

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
        directory: The base or a hardened directory.
        base: The base.
        scratch: A directory for a tool's own files (a GGUF file, an adapter); what is there already is used again, so
            it belongs to this checkpoint and these tokens alone.
        tokens: int64, shape [sequences, length]; ``None`` for what is no language model.
        device: Where to run; by default the CPU.
    """

    directory: Path
    base: Path
    scratch: Path
    tokens: Tensor | None = None
    device: str | None = None
    trust_remote_code: bool = False

    @contextlib.contextmanager
    def loaded(self, dtype: torch.dtype | None = None, **loading: Any) -> Iterator[PreTrainedModel]:
        """The checkpoint's model in evaluation mode; its memory is free again afterwards.

        Args:
            dtype: What to load the weights as; ``None`` for the dtype that they are stored in.
            loading: Passed on to ``from_pretrained``.
        """
        with load(self.directory, dtype, self.device, self.trust_remote_code, **loading) as model:
            yield model

    def required_tokens(self) -> Tensor:
        """The tokens; raises :class:`NotApplicableError` where there are none."""
        if self.tokens is None:
            raise NotApplicableError("only causal language models are measured")
        return self.tokens


@contextlib.contextmanager
def load(
    directory: Path,
    dtype: torch.dtype | None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **loading: Any,
) -> Iterator[PreTrainedModel]:
    """A directory's model in evaluation mode, without progress bars; its memory is free again afterwards."""
    with without_progress_bars():
        model = load_model(directory, dtype=dtype, device=device, trust_remote_code=trust_remote_code, **loading)
    try:
        yield model.eval()
    finally:
        del model
        gc.collect()


def token_batch(
    directory: Path, text: str, *, sequences: int = 32, length: int = 128, trust_remote_code: bool = False
) -> Tensor:
    """The first tokens of a text as int64, shape [sequences, length]; fewer sequences where the text is short.

    Where the tokenizer begins a text with a token of its own (``<bos>``), every sequence does: some models predict
    nothing without it.

    Args:
        directory: The base, whose tokenizer is used.
        text: Of the kind that the base was made for, and that it has not seen.
        sequences, length: How many tokens are wanted.
        trust_remote_code: Whether code that comes with the directory may run.
    """
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise SpecDefError(f"{directory} has no tokenizer", "Copy the base model's tokenizer files there.")
    first = first_token(tokenizer)
    beginning = [] if first is None else [first]
    own = length - len(beginning)
    enough = text[: 16 * sequences * length]  # more characters than that a token does not have on average
    ids = tokenizer(enough, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(sequences, len(ids) // own)
    if not count:
        raise SpecDefError(
            f"the text has {len(ids)} tokens, and one sequence needs {own}", "Give more text, or shorter sequences."
        )
    rows = [beginning + ids[own * row : own * (row + 1)] for row in range(count)]
    return torch.tensor(rows, dtype=torch.int64)


def first_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text; ``None`` if it puts none."""
    with_it = tokenizer("a", verbose=False)["input_ids"]
    found = tokenizer.bos_token_id
    return found if found is not None and with_it[:1] == [found] else None


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
        config: The model's, for the size of its vocabulary.
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
