"""Text for a causal language model: documents one after the other, cut into sequences of equal length."""

from __future__ import annotations

import hashlib
import re

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, default_data_collator

from specdef_cli.attack.data.attack_data import HELD_OUT_EVERY, AttackData, check_size, is_held_out, whole_batches
from specdef_cli.attack.data.rows import as_text, field, rows
from specdef_cli.attack.options import AttackOptions

BUILTIN_NAME = "pydoc_data.topics (English prose of Python's language reference)"


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Token sequences of equal length for a causal language model; the labels are the inputs.

    Args:
        tokens: int64, shape [sequences, length].
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sequence = self.tokens[index]  # [length]
        return {"input_ids": sequence, "labels": sequence}


def language_data(options: AttackOptions, tokenizer: PreTrainedTokenizerBase) -> AttackData:
    """Token sequences of the named text, or of the prose that comes with Python."""
    length = options.sequence_length
    wanted = options.steps * options.batch_size
    if options.dataset is None:
        name, texts = BUILTIN_NAME, iter(builtin_documents())
    else:
        name = options.dataset
        texts = (as_text(field(row, options.text_column, name), options.text_column, name) for row in rows(options))
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    train: list[int] = []
    held_out: list[int] = []
    for row, text in enumerate(texts):
        half, enough = (held_out, options.eval_sequences * length) if is_held_out(row) else (train, wanted * length)
        if len(half) < enough:
            half += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        elif len(train) >= wanted * length and len(held_out) >= options.eval_sequences * length:
            break
    if len(held_out) < length:
        cut = len(train) - max(length, min(len(train) // HELD_OUT_EVERY, options.eval_sequences * length))
        train, held_out = train[: max(cut, 0)], train[max(cut, 0) :]
    train_tokens = whole_batches(_cut(train, length)[:wanted], options.batch_size)
    held_out_tokens = _cut(held_out, length)[: options.eval_sequences]
    check_size(name, "sequences", len(train_tokens), len(held_out_tokens), options)
    digest = hashlib.sha256(train_tokens.numpy().tobytes())
    digest.update(b"|" + held_out_tokens.numpy().tobytes())
    return AttackData(
        name=name,
        train=Sequences(train_tokens),
        held_out=Sequences(held_out_tokens),
        collate=default_data_collator,
        fingerprint=digest.hexdigest()[:16],
    )


def builtin_documents() -> list[str]:
    """The prose of Python's language reference, one topic a document, paragraphs that topics share kept once."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", topics[name]))
        paragraphs = [block for block in dict.fromkeys(blocks) if block not in seen and _is_prose(block)]
        seen.update(paragraphs)
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    return documents


def _is_prose(paragraph: str) -> bool:
    plain = sum(character.isalpha() or character in " ,." for character in paragraph)
    return paragraph.endswith((".", ":")) and plain >= 0.9 * len(paragraph)


def _cut(tokens: list[int], length: int) -> torch.Tensor:
    """Sequences that do not overlap, int64 [sequences, length]; a rest is dropped."""
    whole = len(tokens) // length
    return torch.tensor(tokens[: whole * length], dtype=torch.int64).view(whole, length)
