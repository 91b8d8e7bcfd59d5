"""The first tokens of a text, in sequences of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from specdef_cli.errors import SpecDefError
from specdef_cli.runtime.load import load_tokenizer


def token_batch(
    directory: Path, text: str, *, sequences: int = 32, length: int = 128, trust_remote_code: bool = False
) -> Tensor:
    """The first tokens of a text as int64, shape [sequences, length]; fewer sequences where the text is short.

    Where the tokenizer begins a text with a token of its own (``<bos>``), every sequence does: some models predict
    nothing without it.
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
