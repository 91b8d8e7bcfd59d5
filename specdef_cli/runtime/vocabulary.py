"""Do a tokenizer's tokens have a place in the model's embedding?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from specdef_cli.errors import SpecDefError


def require_in_vocabulary(sequences: Iterable[Any], config: Any, directory: Path) -> None:
    """Refuse tokens beyond the vocabulary of the model. A tokenizer may know more of them, as long as none occurs."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        return
    largest = max((int(torch.as_tensor(ids).max()) for ids in sequences if len(ids)), default=0)
    if largest >= size:
        raise SpecDefError(
            f"the tokenizer of {directory} gives token {largest}, and the model knows {size} tokens, from 0",
            "Copy the tokenizer that belongs to the model into its directory.",
        )
