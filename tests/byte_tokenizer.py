"""A tokenizer whose tokens are bytes, for tiny models that are trained on any text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(template: str | None = None, single: str = "", **special: str) -> PreTrainedTokenizerFast:
    """256 bytes, an end, a padding token and ``special`` ones; ``single``, such as "<s> $A", frames every text."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<pad>", *special.values()])
    if single:
        frame = [(word, tokenizer.token_to_id(word)) for word in single.split() if word != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=frame)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", **special)
    made.chat_template = template
    return made
