"""Data divided between training and evaluation, and encoded once, for the control and every attack alike.

A budget of S steps of B sequences never sees more than S·B of them, so no more are prepared, however large the data
set is. Every tenth row is held out: a row is a document, and nothing of it is in both halves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError

HELD_OUT_EVERY = 10
"""Every tenth row is held out; of fewer rows, the last tenth of the examples."""

Examples = Sequence[dict[str, Any]]
"""A list of items, or what makes them when they are asked for."""


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

    def configure(self, config: Any) -> None:
        """Give a classifier's config the data's kind and number of labels, and its padding."""
        if config.num_labels != self.labels:
            config.num_labels = self.labels
        config.problem_type = self.problem
        # Decoders find the token to classify by looking for the padding.
        if self.padding is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.padding

    @property
    def evaluated(self) -> int:
        """Sequences that every evaluation takes."""
        return len(self.held_out) + (0 if self.retained is None else len(self.retained))

    @property
    def halves(self) -> tuple[Examples, ...]:
        """Every data set that a run may see."""
        return (self.train, self.held_out, *([self.retained] if self.retained is not None else []))


class Encoder:
    """Turns documents into examples; this one keeps them as they are."""

    def __init__(self) -> None:
        self.examples: list[Any] = []

    def add(self, document: Any) -> str | None:
        """Add a document; return the reason, in a few words, if nothing can be learned from it."""
        self.examples.append(document)
        return None

    def finished(self) -> list[Any]:
        """The examples as a model is trained on them."""
        return self.examples


def divide(
    options: AttackOptions,
    name: str,
    what: str,
    documents: Iterable[Any],
    encoder: Callable[[], Encoder] = Encoder,
    *,
    remarks: Sequence[str] = (),
    remedies: Mapping[str, str] | None = None,
) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Encode as many documents as a run needs: examples to train on, those to evaluate, and remarks on the data.

    Args:
        documents: In the place of one that is left out, the reason.
        remedies: What to do where many rows are left out, by a part of the reason; the first that fits.
    """
    train, held_out = encoder(), encoder()
    wanted, kept, left_out = options.steps * options.batch_size, 0, Counter[str]()
    seen: dict[bool, list[int]] = {True: [], False: []}
    for document in documents:
        evaluated = kept % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        half, enough = (held_out, options.eval_sequences) if evaluated else (train, wanted)
        reason = document if isinstance(document, str) else None
        if reason is None and len(half.examples) < enough:
            reason = half.add(document)
            if reason is None:
                seen[evaluated].append(hash(repr(document)))
        elif len(train.examples) >= wanted and len(held_out.examples) >= options.eval_sequences:
            break
        if reason is None:
            kept += 1
        else:
            left_out[reason] += 1
    examples, others = train.finished(), held_out.finished()[: options.eval_sequences]
    if not others and examples:
        cut = len(examples) - max(1, min(len(examples) // HELD_OUT_EVERY, options.eval_sequences))
        examples, others = examples[:cut], examples[cut:]
    # Full batches alone. (The Trainer's own ``drop_last`` would drop held-out items as well.)
    examples = examples[: min(wanted, len(examples)) // options.batch_size * options.batch_size]
    total = kept + sum(left_out.values())
    counts = [f"Of {total} rows read, {count} {reason} left out." for reason, count in left_out.items()]
    repeated = _repeated(*(seen[False], seen[True]) if seen[True] else (map(repr, examples), map(repr, others)))
    said = (*remarks, *counts, *repeated)
    if not (examples and others):
        shorter = " or --sequence-length" if what == "sequences" else ""
        often = [reason for reason, count in left_out.items() if count > kept]
        found = (hint for part, hint in (remedies or {}).items() if any(part in reason for reason in often))
        raise SpecDefError(
            f"{name} gives {len(train.examples)} {what} to train on and {len(others)} to evaluate; a batch has "
            f"{options.batch_size}" + (f" ({' '.join(said)})" if said else ""),
            next(found, f"Give more data, or a smaller --batch-size{shorter}."),
        )
    return examples, others, said


def _repeated(train: Iterable[Any], held_out: Iterable[Any]) -> tuple[str, ...]:
    """A remark where held-out rows are training rows too."""
    known = set(train)
    again = [row in known for row in held_out]
    if not any(again):
        return ()
    return (
        f"Of {len(again)} held-out rows, {sum(again)} are repeated among those trained on: their loss shows memory. "
        "Remove repeated rows to measure what is learned.",
    )
