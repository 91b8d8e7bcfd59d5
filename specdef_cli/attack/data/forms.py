"""What a row of a language data set is (a text, a prompt with its completion, a conversation), and its tokens.

The columns are those that TRL reads (``messages``, ``prompt`` and ``completion``, ``text``), and two that data sets
older than these conventions have: ``conversations`` with ``from`` and ``value`` (ShareGPT), and ``instruction``,
``input`` and ``output`` (Alpaca).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.data.rows import as_text, column_of
from specdef_cli.attack.target import Task
from specdef_cli.errors import SpecDefError, first_line

NOT_COUNTED = -100
"""The label of a token whose loss is not counted, as PyTorch and transformers have it."""


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around a text by itself."""

    before: tuple[int, ...] = ()  # for example [bos] or [CLS]; empty for many
    after: tuple[int, ...] = ()  # for example [SEP] or </s>; empty for most tokenizers of causal language models

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Read it off ``tokenizer(text)``, which says more than flags in its configuration."""
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = tokenizer("a")["input_ids"]
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return cls(tuple(framed[:start]), tuple(framed[start + len(bare) :]))
        return cls()


@dataclass(frozen=True)
class Example:
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    """Ids that it is to say, :data:`NOT_COUNTED` where its loss is not counted. As long as ``tokens``, or of the
    decoder where the model has one of its own."""


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences have in common from the start."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


Message: TypeAlias = dict[str, Any]
"""``role`` and ``content``, and whatever else the row has (tool calls, reasoning): chat templates get it whole."""


@dataclass(frozen=True)
class Text:
    """Running text, all of which is learned."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, which alone is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages in turn; what the assistant says is learned."""

    messages: tuple[Message, ...]
    given: int = 0  # so many of them are a prompt, of which nothing is learned
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template takes of the row: ``tools``, and its ``chat_template_kwargs``."""
    plain: Completion | None = None  # how models without a chat template read it, where that is not by roles


Document: TypeAlias = Text | Completion | Conversation


@dataclass(frozen=True)
class Form:
    """How rows are read."""

    columns: tuple[str, ...]
    words: str  # what a report calls it
    read: Callable[[Mapping[str, Any], str], Document | str]
    """From a row and the data set's name to a document, or why there is none, in a few words."""
    answers: bool = True  # whether rows have answers, which alone are learned; running text is learned whole

    def remarks(self, task: Task, has_template: bool) -> list[str]:
        """Sentences for the report on how the data was read."""
        said = []
        if self.answers:
            how = "the loss counts answers alone"
            if task == "causal-lm" and "conversation" in self.words:
                own = "the tokenizer's chat template" if has_template else "plain roles, for want of a template"
                how = f"in {own}; {how}"
            said.append(f"Data read as {self.words}" + ("." if task == "masked-lm" else f", {how}."))
        elif self.words != FORMS[-1].words:
            said.append(f"Data read as {self.words}.")
        if task == "masked-lm":
            said.append("Masked language modelling: 15 % of the tokens are predicted, the same ones in every run.")
        if task == "seq2seq-lm" and not self.answers:
            said.append("The encoder reads the first half of each piece of text, the decoder learns the second.")
        return said


WITHOUT_TEXT = "without text"
UNREAD = ", which is not read,"
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that a text may be about; TRL too refuses rows with images for a model of text."""
_TEXTS = ("text", "input_text", "output_text")


def unread(row: Mapping[str, Any], form: Form, text_column: str | None) -> str | None:
    """Say why a row with more than text is left out: an answer about an image teaches nothing without it."""
    found = [column for column in _MEDIA if row.get(column)] if text_column is None else []
    entries = (entry for column in form.columns if isinstance(row.get(column), list) for entry in row[column])
    contents = (entry.get("content", entry.get("value")) for entry in entries if isinstance(entry, Mapping))
    parts = (part for content in contents if isinstance(content, list) for part in content)
    for part in parts:
        if isinstance(part, Mapping):
            held = next((key for key, value in part.items() if value is not None), "text")
            kind = str(part.get("type") or held)
            found += [] if kind in _TEXTS else [kind]
    return f"with {found[0]!r} beside the text{UNREAD}" if found else None


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names that ShareGPT's data sets use for the roles of chat templates."""


def form_of(row: Mapping[str, Any], text_column: str | None, dataset: str) -> Form:
    """Find the form of a data set by the columns of a row."""
    if text_column is None:
        for form in FORMS:
            if all(column in row for column in form.columns):
                return form
        raise SpecDefError(
            f"{dataset} has no column 'text', nor others that are known to hold text",
            f"It has {', '.join(map(str, row))}; name one with --text-column, or rename columns to one of "
            f"{'; '.join(' + '.join(form.columns) for form in FORMS)}.",
        )
    if isinstance(row.get(text_column), list):
        return Form((text_column,), f"conversations in {text_column}", partial(_conversation, text_column))
    return Form((text_column,), f"text in {text_column}", partial(_text, text_column), answers=False)


def _text(column: str, row: Mapping[str, Any], dataset: str) -> Text | str:
    text = as_text(column_of(row, column, dataset), column, dataset)
    return Text(text) if text.strip() else WITHOUT_TEXT


def _conversation(column: str, row: Mapping[str, Any], dataset: str) -> Conversation | str:
    messages = _messages(column_of(row, column, dataset), column, dataset)
    return Conversation(messages, 0, _template_arguments(row, dataset)) if any(map(says, messages)) else WITHOUT_TEXT


_OURS = {"tokenize", "return_dict", "add_generation_prompt", "chat_template", "return_assistant_tokens_mask"}
"""Arguments of ``apply_chat_template`` that are set here."""


def says(message: Message) -> bool:
    return any(value.strip() if isinstance(value, str) else value for key, value in message.items() if key != "role")


def spoken(message: Message) -> str:
    """A message as plain text, for models without a chat template."""
    more = [json.dumps(value) for key, value in message.items() if key not in ("role", "content", "reasoning_content")]
    return "\n".join(filter(None, (message.get("reasoning_content"), message["content"], *more)))


def _template_arguments(row: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The arguments besides messages that TRL passes to a chat template."""
    tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError as error:
        raise SpecDefError(
            f"column 'tools' of {dataset} is not JSON: {error}", "Write a list of tools there, or drop the column."
        ) from error
    if not isinstance(more, Mapping) or _OURS & more.keys():
        raise SpecDefError(
            f"column 'chat_template_kwargs' of {dataset} holds {more!r:.100}, not values for the chat template",
            "Write it like {'enable_thinking': false}, or drop the column.",
        )
    return {**({"tools": _without_nothing(tools)} if tools else {}), **more}


def _without_nothing(value: Any) -> Any:
    """Without the keys that hold ``None``: Arrow and Parquet write those of one row into all others."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(inner) for key, inner in value.items() if inner is not None}
    return [_without_nothing(inner) for inner in value] if isinstance(value, list) else value


def _prompt_and_completion(row: Mapping[str, Any], dataset: str) -> Document | str:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):  # TRL's conversational kind
        given, said = _messages(prompt, "prompt", dataset), _messages(completion, "completion", dataset)
        whole = Conversation(given + said, len(given), _template_arguments(row, dataset))
        return whole if any(map(says, said)) else WITHOUT_TEXT
    prompt, completion = as_text(prompt, "prompt", dataset), as_text(completion, "completion", dataset)
    return Completion(prompt, completion) if completion.strip() else WITHOUT_TEXT


def _instruction(given: str, answer: str, row: Mapping[str, Any], dataset: str) -> Conversation | str:
    """A user's message and an assistant's; by itself, as Stanford Alpaca's prompt has it."""
    asked, beside, output = (as_text(row.get(name), name, dataset) for name in ("instruction", given, answer))
    if not output.strip():
        return WITHOUT_TEXT
    told = f"{asked}\n\n{beside}" if beside else asked
    beside = f"### Input:\n{beside}\n\n" if beside else ""
    alpaca = Completion(f"### Instruction:\n{asked}\n\n{beside}### Response:\n", output)
    return Conversation(({"role": "user", "content": told}, {"role": "assistant", "content": output}), plain=alpaca)


def _messages(value: Any, column: str, dataset: str) -> tuple[Message, ...]:
    """Messages with ``role`` and ``content``, whatever those keys are called, and all other keys as they are."""
    messages = []
    for entry in value or ():
        role = entry.get("role", entry.get("from")) if isinstance(entry, Mapping) else None
        if not isinstance(role, str):
            raise SpecDefError(
                f"column {column!r} of {dataset} holds no messages with a role and a content",
                "Write each as {'role': 'user', 'content': '…'}, or name a column of text with --text-column.",
            )
        content = entry.get("content", entry.get("value"))
        if isinstance(content, list):  # parts, as models that also read images have them
            texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            content = "".join(text for text in texts if isinstance(text, str))
        more = {key: value for key, value in entry.items() if key not in ("from", "value")}
        named = {"role": _ROLES.get(role, role), "content": as_text(content, column, dataset)}
        messages.append({**_without_nothing(more), **named})
    return tuple(messages)


FORMS = (
    Form(("messages",), "conversations", partial(_conversation, "messages")),
    Form(("conversations",), "conversations", partial(_conversation, "conversations")),
    Form(("prompt", "completion"), "prompts and completions", _prompt_and_completion),
    Form(("instruction", "output"), "instructions and outputs", partial(_instruction, "input", "output")),
    Form(("instruction", "response"), "instructions and responses", partial(_instruction, "context", "response")),
    Form(("text",), "text", partial(_text, "text"), answers=False),
)
"""In the order of preference: where a data set has a conversation and the same as running text, the former is what a
chat model is trained on."""


REFUSED = "that the tokenizer's chat template refuses"
WITHOUT_ANSWER = "without an answer of the assistant's"

PLAIN_TEMPLATE = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['spoken'] + (eos_token or '') }}{% endgeneration %}"
    "{% else %}{{ message['spoken'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""For tokenizers of base models, which have no template of their own."""


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def conversation_example(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> Example | str:
    """The tokens of a conversation.

    Where the template marks what the assistant says (``{% generation %}``), that is what is counted; elsewhere it is
    what each of the assistant's messages adds to the tokens before it.
    """
    messages: list[Any] = list(conversation.messages)
    said = [n for n, message in enumerate(messages) if message["role"] == "assistant" and says(message)]
    said = [number for number in said if number >= conversation.given]
    if not said:
        return WITHOUT_ANSWER
    encode = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=True, **conversation.arguments)
    if not has_template(tokenizer):
        spelled = [{**message, "spoken": spoken(message)} for message in messages]
        encoded = encode(spelled, chat_template=PLAIN_TEMPLATE, return_assistant_tokens_mask=True)
        tokens, counted = [*frame.before, *encoded["input_ids"]], [0] * len(frame.before) + encoded["assistant_masks"]
        given = spelled[: conversation.given]
        before = encode(given, chat_template=PLAIN_TEMPLATE)["input_ids"] if given else []
        return _example(tokens, counted, len(frame.before) + shared_length(before, tokens[len(frame.before) :]))
    try:
        given = messages[: conversation.given]
        prompt = encode(given, add_generation_prompt=True)["input_ids"] if given else []
        if "generation" in str(tokenizer.chat_template).replace("add_generation_prompt", ""):
            encoded = encode(messages, return_assistant_tokens_mask=True)
            if any(encoded["assistant_masks"]):
                tokens = encoded["input_ids"]
                return _example(tokens, encoded["assistant_masks"], shared_length(prompt, tokens))
        return _by_difference(encode, messages, said)
    except TemplateError as error:
        return f"{REFUSED} ({first_line(error)})"


def _by_difference(encode: Callable[..., Any], messages: list[Any], said: list[int]) -> Example:
    """Count what each of the assistant's messages adds to the tokens before it, its prompt included there."""
    tokens = encode(messages)["input_ids"]
    counted = [0] * len(tokens)
    for number in said:
        through = encode(messages[: number + 1])["input_ids"]
        if tokens[: len(through)] != through and number != said[-1]:
            continue  # some templates write earlier answers otherwise, e.g. without what was thought
        before = encode(messages[:number], add_generation_prompt=True)["input_ids"] if number else []
        start = shared_length(before, tokens)
        end = len(through) if tokens[: len(through)] == through else len(tokens)
        counted[start:end] = [1] * (end - start)
    return _example(tokens, counted)


def _example(tokens: list[int], counted: list[int], given: int = 0) -> Example:
    """Make an example of a conversation's tokens; the first ``given`` are not learned."""
    labels = [token if said else NOT_COUNTED for token, said in zip(tokens, counted, strict=True)]
    return Example(tuple(tokens), (*[NOT_COUNTED] * given, *labels[given:]))
