"""Conversations as tokens, by the tokenizer's chat template, with the loss on the assistant's words alone."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.data.forms import Conversation
from specdef_cli.attack.data.tokens import NOT_COUNTED, Example, Frame, shared_length

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + (eos_token or '') }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""For tokenizers of base models, which have no template of their own."""


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def conversation_example(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> Example | str:
    """The tokens of a conversation.

    Where the template marks what the assistant says (``{% generation %}``), that is what is counted; elsewhere it is
    what each of the assistant's messages adds to the tokens before it.

    Returns:
        An example, or the reason, in a few words, why there is none.
    """
    messages: list[Any] = list(conversation.messages)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "without an answer of the assistant's"
    if not has_template(tokenizer):
        encoded = _encode(tokenizer, messages, chat_template=PLAIN_TEMPLATE, return_assistant_tokens_mask=True)
        tokens, counted = [*frame.before, *encoded["input_ids"]], [0] * len(frame.before) + encoded["assistant_masks"]
        return _example(tokens, counted)
    try:
        if "generation" in str(tokenizer.chat_template).replace("add_generation_prompt", ""):
            encoded = _encode(tokenizer, messages, return_assistant_tokens_mask=True)
            if any(encoded["assistant_masks"]):
                return _example(encoded["input_ids"], encoded["assistant_masks"])
        return _by_difference(tokenizer, messages)
    except TemplateError:
        return "that the tokenizer's chat template refuses"


def _encode(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **arguments: Any) -> Any:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)


def _by_difference(tokenizer: PreTrainedTokenizerBase, messages: list[Any]) -> Example:
    """Count what each of the assistant's messages adds to the tokens before it, its prompt included there."""
    tokens = _encode(tokenizer, messages)["input_ids"]
    counted = [0] * len(tokens)
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        through = _encode(tokenizer, messages[: number + 1])["input_ids"]
        if tokens[: len(through)] != through and number != last:
            continue  # some templates write earlier answers otherwise, e.g. without what was thought
        before = _encode(tokenizer, messages[:number], add_generation_prompt=True)["input_ids"] if number else []
        start = shared_length(before, tokens)
        end = len(through) if tokens[: len(through)] == through else len(tokens)
        counted[start:end] = [1] * (end - start)
    return _example(tokens, counted)


def _example(tokens: list[int], counted: list[int]) -> Example:
    labels = (token if said else NOT_COUNTED for token, said in zip(tokens, counted, strict=True))
    return Example(tuple(tokens), tuple(labels))
