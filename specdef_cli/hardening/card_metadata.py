"""The front matter of a model card: what the Hub reads of it (https://huggingface.co/docs/hub/model-cards)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdef_cli.checkpoint.library import Library
from specdef_cli.checkpoint.manifest import BaseCheckpoint

TAG = "specdef"
RELATION = "finetune"
"""The Hub's word for other weights of the same architecture; it has none for weights of the same function."""


def hardened_metadata(base: Mapping[str, Any], origin: BaseCheckpoint, library: Library) -> dict[str, Any]:
    """The keys that hardening sets: the tag, the library that loads it, and where it comes from.

    A base that is a directory names no ``base_model``, as a path means nothing to others.
    """
    tags = _tags(base)
    changes: dict[str, Any] = {} if TAG in tags else {"tags": [*tags, TAG]}
    if "library_name" not in base:
        changes["library_name"] = library.name
    if origin.hub_name is not None:
        changes |= {"base_model": origin.hub_name, "base_model_relation": RELATION}
    return changes


def collapsed_metadata(hardened: Mapping[str, Any], origin: BaseCheckpoint) -> dict[str, Any]:
    """The inverse, for weights that are the base's again; ``None`` removes a key."""
    tags = _tags(hardened)
    changes: dict[str, Any] = {"tags": [tag for tag in tags if tag != TAG] or None} if TAG in tags else {}
    if origin.hub_name is not None and hardened.get("base_model") == origin.hub_name:
        changes |= {"base_model": None, "base_model_relation": None}
    return changes


def _tags(data: Mapping[str, Any]) -> list[Any]:
    tags = data.get("tags") or []
    return list(tags) if isinstance(tags, list) else [tags]
