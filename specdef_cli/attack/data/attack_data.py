"""The two halves of an attack's data, and the rules by which rows are divided between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError

HELD_OUT_EVERY = 10
"""Every tenth row is held out; of fewer rows, the last tenth of the tokens."""

_Item = TypeVar("_Item")


class Examples(Protocol):
    """A map-style data set that knows its size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class AttackData:
    """What the Trainer is given.

    Attributes:
        name: What the data is called in the report.
        train, held_out: Map-style data sets.
        collate: Makes a batch of their items.
        fingerprint: Sixteen hexadecimal digits of the tokens or images and labels themselves.
        labels: Number of classes; 0 for language modelling.
        resize_head: Whether the checkpoint's own head has another number of classes.
        padding: The id that fills short sequences up.
        problem: What transformers calls the kind of labels: ``single_label_classification``, …; ``None`` for language.
        remarks: What a reader of the report should know of it, one sentence each.
        retained: Text on which a language model's ability is measured as it is attacked.
    """

    name: str
    train: Examples
    held_out: Examples
    collate: Callable[[list[Any]], dict[str, Any]]
    fingerprint: str
    labels: int = 0
    resize_head: bool = False
    padding: int | None = None
    problem: str | None = None
    remarks: tuple[str, ...] = ()
    retained: Examples | None = None

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
