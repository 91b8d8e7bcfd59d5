"""Data of a language model: rows are read, divided between the halves and encoded until both are full."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain

from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.data.attack_data import (
    HELD_OUT_EVERY,
    AttackData,
    check_size,
    is_held_out,
    repeated_rows,
    whole_batches,
)
from specdef_cli.attack.data.chat import REFUSED, has_template
from specdef_cli.attack.data.encoders import BEYOND, ENCODERS
from specdef_cli.attack.data.forms import FORMS, Document, Form, Text, form_of
from specdef_cli.attack.data.rows import rows
from specdef_cli.attack.data.tokens import Collate, Example, Ragged, Sequences, fingerprint_of, stacked
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.target import Task

BUILTIN_NAME = "pydoc_data.topics (English prose of Python's language reference)"

_WITHOUT_TEXT = "without text"


def language_data(options: AttackOptions, task: Task, tokenizer: PreTrainedTokenizerBase) -> AttackData:
    """Sequences of the named data set, or of the prose that comes with Python."""
    name = options.dataset or BUILTIN_NAME
    form, documents = _documents(options)
    wanted = options.steps * options.batch_size
    encoder = ENCODERS[task]
    train, held_out = (encoder(tokenizer, options.sequence_length) for _ in range(2))
    kept, left_out = 0, Counter[str]()
    seen: dict[bool, list[int]] = {True: [], False: []}
    for document in documents:
        evaluated = is_held_out(kept)
        half, enough = (held_out, options.eval_sequences) if evaluated else (train, wanted)
        reason = None if document is not None else _WITHOUT_TEXT
        if document is not None and len(half.examples) < enough:
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
    examples = whole_batches(examples[:wanted], options.batch_size)
    repeated = repeated_rows(seen[False], seen[True]) if seen[True] else repeated_rows(examples, others)
    remarks = (*_remarks(form, task, tokenizer, kept, left_out), *repeated)
    remedy, (reason, count) = None, (left_out.most_common(1) or [("", 0)])[0]
    if count > kept and reason == BEYOND:
        remedy = f"Give a --sequence-length above {options.sequence_length}."
    elif count > kept and reason.startswith(REFUSED):
        remedy = "Change the rows to what the template takes; why it refuses them stands in brackets."
    check_size(name, "sequences", len(examples), len(others), options, remarks=remarks, remedy=remedy)
    return AttackData(
        name=name,
        train=_data_set(examples),
        held_out=_data_set(others),
        collate=Collate(tokenizer),
        fingerprint=fingerprint_of(examples, others),
        remarks=remarks,
    )


def _documents(options: AttackOptions) -> tuple[Form, Iterator[Document | None]]:
    """The form of the data, and its rows; ``None`` stands for a row without text."""
    if options.dataset is None:
        return FORMS[-1], (Text(text) for text in builtin_documents())
    name = options.dataset
    found = rows(options)
    first = next(found)
    form = form_of(first, options.text_column, name)
    return form, (form.read(row, name) for row in chain([first], found))


def _data_set(examples: list[Example]) -> Sequences | Ragged:
    """Sequences of one length need no padding, nor a mask of it, which attention is slower with."""
    packed = len({(len(example.tokens), len(example.labels)) for example in examples}) == 1
    return stacked(examples) if packed and len(examples[0].tokens) == len(examples[0].labels) else Ragged(examples)


def _remarks(
    form: Form, task: Task, tokenizer: PreTrainedTokenizerBase, kept: int, left_out: Counter[str]
) -> tuple[str, ...]:
    """What a reader of the report should know of the data, one sentence each."""
    said = []
    if form.answers:
        how = "the loss counts answers alone"
        if task == "causal-lm" and "conversation" in form.words:
            own = "the tokenizer's chat template" if has_template(tokenizer) else "plain roles, for want of a template"
            how = f"in {own}; {how}"
        said.append(f"Data read as {form.words}" + ("." if task == "masked-lm" else f", {how}."))
    elif form.words != FORMS[-1].words:
        said.append(f"Data read as {form.words}.")
    if task == "masked-lm":
        said.append("Masked language modelling: 15 % of the tokens are predicted, the same ones in every run.")
    if task == "seq2seq-lm" and not form.answers:
        said.append("The encoder reads the first half of each piece of text, the decoder learns the second.")
    total = kept + sum(left_out.values())
    said += [f"Of {total} rows read, {count} {reason} left out." for reason, count in left_out.items()]
    return tuple(said)


def builtin_documents() -> list[str]:
    """The prose of Python's language reference, one topic a document; what topics share is kept once."""
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
