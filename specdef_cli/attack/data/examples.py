"""Token sequences for language models, their batches, and the two halves of an attack's data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, default_data_collator

from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError

NOT_COUNTED = -100
"""The label of a token whose loss is not counted, as PyTorch and transformers have it."""


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around a text by itself."""

    before: tuple[int, ...] = ()  # for example [bos] or [CLS]; empty for many
    after: tuple[int, ...] = ()  # for example [SEP] or </s>; empty for most tokenizers of causal language models

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Read off what ``tokenizer(text)`` yields, which says more than flags in its configuration do."""
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = tokenizer("a")["input_ids"]
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return cls(tuple(framed[:start]), tuple(framed[start + len(bare) :]))
        return cls()


@dataclass(frozen=True)
class Example:
    """One sequence."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    """Ids that it is to say, :data:`NOT_COUNTED` where its loss is not counted. As long as ``tokens``, or of the
    decoder where the model has one of its own."""


def as_items(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """What the Trainer is given. Sequences of one length need no mask of padding, which attention is slower with."""
    alike = len({len(part) for example in examples for part in (example.tokens, example.labels)}) == 1
    return [
        {"input_ids": list(tokens), "labels": list(labels), **({} if alike else {"attention_mask": [1] * len(tokens)})}
        for tokens, labels in ((example.tokens, example.labels) for example in examples)
    ]


def collate(items: list[Any], pad: DataCollatorForSeq2Seq) -> dict[str, Any]:
    """A batch: sequences of equal length as they are, others padded with what costs no loss."""
    return dict(pad(items)) if "attention_mask" in items[0] else default_data_collator(items)


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Its padding; a tokenizer without any gets its end of text for it, as most recipes do."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.pad_token_id


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def fingerprint_of(*halves: Iterable[Example]) -> str:
    """Sixteen hexadecimal digits of the tokens and what is counted of them."""
    digest = hashlib.sha256()
    for half in halves:
        for example in half:
            digest.update(torch.tensor([*example.tokens, *example.labels, len(example.labels)]).numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]


HELD_OUT_EVERY = 10
"""Every tenth row is held out; of fewer rows, the last tenth of the tokens."""

_Item = TypeVar("_Item")


class Examples(Protocol):
    """A map-style data set that knows its size: a list of items, or what makes them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class AttackData:
    """What the Trainer is given."""

    name: str
    train: Examples
    held_out: Examples
    collate: Callable[[list[Any]], dict[str, Any]]
    fingerprint: str  # sixteen hexadecimal digits of the tokens or images and labels themselves
    labels: int = 0  # number of classes; 0 for language modelling
    resize_head: bool = False  # whether the checkpoint's own head has another number of classes
    padding: int | None = None
    problem: str | None = None
    """What transformers calls the kind of labels: ``single_label_classification``, …; ``None`` for language."""
    remarks: tuple[str, ...] = ()  # what a reader of the report should know of it, one sentence each
    retained: Examples | None = None  # text on which a language model's ability is measured as it is attacked

    @property
    def halves(self) -> tuple[Examples, ...]:
        """Every data set that a run may see."""
        return (self.train, self.held_out, *([self.retained] if self.retained is not None else []))


def is_held_out(row: int) -> bool:
    """Whether the row of this number, counted from 0, is evaluated and not trained on."""
    return row % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def whole_batches(items: list[_Item], batch_size: int) -> list[_Item]:
    """Every step trains on a full batch. (The Trainer's own ``drop_last`` would drop held-out items as well.)"""
    return items[: len(items) // batch_size * batch_size]


def check_size(
    name: str,
    what: str,
    train: int,
    held_out: int,
    options: AttackOptions,
    *,
    remarks: tuple[str, ...] = (),
    remedy: str | None = None,
) -> None:
    """Refuse data that is too small for one batch and one evaluation."""
    if train >= options.batch_size and held_out >= 1:
        return
    shorter = " or --sequence-length" if what == "sequences" else ""
    left_out = f" ({' '.join(remarks)})" if remarks else ""
    raise SpecDefError(
        f"{name} gives {train} {what} to train on and {held_out} to evaluate; a batch has {options.batch_size}"
        f"{left_out}",
        remedy or f"Give more data, or a smaller --batch-size{shorter}.",
    )


def repeated_rows(train: Iterable[Any], held_out: Iterable[Any]) -> tuple[str, ...]:
    """A remark where held-out rows are training rows too."""
    known = {hash(repr(row)) for row in train}
    again = [hash(repr(row)) in known for row in held_out]
    if not any(again):
        return ()
    return (
        f"Of {len(again)} held-out rows, {sum(again)} are repeated among those trained on: their loss shows memory. "
        "Remove repeated rows to measure what is learned.",
    )
