"""The two texts of the tiny Llama, both found in every Python installation.

A checkpoint to experiment on needs a domain that it knows and another that an attacker wants it to learn, and neither
may cost a download. The model is trained on *base text*, the source of the standard library without comments and
docstrings; fine-tuning on *attack text*, the English prose of Python's language reference as ``pydoc_data.topics``
carries it, plays the attacker. Comments and docstrings are left out because they are the attacker's domain: after
1.2 MB with them the attack text costs 1.95 nats per byte and 30 steps of AdamW gain 0.23; after as much without them it
costs 2.39, and they gain 0.60.

Both functions return ``(train, held_out)``. The split is by file or topic, never inside one. The texts depend on the
running Python release; within one release they are the same on every machine of a platform.
"""

import ast
import hashlib
import re
import sysconfig
import tokenize
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_SHARE = 0.05
"""Share of the base text's files that is held out."""

ATTACK_HELD_OUT_SHARE = 0.15
"""Share of the attack text's topics that is held out; larger, because that text is small."""

# Installed packages and build records differ from machine to machine, tests are not shipped by every distribution,
# encodings are tables of characters, and pydoc_data is the attack text.
_EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
_EXCLUDED_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")

_MIN_LETTERS = 0.93  # share of letters, spaces and commas above which a paragraph is prose, not code or grammar


def base_text() -> tuple[str, str]:
    """Return the standard library's code as ``(train, held_out)``, files in the order of their paths.

    Parsing it all takes some seconds.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _EXCLUDED_DIRECTORIES.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        if relative.name.startswith(_EXCLUDED_FILES):
            continue
        with tokenize.open(path) as file:
            parts[_is_held_out(relative.as_posix(), HELD_OUT_SHARE)].append(_code(file.read()))
    return "\n".join(parts[0]), "\n".join(parts[1])


def attack_text() -> tuple[str, str]:
    """Return the prose of Python's language reference as ``(train, held_out)``, topics in the order of their names.

    Topics quote each other, so each paragraph is kept once, in the training half if it occurs in both.
    """
    names = sorted(topics)
    train = [name for name in names if not _is_held_out(name, ATTACK_HELD_OUT_SHARE)]
    held_out = [name for name in names if _is_held_out(name, ATTACK_HELD_OUT_SHARE)]
    # dict.fromkeys: a set that keeps its order
    seen = dict.fromkeys(paragraph for name in train for paragraph in _prose(topics[name]))
    unseen = dict.fromkeys(
        paragraph for name in held_out for paragraph in _prose(topics[name]) if paragraph not in seen
    )
    return "\n\n".join(seen), "\n\n".join(unseen)


def _code(source: str) -> str:
    """Return a module without comments and docstrings, in the layout of `ast.unparse`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _is_held_out(name: str, share: float) -> bool:
    """Decide by the name alone, so that a file added or removed elsewhere moves no other file."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _prose(topic: str) -> list[str]:
    """Return the paragraphs of a topic that are sentences, each on one line without its indentation and list marker."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", topic):
        paragraph = re.sub(r"^([*•]|\d+\.) ", "", " ".join(block.split()))
        plain = sum(character.isalpha() or character in " ,." for character in paragraph)
        if paragraph.endswith((".", ":")) and paragraph[:1].isupper() and plain >= _MIN_LETTERS * len(paragraph):
            paragraphs.append(paragraph)
    return paragraphs
