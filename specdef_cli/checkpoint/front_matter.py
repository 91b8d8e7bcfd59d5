"""A model card as text: front matter in which single keys are set, and everything else stays as it was written."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?)(?m:^)---[ \t]*(?:\n|\Z)", re.DOTALL)
_BLOCKS = re.compile(r"^(?=[^\s#\-\]}])", re.MULTILINE)
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_card(path: Path) -> str:
    """A card's text, whatever its encoding and line ends; empty where there is none."""
    data = path.read_bytes() if path.is_file() else b""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")  # what Windows writes without a mark
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_card(card: str) -> tuple[str, str]:
    """The front matter, as valid YAML of a mapping, and the body. Lines that are no YAML become comments."""
    found = _FRONT.match(card)
    if found is None:
        return "", card
    front = found[1].strip("\n")
    if front.startswith("{") and isinstance(data := _loaded(front), dict):
        front = yaml.safe_dump(data, allow_unicode=True, sort_keys=False).strip("\n")
    if _mapping(front) is None:
        blocks = [block for block in _BLOCKS.split(front) if block]
        if not any(_mapping(block) for block in blocks):  # text between two rules
            return ("", card) if front.strip() else ("", card[found.end() :])
        front = "\n".join(
            block.rstrip("\n") if _mapping(block) is not None else re.sub(r"^", "# ", block.rstrip("\n"), flags=re.M)
            for block in blocks
        )
    return front, card[found.end() :]


def metadata(front: str) -> dict[str, Any]:
    """What front matter says; every scalar is text, so that ``no`` stays Norwegian."""
    return dict(_loaded(front) or {})


def with_keys(front: str, changes: Mapping[str, Any]) -> str:
    """Set top-level keys of front matter; ``None`` removes one. No other character changes."""
    for key, value in changes.items():
        line = "" if value is None else yaml.safe_dump({key: value}, allow_unicode=True, sort_keys=False).rstrip("\n")
        node = _mapping(front)
        place = next(((k, v) for k, v in (node.value if node else ()) if k.value == key), None)
        if place is None:
            front = f"{front}\n{line}".strip("\n") if line else front
            continue
        begin, end = place[0].start_mark.index, _end(place[1], front)
        after = front[end:] if line else front[end:].removeprefix("\n")
        front = (front[:begin] + line + after).strip("\n")
    return front


def joined(front: str, body: str) -> str:
    """A card of front matter and body."""
    return (f"---\n{front}\n---\n\n" if front.strip() else "") + body


def _loaded(text: str) -> Any:
    """Text, lists and mappings; ``None`` for what is no YAML."""
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None


def _mapping(text: str) -> yaml.MappingNode | None:
    """The node of a mapping in block style, or of nothing but comments; ``None`` for anything else."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return None
    if node is None and text.strip():
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    block = isinstance(node, yaml.MappingNode) and not node.flow_style and isinstance(_loaded(text), dict)
    return node if block else None


def _end(node: yaml.Node, text: str) -> int:
    """Where a value ends in the text: a collection in block style claims what follows it too, comments and all."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last, text)
    return len(text[: node.end_mark.index].rstrip("\n"))
