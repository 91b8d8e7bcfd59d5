"""A staircase of α in the paper's dense gauge, against recipes whose updates are a share of the weight.

HiRA and Madam do not see a diagonal scaling, and do see a dense one: a share of the weight is another share in another
basis. One α for all layers only moves their best rate, which a search finds; α that differs from layer to layer leaves
no rate that fits all of them. The symmetric gauge loses about α in accuracy, so float32 has few decades to give.

    python examples/reproduce/gauges.py --out gauges
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from setting import TINY_LLAMA, markdown

from specdef_cli import AttackOptions, Factors, HardenOptions, attack, harden
from specdef_cli.attack.options import AttackTable, Suite
from specdef_cli.attack.trainings import Training
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.hardening.factors import factor_groups
from specdef_cli.hardening.plan import HardeningPlan, make_plan
from specdef_cli.model.opened import OpenedModel
from specdef_cli.report import percent, rate

MODEL = TINY_LLAMA / "model"
BUDGET: dict[str, Any] = {"steps": 30, "batch_size": 8, "sequence_length": 64, "eval_every": 15, "eval_sequences": 64}
RECIPES = Suite(
    "gauges",
    (
        AttackTable((Training("hira"), Training("ia3"), Training("full")), learning_rates="search"),
        AttackTable((Training("full"),), ("madam",), learning_rates="search"),
    ),
)

Exponents = Callable[[int, int], list[float]]
"""(layers, linears of each) → the decimal exponent of α for every linear, in order."""


def by_layer(layers: int, linears: int) -> list[float]:
    """1 in the first layer to 4 in the last."""
    return [1 + 3 * layer / (layers - 1) for layer in range(layers) for _ in range(linears)]


def anywhere(lowest: float, highest: float) -> Exponents:
    """Evenly spread over all linears, in an order that has nothing to do with theirs."""

    def spread(layers: int, linears: int) -> list[float]:
        count = layers * linears
        exponents = [lowest + (highest - lowest) * place / (count - 1) for place in range(count)]
        random.Random(0).shuffle(exponents)
        return exponents

    return spread


STAIRCASES: Mapping[str, tuple[int, Exponents]] = {
    "10⁴ everywhere, k = 25": (25, lambda layers, linears: [4.0] * layers * linears),
    "10¹ to 10⁴ by layer, k = 25": (25, by_layer),
    "10⁰ to 10⁴ over all linears, k = 25": (25, anywhere(0, 4)),
    "10⁻² to 10⁴ over all linears, k = 25": (25, anywhere(-2, 4)),
    "10⁰ to 10⁴ over all linears, k = 1": (1, anywhere(0, 4)),
}


def hardened(out: Path, top_k: int, exponents: Exponents) -> Path:
    """The tiny Llama with an α for each linear, which no option of ``harden`` gives; made once."""
    if out.is_dir():
        return out

    def planned(base: OpenedModel, options: HardenOptions) -> HardeningPlan:
        plan = make_plan(base, options)
        layers = len({layer.module.split(".")[2] for layer in plan.factored})
        alphas = (10**exponent for exponent in exponents(layers, len(plan.factored) // layers))
        factored = tuple(replace(layer, alpha=alpha) for layer, alpha in zip(plan.factored, alphas, strict=True))
        made = {group.label: group for group in factor_groups(factored, base.checkpoint, None, plan.seed).values()}
        return replace(plan, factored=factored, groups=tuple(made.get(group.label, group) for group in plan.groups))

    with patch("specdef_cli.hardening.run.make_plan", planned):
        harden(HardenOptions(str(MODEL), out, Factors(alpha=1e4, top_k=top_k, gauge="symmetric")))
    return out


def row(name: str, out: Path) -> tuple[str, ...]:
    """The largest difference of a logit, then the share and best rate of each recipe."""
    directory = hardened(out / name, *STAIRCASES[name])
    verification = read_manifest(directory).verification or {}
    report = attack(
        AttackOptions(
            model=directory,
            control=MODEL,
            out=out / f"{name}, attacked",
            runs=out / "runs",
            suite=RECIPES,
            retained="none",
            **BUDGET,
        )
    )
    found = [each for each in report.attacks if each.subject == "model"]
    attacks = {each.spec.trained: each for each in found}
    chosen = [attacks[key] for key in ("HiRA", "IA³", "full fine-tuning with madam", "full fine-tuning")]
    shares = [f"{percent(each.share())} ({rate(each.best_learning_rate)})" for each in chosen]
    return (name, f"{verification['max_abs']:.0e}", *shares)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    place = parser.parse_args().out
    header = ("α", "logits differ by", "HiRA", "IA³", "full, Madam", "full, AdamW")
    print(markdown(header, [row(name, place) for name in STAIRCASES]))
