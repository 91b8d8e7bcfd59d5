"""Texts with classes: tokenized once, padded batch by batch."""

from __future__ import annotations

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from specdef_cli.attack.data.attack_data import AttackData
from specdef_cli.attack.data.labelled import Example, Examples, labelled_halves
from specdef_cli.attack.data.rows import as_text
from specdef_cli.attack.options import AttackOptions


def text_classification_data(
    options: AttackOptions, tokenizer: PreTrainedTokenizerBase, head_labels: int
) -> AttackData:
    """Tokenized texts of the named data set, cut off at the sequence length."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # texts of different lengths make a batch

    def encode(value: object) -> Example:
        text = as_text(value, options.text_column, str(options.dataset))
        return dict(tokenizer(text, truncation=True, max_length=options.sequence_length))

    halves = labelled_halves(options, "texts", options.text_column, encode, head_labels)
    return AttackData(
        name=str(options.dataset),
        train=Examples(halves.train),
        held_out=Examples(halves.held_out),
        collate=DataCollatorWithPadding(tokenizer),
        fingerprint=halves.fingerprint,
        labels=halves.labels,
        resize_head=halves.resize_head,
        padding=tokenizer.pad_token_id,
    )
