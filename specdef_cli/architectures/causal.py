"""Which checkpoints are causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_causal_lm(config: Mapping[str, Any]) -> bool:
    """Whether the architecture that a ``config.json`` names predicts the next token of text, and reads text alone."""
    architecture = (config.get("architectures") or [""])[0]
    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
