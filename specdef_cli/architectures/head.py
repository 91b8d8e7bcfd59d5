"""The head of a model: what turns hidden states into logits over its vocabulary."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head of a model of transformers; ``None`` where it has none, and for models of other libraries."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
