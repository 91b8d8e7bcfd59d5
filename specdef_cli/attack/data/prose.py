"""English prose that every Python installation has, for attacks without a data set of the user's."""

from __future__ import annotations

import re

BUILTIN_NAME = "pydoc_data.topics (English prose of Python's language reference)"


def builtin_documents() -> list[str]:
    """The prose of Python's language reference, one topic a document, paragraphs that topics share kept once."""
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
