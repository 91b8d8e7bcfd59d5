"""Where the steps of a fold's staircase belong, and how little is left to whoever trains one weight alone.

The first table folds the same channels of the tiny Llama by other exponents between harden's lowest and highest, and
attacks all parameters, all but the first layer, and every kind of weight alone.

The second table folds a single channel, far above everything. Of a weight that can be scaled on one side only, the
learning rate that trains this channel trains one vector, and the search finds it: what one vector is good for is what
no staircase takes from the attacker. Channels are drawn at random, to see whether another choice would be better.

    python examples/reproduce/staircase.py --out staircase
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from setting import TINY_LLAMA, markdown
from torch import Tensor
from transformers import AutoConfig

from specdef_cli import HardenOptions, harden, load_tokenizer
from specdef_cli.architectures import SymmetricPair, symmetric_pairs
from specdef_cli.attack import AttackOptions, attack
from specdef_cli.attack.suite import AttackTable, Keyword, Suite
from specdef_cli.attack.training import Training
from specdef_cli.spectral.staircase import HIGHEST_EXPONENT, LOWEST_EXPONENT, constant, staircase

BASE = TINY_LLAMA / "model"
Steps = tuple[tuple[int, ...], ...]
"""Exponents, indexed [layer][pair]."""


def upwards(layers: int, kinds: int) -> Steps:
    """Evenly, from the lowest exponent in the first layer to the highest in the last."""
    span, last = HIGHEST_EXPONENT - LOWEST_EXPONENT, layers * kinds - 1
    return tuple(
        tuple(LOWEST_EXPONENT + span * (layer * kinds + kind) // last for kind in range(kinds))
        for layer in range(layers)
    )


def downwards(layers: int, kinds: int) -> Steps:
    """The same in the opposite order."""
    return tuple(layer[::-1] for layer in upwards(layers, kinds)[::-1])


def first_apart(layers: int, kinds: int) -> Steps:
    """The first layer as harden has it, and the lowest exponent for all others."""
    return staircase(layers, kinds)[0], *((LOWEST_EXPONENT,) * kinds for _ in range(layers - 1))


def attention_above(layers: int, kinds: int) -> Steps:
    """harden's steps, but within a layer the MLP has the lowest ones."""
    return tuple(layer[::-1] for layer in staircase(layers, kinds))


LAYOUTS: dict[str, Callable[[int, int], Steps]] = {
    "one exponent": lambda layers, kinds: constant(layers, kinds, 2.0**LOWEST_EXPONENT),
    "upwards": upwards,
    "downwards": downwards,
    "first layer apart, one exponent for the others": first_apart,
    "first layer apart, attention above the MLP": attention_above,
    "first layer apart, the MLP above attention (harden's)": staircase,
}
ALL_BUT_THE_FIRST_LAYER = Training(
    parameters=("model.layers.[!0].*", "model.norm.*", "lm_head.*"), name="all but the first layer"
)

ONE_SIDED = {
    "o_proj": "model.layers.0.self_attn.value_output",
    "gate_proj": "model.layers.0.post_attention_layernorm.norm_readers",
    "down_proj": "model.layers.0.mlp.up_down",
    "lm_head": "model.norm.norm_readers",
}
"""Weights that can be scaled on one side only, and the pair that does."""


def fold(tensors: Mapping[str, Tensor], exponents: Mapping[SymmetricPair, Mapping[int, int]], directory: Path) -> Path:
    """Write the tiny Llama with some channels of its symmetric pairs scaled.

    Args:
        tensors: The base's; they are not changed.
        exponents: log2 of the factor of each channel that is scaled, by pair.
        directory: Where to.
    """
    scaled = {name: tensor.clone() for name, tensor in tensors.items()}
    for pair, channels in exponents.items():
        for side in pair.sides:
            rows = scaled[side.tensor].movedim(side.axis, 0)
            for channel, exponent in channels.items():
                rows[list(side.indices[channel])] *= 2.0 ** (side.power * exponent)
    directory.mkdir(parents=True)
    save_file(scaled, directory / "model.safetensors", metadata={"format": "pt"})
    AutoConfig.from_pretrained(BASE).save_pretrained(directory)
    load_tokenizer(BASE).save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Experiment:
    """What both tables need.

    Attributes:
        tensors: The base's.
        pairs: Its symmetric pairs, by name.
        chosen: The channels that harden scales, inflated and deflated, by the name of the pair; in each layer, the
            pair with the highest exponent first.
        scratch: Where folds are written.
        options: Of every attack, but for what is attacked.
    """

    tensors: Mapping[str, Tensor]
    pairs: Mapping[str, SymmetricPair]
    chosen: Mapping[str, tuple[int, ...]]
    scratch: Path
    options: AttackOptions

    @classmethod
    def of_tiny_llama(cls, scratch: Path, options: AttackOptions) -> Experiment:
        """Harden the tiny Llama, to learn which channels it takes."""
        tensors = load_file(BASE / "model.safetensors")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        pairs = symmetric_pairs(AutoConfig.from_pretrained(BASE), shapes)
        result = harden(HardenOptions(str(BASE), scratch / "harden", method="fold"))
        assert result is not None
        folded = sorted(result.manifest.folded, key=lambda pair: max(pair.exponents), reverse=True)
        chosen = {pair.name: pair.channels for pair in folded}
        return cls(tensors, {pair.name: pair for pair in pairs}, chosen, scratch, options)

    def shares(
        self, name: str, exponents: Mapping[SymmetricPair, Mapping[int, int]], *training: Keyword | Training
    ) -> dict[str, float]:
        """Fold, attack: progress as a share of the control's at the best learning rate, by what was trained."""
        directory = fold(self.tensors, exponents, self.scratch / name)
        suite = Suite("staircase", (AttackTable(training, learning_rates="search"),))
        options = dataclasses.replace(self.options, model=directory, out=self.options.out / name, suite=suite)
        report = attack(options)
        return {each.training.label: report.share(each) or 0.0 for each in report.attacks if each.subject == "model"}

    def layouts(self) -> str:
        """The first table."""
        layers: dict[str, list[str]] = {}
        for name in self.chosen:
            match = re.match(r"model\.layers\.\d+", name)
            layers.setdefault(match.group() if match else "model.layers.0", []).append(name)  # as harden's final norm
        layers = dict(sorted(layers.items()))
        kinds = max(map(len, layers.values()))
        columns = {}
        for layout, schedule in LAYOUTS.items():
            exponents = {
                self.pairs[name]: dict(zip(self.chosen[name], (step, -step), strict=True))
                for names, steps in zip(layers.values(), schedule(len(layers), kinds), strict=True)
                for name, step in zip(names, steps, strict=False)
            }
            columns[layout] = self.shares(
                re.sub(r"\W+", "-", layout), exponents, "full", ALL_BUT_THE_FIRST_LAYER, "groups"
            )
        trained = next(iter(columns.values()))
        rows = ((row, *(f"{column[row]:.1%}" for column in columns.values())) for row in trained)
        return markdown(("trained", *columns), rows)

    def channels(self, count: int) -> str:
        """The second table, with ``count`` channels drawn for each weight."""
        rows = []
        for weight, name in ONE_SIDED.items():
            pair = self.pairs[name]
            training = Training(parameters=(f"*{weight}.weight",))
            mine = self.chosen[name][0]
            others = [channel for channel in range(pair.channels) if channel != mine]
            found = [
                self.shares(f"{weight}-{channel}", {pair: {channel: HIGHEST_EXPONENT}}, training)[training.label]
                for channel in (mine, *random.Random(0).sample(others, count))
            ]
            drawn = found[1:]
            figures = (found[0], statistics.fmean(drawn), min(drawn), max(drawn))
            rows.append((weight, *(f"{share:.1%}" for share in figures)))
        return markdown(("one channel of", "harden's", f"mean of {count} others", "least", "most"), rows)


def main() -> None:
    """Fold, attack, print two Markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=8, help="how many are drawn for each weight")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    options = AttackOptions(
        model="", control=BASE, out=arguments.out, runs=arguments.out / "runs", steps=arguments.steps, batch_size=8,
        sequence_length=64, eval_every=15, eval_sequences=64, jobs=arguments.jobs,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        experiment = Experiment.of_tiny_llama(Path(scratch), options)
        print(experiment.layouts(), experiment.channels(arguments.channels), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
