"""Data of a language model: rows are read, divided between the halves and encoded until both are full."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain

from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from specdef_cli.attack.data.examples import (
    HELD_OUT_EVERY,
    NOT_COUNTED,
    AttackData,
    Collate,
    Example,
    Frame,
    Packer,
    Ragged,
    Sequences,
    check_size,
    fingerprint_of,
    is_held_out,
    repeated_rows,
    shared_length,
    stacked,
    whole_batches,
)
from specdef_cli.attack.data.forms import (
    FORMS,
    REFUSED,
    Completion,
    Conversation,
    Document,
    Form,
    Instruction,
    Text,
    conversation_example,
    form_of,
    has_template,
    spoken,
)
from specdef_cli.attack.data.rows import rows
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.target import Task
from specdef_cli.errors import SpecDefError

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


BEYOND = "whose answer begins beyond --sequence-length"

_MASKING_SEED = 0


class CausalEncoder:
    """For models that say the next token. Texts are joined and cut; what has an answer is a sequence of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._frame = Frame.of(tokenizer)
        end = (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()
        self._end = self._frame.after or end
        self._packer = Packer(length, self._frame, self._end)
        self.examples = self._packer.examples

    def add(self, document: Document) -> str | None:
        """Add a document; the reason, in a few words, where nothing can be learned from it."""
        if isinstance(document, Instruction):
            document = document.conversation if has_template(self._tokenizer) else document.completion
        if isinstance(document, Text):
            self._packer.add(_ids(self._tokenizer, document.text))
            return None
        if isinstance(document, Completion):
            example: Example | str = self._completion(document)
        else:
            example = conversation_example(document, self._tokenizer, self._frame)
        if isinstance(example, str):
            return example
        labels = example.labels[: self._length]
        if all(label == NOT_COUNTED for label in labels[1:]):  # the first token is never said
            return BEYOND
        self.examples.append(Example(example.tokens[: self._length], labels))
        return None

    def _completion(self, document: Completion) -> Example:
        """The two are tokenized together, as the model will read them; a token that spans both is the answer's."""
        prompt = _ids(self._tokenizer, document.prompt)
        tokens = _ids(self._tokenizer, document.prompt + document.completion)
        kept = shared_length(prompt, tokens)
        before = [*self._frame.before, *tokens[:kept]]
        answer = [*tokens[kept:], *self._end]
        return Example((*before, *answer), (*[NOT_COUNTED] * len(before), *answer))

    def finished(self) -> list[Example]:
        """The examples as a model is trained on them."""
        return self.examples


class MaskedEncoder:
    """For models that say what was masked. Which tokens are is drawn once, so that every run learns the same."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        if tokenizer.mask_token_id is None:
            raise SpecDefError(
                "the tokenizer has no mask token, and masked language modelling masks some of the text",
                "Add a mask_token to tokenizer_config.json.",
            )
        self._tokenizer = tokenizer
        frame = Frame.of(tokenizer)
        self._packer = Packer(length, frame, end=frame.after, closing=frame.after)
        self.examples = self._packer.examples

    def add(self, document: Document) -> str | None:
        """As of a causal model."""
        self._packer.add(_ids(self._tokenizer, _as_text(document)))
        return None

    def finished(self) -> list[Example]:
        """As of a causal model, without sequences in which chance masked nothing."""
        if not self.examples:
            return []
        masking = DataCollatorForLanguageModeling(self._tokenizer, seed=_MASKING_SEED)
        masked = masking([{"input_ids": list(example.tokens)} for example in self.examples])
        pairs = zip(masked["input_ids"].tolist(), masked["labels"].tolist(), strict=True)
        return [
            Example(tuple(tokens), tuple(labels))
            for tokens, labels in pairs
            if any(label != NOT_COUNTED for label in labels)
        ]


class Seq2SeqEncoder:
    """For an encoder and a decoder: a prompt and its answer, or the first half of a text and the second."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._frame = Frame.of(tokenizer)
        self.examples: list[Example] = []

    def add(self, document: Document) -> str | None:
        """As of a causal model."""
        room = self._length - len(self._frame.before) - len(self._frame.after)
        if isinstance(document, Text):
            tokens = _ids(self._tokenizer, document.text)
            if len(tokens) < 2:
                return "of a single token"
            pieces = [tokens[start : start + 2 * room] for start in range(0, len(tokens), 2 * room)]
            for piece in pieces:
                if len(piece) == 2 * room or len(pieces) == 1:
                    self._append(piece[: len(piece) // 2], piece[len(piece) // 2 :])
            return None
        if isinstance(document, Instruction):
            document = document.completion
        if isinstance(document, Conversation):
            said = [n for n, message in enumerate(document.messages) if message["role"] == "assistant"]
            if not said:
                return "without an answer of the assistant's"
            before = "\n".join(map(spoken, document.messages[: said[-1]]))
            document = Completion(before, spoken(document.messages[said[-1]]))
        source, target = (_ids(self._tokenizer, text) for text in (document.prompt, document.completion))
        self._append(source[:room], target[:room])
        return None

    def _append(self, source: list[int], target: list[int]) -> None:
        read, said = ((*self._frame.before, *tokens, *self._frame.after) for tokens in (source, target))
        self.examples.append(Example(read, said))

    def finished(self) -> list[Example]:
        """As of a causal model."""
        return self.examples


ENCODERS: Mapping[Task, type[CausalEncoder] | type[MaskedEncoder] | type[Seq2SeqEncoder]] = {
    "causal-lm": CausalEncoder,
    "masked-lm": MaskedEncoder,
    "seq2seq-lm": Seq2SeqEncoder,
}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _as_text(document: Document) -> str:
    match document:
        case Text(text):
            return text
        case Completion(prompt, completion):
            return prompt + completion
        case Instruction():
            return _as_text(document.completion)
        case Conversation(messages):
            return "\n".join(map(spoken, messages))
