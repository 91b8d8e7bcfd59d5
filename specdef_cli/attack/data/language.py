"""Data of a language model: rows are read, divided between the halves and encoded until both are full."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from specdef_cli.attack.data.forms import (
    FORMS,
    NOT_COUNTED,
    REFUSED,
    UNREAD,
    WITHOUT_ANSWER,
    Completion,
    Conversation,
    Document,
    Example,
    Form,
    Frame,
    Text,
    conversation_example,
    form_of,
    has_template,
    shared_length,
    spoken,
    unread,
)
from specdef_cli.attack.data.rows import padding_of, rows
from specdef_cli.attack.data.split import AttackData, Encoder, Examples, divide
from specdef_cli.attack.options import NO_RETAINED, AttackOptions
from specdef_cli.attack.target import Task
from specdef_cli.errors import SpecDefError

BUILTIN_NAME = "pydoc_data.topics (English prose of Python's language reference)"

BEYOND = "whose answer begins beyond --sequence-length"

_MASKING_SEED = 0


def as_items(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Convert examples for the Trainer. Sequences of one length get no padding mask, which slows attention."""
    alike = len({len(part) for example in examples for part in (example.tokens, example.labels)}) == 1
    return [
        {"input_ids": list(tokens), "labels": list(labels), **({} if alike else {"attention_mask": [1] * len(tokens)})}
        for tokens, labels in ((example.tokens, example.labels) for example in examples)
    ]


def collate(items: list[Any], pad: DataCollatorForSeq2Seq) -> dict[str, Any]:
    """Make a batch; sequences of unequal length are padded with what costs no loss."""
    return dict(pad(items)) if "attention_mask" in items[0] else default_data_collator(items)


def fingerprint_of(*halves: Iterable[Example]) -> str:
    """Sixteen hexadecimal digits of the tokens and what is counted of them."""
    digest = hashlib.sha256()
    for half in halves:
        for example in half:
            digest.update(torch.tensor([*example.tokens, *example.labels, len(example.labels)]).numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:16]


class CausalEncoder(Encoder):
    """Encodes for models that predict the next token: texts are joined and cut, answers keep their own sequence."""

    closing: tuple[int, ...] = ()  # ends every sequence of joined texts

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        super().__init__()
        self.tokenizer, self.length, self.frame = tokenizer, length, Frame.of(tokenizer)
        end = (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()
        self.end = self.frame.after or end
        self._joined: list[tuple[int, int]] = []  # tokens with their labels

    def add(self, document: Document) -> str | None:
        if isinstance(document, Text):
            self._join(document.text)
            return None
        if isinstance(document, Conversation) and document.plain and not has_template(self.tokenizer):
            document = document.plain
        if isinstance(document, Completion):
            example: Example | str = self._completion(document)
        else:
            example = conversation_example(document, self.tokenizer, self.frame)
        if isinstance(example, str):
            return example
        labels = example.labels[: self.length]
        if all(label == NOT_COUNTED for label in labels[1:]):  # the first token is never said
            return BEYOND
        self.examples.append(Example(example.tokens[: self.length], labels))
        return None

    def _completion(self, document: Completion) -> Example:
        """The two are tokenized together, as the model will read them; a token that spans both is the answer's."""
        tokens = self._ids(document.prompt + document.completion)
        kept = shared_length(self._ids(document.prompt), tokens)
        before, answer = [*self.frame.before, *tokens[:kept]], [*tokens[kept:], *self.end]
        return Example((*before, *answer), (*[NOT_COUNTED] * len(before), *answer))

    def _join(self, text: str) -> None:
        """Join one more text to those before, and cut off what fills a sequence; each begins as the tokenizer says."""
        before, closing = ([(token, NOT_COUNTED) for token in part] for part in (self.frame.before, self.closing))
        if self._joined and not closing:
            self._joined += before
        self._joined += [(token, token) for token in (*self._ids(text), *self.end)]
        room = max(1, self.length - len(before) - len(closing))
        while len(self._joined) >= room:
            tokens, labels = zip(*before, *self._joined[:room], *closing, strict=True)
            self.examples.append(Example(tokens, labels))
            del self._joined[:room]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class MaskedEncoder(CausalEncoder):
    """Encodes for models that predict masked tokens. These are drawn once, so every run learns the same."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        if tokenizer.mask_token_id is None:
            raise SpecDefError(
                "the tokenizer has no mask token, and masked language modelling masks some of the text",
                "Add a mask_token to tokenizer_config.json.",
            )
        super().__init__(tokenizer, length)
        self.end = self.closing = self.frame.after

    def add(self, document: Document) -> str | None:
        match document:
            case Text(text):
                self._join(text)
            case Completion(prompt, completion) | Conversation(plain=Completion(prompt, completion)):
                self._join(prompt + completion)
            case Conversation(messages):
                self._join("\n".join(map(spoken, messages)))
        return None

    def finished(self) -> list[Example]:
        """Mask the examples; those in which chance masks nothing are left out."""
        if not self.examples:
            return []
        masking = DataCollatorForLanguageModeling(self.tokenizer, seed=_MASKING_SEED)
        masked = masking([{"input_ids": list(example.tokens)} for example in self.examples])
        pairs = zip(masked["input_ids"].tolist(), masked["labels"].tolist(), strict=True)
        return [Example(tuple(tokens), tuple(labels)) for tokens, labels in pairs if {*labels} != {NOT_COUNTED}]


class Seq2SeqEncoder(CausalEncoder):
    """Encodes for an encoder and a decoder: a prompt and its answer, or the two halves of a text."""

    def add(self, document: Document) -> str | None:
        room = self.length - len(self.frame.before) - len(self.frame.after)
        if isinstance(document, Text):
            tokens = self._ids(document.text)
            if len(tokens) < 2:
                return "of a single token"
            pieces = [tokens[start : start + 2 * room] for start in range(0, len(tokens), 2 * room)]
            for piece in pieces:
                if len(piece) == 2 * room or len(pieces) == 1:
                    self._append(piece[: len(piece) // 2], piece[len(piece) // 2 :])
            return None
        if isinstance(document, Conversation) and document.plain:
            document = document.plain
        if isinstance(document, Conversation):
            said = [n for n, message in enumerate(document.messages) if message["role"] == "assistant"]
            if not said:
                return WITHOUT_ANSWER
            before = "\n".join(map(spoken, document.messages[: said[-1]]))
            document = Completion(before, spoken(document.messages[said[-1]]))
        self._append(self._ids(document.prompt)[:room], self._ids(document.completion)[:room])
        return None

    def _append(self, source: list[int], target: list[int]) -> None:
        read, said = ((*self.frame.before, *tokens, *self.frame.after) for tokens in (source, target))
        self.examples.append(Example(read, said))


ENCODERS: Mapping[Task, type[CausalEncoder]] = {
    "causal-lm": CausalEncoder,
    "masked-lm": MaskedEncoder,
    "seq2seq-lm": Seq2SeqEncoder,
}


def language_data(options: AttackOptions, task: Task, tokenizer: PreTrainedTokenizerBase) -> AttackData:
    """Sequences of the named data set, or of the prose that comes with Python."""
    name = options.dataset or BUILTIN_NAME
    form, documents = _documents(options)
    train, held_out, remarks = divide(
        options, name, "sequences", documents, partial(ENCODERS[task], tokenizer, options.sequence_length),
        remarks=form.remarks(task, has_template(tokenizer)),
        remedies={
            BEYOND: f"Give a --sequence-length above {options.sequence_length}.",
            REFUSED: "Change the rows to what the template takes; why it refuses them stands in brackets.",
            UNREAD: "Give rows of text alone; --text-column names a column that is text by itself.",
        },
    )  # fmt: skip
    if padding_of(tokenizer) is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # masked like any padding
    return AttackData(
        name=name,
        train=as_items(train),
        held_out=as_items(held_out),
        collate=partial(collate, pad=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NOT_COUNTED)),
        fingerprint=fingerprint_of(train, held_out),
        remarks=remarks,
        retained=_retained(options, tokenizer) if task == "causal-lm" else None,
    )


SEQUENCES_OF_A_FILE = 2
"""So that the text is of many files, however few sequences are evaluated."""


def _retained(options: AttackOptions, tokenizer: PreTrainedTokenizerBase) -> Examples | None:
    """Sequences on which a language model's ability is measured as it is attacked; ``None`` where it is not wanted.

    A quarter as many as held-out ones: they cost time at every evaluation, and the limit of utility is a coarse one.
    """
    count = max(1, options.eval_sequences // 4)
    if options.retained == NO_RETAINED:
        return None
    if options.retained is not None:
        named = replace(
            options, dataset=options.retained, dataset_config=None, dataset_split=None, retained=NO_RETAINED,
            eval_sequences=count, steps=1, warmup_steps=0,
        )  # fmt: skip
        return language_data(named, "causal-lm", tokenizer).held_out
    sequences: list[Example] = []
    for text in standard_library():
        of_this_file = CausalEncoder(tokenizer, options.sequence_length)
        of_this_file.add(Text(text))
        sequences += of_this_file.examples[:SEQUENCES_OF_A_FILE]
        if len(sequences) >= count:
            break
    return as_items(sequences[:count]) if sequences else None


def _documents(options: AttackOptions) -> tuple[Form, Iterator[Document | str]]:
    """Find the form of the data, and yield its rows, or the reason why one is left out."""
    if options.dataset is None:
        return FORMS[-1], (Text(text) for text in builtin_documents())
    name = options.dataset
    found = rows(options)
    first = next(found)
    form = form_of(first, options.text_column, name)
    return form, (unread(row, form, options.text_column) or form.read(row, name) for row in chain([first], found))


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


def standard_library() -> Iterator[str]:
    """The files of Python's standard library, one after the other."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")
