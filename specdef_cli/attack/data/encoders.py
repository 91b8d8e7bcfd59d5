"""From documents to what a language model is trained on, a class for each way of training one."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from specdef_cli.attack.data.chat import conversation_example, has_template
from specdef_cli.attack.data.forms import Completion, Conversation, Document, Instruction, Text, spoken
from specdef_cli.attack.data.tokens import NOT_COUNTED, Example, Frame, Packer, shared_length
from specdef_cli.attack.target import Task
from specdef_cli.errors import SpecDefError

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
