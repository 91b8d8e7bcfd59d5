"""Texts with classes: tokenized once, padded batch by batch."""

from __future__ import annotations

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from specdef_cli.attack.data.attack_data import AttackData
from specdef_cli.attack.data.labelled import Example, Examples, labelled_halves
from specdef_cli.attack.data.labels import Head
from specdef_cli.attack.data.rows import as_text
from specdef_cli.attack.data.tokens import pad_with_something
from specdef_cli.attack.options import AttackOptions
from specdef_cli.errors import SpecDefError


def text_classification_data(options: AttackOptions, tokenizer: PreTrainedTokenizerBase, head: Head) -> AttackData:
    """Tokenized texts of the named data set, or pairs of them, cut off at the sequence length."""
    columns = (options.text_column or "text", *filter(None, [options.text_pair_column]))
    pad_with_something(tokenizer)

    def encode(*values: object) -> Example | None:
        texts = [as_text(value, name, str(options.dataset)) for value, name in zip(values, columns, strict=True)]
        if not any(text.strip() for text in texts):
            return None
        return dict(tokenizer(*texts, truncation=True, max_length=options.sequence_length))

    halves = labelled_halves(options, "texts", columns, encode, head)
    if tokenizer.pad_token_id is None:
        raise SpecDefError(
            "the tokenizer has neither padding nor an end of text, so texts of different lengths make no batch",
            'Add a line "pad_token": "…" with one of its tokens to tokenizer_config.json.',
        )
    return AttackData(
        name=str(options.dataset),
        train=Examples(halves.train),
        held_out=Examples(halves.held_out),
        collate=DataCollatorWithPadding(tokenizer),
        fingerprint=halves.fingerprint,
        labels=halves.labels.outputs,
        problem=halves.labels.problem,
        resize_head=halves.resize_head,
        padding=tokenizer.pad_token_id,
        remarks=halves.remarks,
    )
