"""Folds that mix channels, against updates that are relative to the weights: what they hold, and where precision ends.

A multiplicative optimizer (Madam) does not see a diagonal fold, since a weight's relative change is the same at every
scale. A dense invertible M between the values and the output of an attention head, W_v → M W_v and W_o → W_o M⁻¹, is a
symmetry as well, and does not commute with relative changes: a change of η in every entry of M W_v changes the function
by up to η·‖|M⁻¹||M|‖. Rounding is such a change, of half a unit in the last place, so what resists relative updates by
a factor κ loses κ in accuracy. This measures both sides, with M = Uᵀ diag(κ^½ … κ^-½) V, U and V random and orthogonal,
another M for every key-value head.

    python examples/reproduce/mixing.py --out mixing

Only values and output have such a symmetry in a Llama: RoPE leaves query and key a rotation and a scale for each plane,
and the MLP's activation leaves up and down a scale for each channel.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from setting import TINY_LLAMA, attack_batch, markdown, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli import AttackOptions, Training, attack
from specdef_cli.model import load_model, load_tokenizer

CONDITIONS = (1.0, 2.0**6, 2.0**12, 2.0**18)
"""κ. With 1 the channels are only rotated."""
GROUPS = {"values alone": ("*v_proj.weight",), "output alone": ("*o_proj.weight",), "full": ()}
OPTIMIZERS = ("madam", "adamw")


@dataclass(frozen=True)
class Accuracy:
    """What mixing did to the function in a dtype: largest difference of logits, and the loss in nats a token."""

    difference: float
    loss: float


def mix(model: PreTrainedModel, condition: float, seed: int = 0) -> None:
    """Mix the channels of every key-value head of a Llama in place, by matrices of a condition number."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    size, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    scales = condition ** torch.linspace(0.5, -0.5, size, dtype=torch.float64)
    with torch.no_grad():
        for block in model.model.layers:
            values, output = block.self_attn.v_proj.weight, block.self_attn.o_proj.weight
            for head in range(config.num_key_value_heads):
                left, right = (_orthogonal(size, generator) for _ in range(2))
                rows = slice(head * size, (head + 1) * size)
                values[rows] = (left.T * scales) @ right @ values[rows].double()
                inverse = (right.T / scales) @ left
                for query in range(head * groups, (head + 1) * groups):
                    columns = slice(query * size, (query + 1) * size)
                    output[:, columns] = output[:, columns].double() @ inverse


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


def accuracy(directory: Path, base: Path, dtype: torch.dtype) -> Accuracy:
    """The mixed checkpoint against its base, both computed in ``dtype``, on the attack text."""
    batch = attack_batch(16, 128)
    with torch.inference_mode():
        expected, found = (load_model(path, dtype=dtype)(**batch) for path in (base, directory))
    return Accuracy(float((found.logits - expected.logits).abs().max()), float(found.loss))


def main() -> None:
    """Mix, measure the function, attack, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    base = TINY_LLAMA / "model"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for condition in CONDITIONS:
            directory = Path(scratch) / f"{condition:g}"
            model = tiny_llama()
            mix(model, condition)
            model.float().save_pretrained(directory)
            load_tokenizer(base).save_pretrained(directory)
            single, half = (accuracy(directory, base, dtype) for dtype in (torch.float32, torch.bfloat16))
            shares = []
            for name, globs in GROUPS.items():
                report = attack(
                    AttackOptions(
                        model=directory, control=base, out=arguments.out / f"{condition:g}-{name.replace(' ', '-')}",
                        runs=arguments.out / "runs", trainings=(Training("full", where=globs),),
                        optimizers=OPTIMIZERS,
                        search=True, steps=30, batch_size=8, sequence_length=64, eval_every=5,
                        eval_sequences=16, jobs=arguments.jobs,
                    )
                )  # fmt: skip
                found = {each.spec.optimizer: each.share() for each in report.attacks if each.subject == "model"}
                shares += [f"{found[optimizer] or 0:.0%}" for optimizer in OPTIMIZERS]
            rows.append(
                (
                    f"2^{math.log2(condition):g}",
                    f"{single.difference:.0e}",
                    f"{single.loss:.3f}",
                    f"{half.difference:.0e}",
                    f"{half.loss:.3f}",
                    *shares,
                )
            )
    header = (
        "κ", "float32: logits", "loss", "bfloat16: logits", "loss",
        *(f"{name}, {optimizer}" for name in GROUPS for optimizer in OPTIMIZERS),
    )  # fmt: skip
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
