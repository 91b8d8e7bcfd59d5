"""What the measurements of curvature share: models hardened in memory, the batch, and how a table is printed.

Everything is in float64 (but for the norms, which transformers computes in float32 in any case): curvature at α = 10⁶
spans twelve decades, and float32 has seven. Hardening here is the paper's algorithm applied to a loaded model, not the
command, which stores float32 at best.
"""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from specdef_cli.model import SpecDefLinear, load_model, load_tokenizer
from specdef_cli.spectral.factors import rotated_factors, symmetric_factors

TINY_LLAMA = Path(__file__).parents[1] / "tiny_llama"
RESIDUAL_WRITERS = ("*.o_proj", "*.down_proj")


@cache
def base_text() -> tuple[str, str]:
    """What the tiny Llama was trained on, and the half that it has not seen."""
    return runpy.run_path(str(TINY_LLAMA / "texts.py"))["base_text"]()


def tiny_llama() -> PreTrainedModel:
    """The shipped model, in float64."""
    disable_progress_bar()
    return load_model(TINY_LLAMA / "model", dtype=torch.float64)


def attack_batch(sequences: int, length: int) -> dict[str, Tensor]:
    """The first tokens of the attack text, int64, shape [sequences, length]; the labels are the inputs."""
    sys.path.insert(0, str(TINY_LLAMA))
    from texts import attack_text

    tokenizer = load_tokenizer(TINY_LLAMA / "model")
    text = attack_text()[0]
    # Bytes are tokens, and a character has at least one byte.
    rows = [
        tokenizer(text[start : start + length])["input_ids"][:length] for start in range(0, sequences * length, length)
    ]
    batch = torch.tensor(rows)
    return {"input_ids": batch, "labels": batch}


def insert(
    model: nn.Module, layers: Iterable[str], alpha: float, top_k: int, gauge: str = "rotated"
) -> dict[str, SpecDefLinear]:
    """Replace every ``nn.Linear`` whose path a glob names by its inflated layer and compensation (Algorithm 1).

    Args:
        model: Changed in place.
        layers: Globs of module paths.
        alpha: α.
        top_k: k; at most the layer's smaller side is taken.
        gauge: ``rotated`` or ``symmetric``.
    """
    build = rotated_factors if gauge == "rotated" else symmetric_factors
    globs = tuple(layers)
    replaced = {}
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not any(fnmatchcase(name, glob) for glob in globs):
            continue
        weight = linear.weight.detach()
        basis = torch.linalg.svd(weight, full_matrices=False)[0][:, :top_k]
        factors = build(weight, basis, alpha)
        pair = SpecDefLinear(linear.in_features, linear.out_features, linear.bias is not None, dtype=weight.dtype)
        with torch.no_grad():
            pair.inflated.weight.copy_(factors.inflated)
            pair.compensation.weight.copy_(factors.compensation)
            if linear.bias is not None:
                pair.compensation.bias.copy_(linear.bias)
        model.set_submodule(name, pair)
        replaced[name] = pair
    return replaced


def slope(inputs: Sequence[float], outputs: Sequence[float]) -> float:
    """Least-squares slope of log(outputs) over log(inputs)."""
    x, y = ([math.log(value) for value in values] for values in (inputs, outputs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
