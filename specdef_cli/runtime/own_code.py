"""Whose class is a model: transformers', or one that comes with the checkpoint? One answer for planning and loading."""

from __future__ import annotations

from typing import Any

import transformers

from specdef_cli.errors import SpecDefError


def own_class(config: Any, architecture: str | None, *, trust_remote_code: bool) -> tuple[str, str] | None:
    """The auto class and the code reference that ``auto_map`` names for a model; ``None`` for transformers' own."""
    models = {
        auto: reference
        for auto, reference in (getattr(config, "auto_map", None) or {}).items()
        if auto.startswith(("AutoModel", "TFAutoModel", "FlaxAutoModel")) and isinstance(reference, str)
    }
    found = next(((auto, ref) for auto, ref in models.items() if ref.rpartition(".")[2] == architecture), None)
    if not models or architecture is None or (found is None and not hasattr(transformers, architecture)):
        return None
    if found is None:
        auto, reference = next(iter(models.items()))
        raise SpecDefError(
            f"config.json names the class {architecture}, and for {auto} the code {reference}: loaders take either",
            "Take auto_map out of config.json if transformers' class is meant, or name the other in architectures.",
        )
    if not trust_remote_code:
        hint = "Read that code, then pass --trust-remote-code."
        if hasattr(transformers, architecture):
            hint += " If transformers' class of that name is meant, take auto_map out of config.json."
        raise SpecDefError(f"architecture {architecture!r} is defined by code in the checkpoint ({found[1]})", hint)
    return found
