"""Conversations as tokens, by the tokenizer's chat template, with the loss on the assistant's words alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.data.forms import Conversation, says, spoken
from specdef_cli.attack.data.tokens import NOT_COUNTED, Example, Frame, shared_length
from specdef_cli.errors import first_line

REFUSED = "that the tokenizer's chat template refuses"

PLAIN_TEMPLATE = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['spoken'] + (eos_token or '') }}{% endgeneration %}"
    "{% else %}{{ message['spoken'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""For tokenizers of base models, which have no template of their own."""


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template."""
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
        return "without an answer of the assistant's"
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
    """Of a conversation's tokens; nothing of the first ``given`` is learned."""
    labels = [token if said else NOT_COUNTED for token, said in zip(tokens, counted, strict=True)]
    return Example(tuple(tokens), (*[NOT_COUNTED] * given, *labels[given:]))
