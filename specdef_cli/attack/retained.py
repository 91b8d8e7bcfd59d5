"""Text that the attacker does not want the model to forget: an attack that wrecks the model has not won.

By default the source of Python's standard library, which every Python installation has and most language models know.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.data import Examples, load_data
from specdef_cli.attack.data.encoders import CausalEncoder
from specdef_cli.attack.data.forms import Text
from specdef_cli.attack.data.tokens import stacked
from specdef_cli.attack.options import NO_RETAINED, AttackOptions

BUILTIN_NAME = "the source of Python's standard library"

SEQUENCES_OF_A_FILE = 2
"""So that the text is of many files, however few sequences are evaluated."""


def retained_sequences(options: AttackOptions, tokenizer: PreTrainedTokenizerBase) -> Examples | None:
    """Sequences on which a language model's ability is measured as it is attacked; ``None`` where it is not wanted.

    A quarter as many as held-out ones: they cost time at every evaluation, and the limit of utility is a coarse one.
    """
    count = max(1, options.eval_sequences // 4)
    if options.retained == NO_RETAINED:
        return None
    if options.retained is not None:
        named = replace(
            options, dataset=options.retained, dataset_config=None, dataset_split=None, eval_sequences=count, steps=1
        )
        return load_data(named, "causal-lm", tokenizer).held_out
    sequences = []
    for text in standard_library():
        of_this_file = CausalEncoder(tokenizer, options.sequence_length)
        of_this_file.add(Text(text))
        sequences += of_this_file.examples[:SEQUENCES_OF_A_FILE]
        if len(sequences) >= count:
            break
    return stacked(sequences[:count]) if sequences else None


def standard_library() -> Iterator[str]:
    """The files of Python's standard library, one after the other."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")
