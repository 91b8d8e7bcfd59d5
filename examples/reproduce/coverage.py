"""Attack one group of parameters at a time: what no inflated channel touches trains as if nothing had happened.

Prints, for each hardened directory, the attacker's progress as a share of the control's, at the best learning rate of a
sweep that goes on below η₀/α. Finished runs are kept, so the table can be extended without repeating anything.

    python examples/reproduce/coverage.py BASE HARDENED [HARDENED …] --out coverage --steps 30
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from specdef_cli.attack import AttackOptions, AttackReport, attack

GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "full": {"recipes": ("full",)},
    "LoRA, all linears": {"recipes": ("lora",)},
    "LoRA, q and v": {"recipes": ("lora",), "lora_targets": ("q_proj", "v_proj")},
    **{
        name: {"recipes": ("full",), "train": (glob,)}
        for name, glob in {
            "embeddings alone": "*embed_tokens*",
            "norms alone": "*norm*",
            "q_proj alone": "*q_proj*",
            "k_proj alone": "*k_proj*",
            "v_proj alone": "*v_proj*",
            "o_proj alone": "*o_proj*",
            "gate_proj alone": "*gate_proj*",
            "up_proj alone": "*up_proj*",
            "down_proj alone": "*down_proj*",
            "lm_head alone": "*lm_head*",
        }.items()
    },
}
INFORMED = ("collapse", "rebalance")


def measure(
    base: Path, hardened: Path, group: str, out: Path, steps: int, optimizer: str, rates: str | None
) -> AttackReport:
    """All learning rates of one group, on the control and on the hardened model."""
    first, last = map(int, rates.split(":")) if rates else (0, 1)
    return attack(
        AttackOptions(
            model=hardened,
            control=base,
            out=out,
            optimizer=optimizer,
            steps=steps,
            learning_rates=tuple(float(f"1e{exponent}") for exponent in range(first, last - 1, -1)),
            eval_sequences=32,
            **GROUPS[group],  # type: ignore[arg-type]
        )
    )


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("hardened", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--rates", help="decades of the learning rate, first:last; by default specdef's own sweep")
    parser.add_argument("--groups", nargs="*", default=list(GROUPS))
    arguments = parser.parse_args()
    names = [path.name for path in arguments.hardened]
    print(f"| trained ({arguments.optimizer}, {arguments.steps} steps) | control | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for group in arguments.groups:
        cells = []
        control = ""
        for hardened in arguments.hardened:
            report = measure(
                arguments.base,
                hardened,
                group,
                arguments.out,
                arguments.steps,
                arguments.optimizer,
                arguments.rates,
            )
            for each in report.attacks:
                if each.subject == "control":
                    control = f"{each.runs[0].start:.3f} → {each.best:.3f} (η={each.best_learning_rate:g})"
                elif each.knowledge == "none":
                    cells.append(f"{report.share(each) or 0:.0%}: {each.best:.3f} (η={each.best_learning_rate:g})")
        print(f"| {group} | {control} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
