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
    """The base's metadata with what hardening changes: the tag, the library that loads it, and where it comes from.

    The licence and everything else that the base says stays. A base that is a directory names no ``base_model``, as a
    path means nothing to others.

    Args:
        base: The base card's metadata.
        origin: The base, as the manifest has it.
        library: Who loads the result.
    """
    data = dict(base)
    tags = _tags(data)
    data["tags"] = tags if TAG in tags else [*tags, TAG]
    data.setdefault("library_name", library.name)
    if origin.hub_name is not None:
        data["base_model"] = origin.hub_name
        data["base_model_relation"] = RELATION
    return data


def collapsed_metadata(hardened: Mapping[str, Any], origin: BaseCheckpoint) -> dict[str, Any]:
    """The inverse, for weights that are the base's again."""
    data = dict(hardened)
    tags = [tag for tag in _tags(data) if tag != TAG]
    if tags:
        data["tags"] = tags
    else:
        data.pop("tags", None)
    if origin.hub_name is not None and data.get("base_model") == origin.hub_name:
        del data["base_model"]
        data.pop("base_model_relation", None)
    return data


def _tags(data: Mapping[str, Any]) -> list[Any]:
    tags = data.get("tags") or []
    return list(tags) if isinstance(tags, list) else [tags]
