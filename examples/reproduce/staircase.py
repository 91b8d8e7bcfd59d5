"""Where the steps of a fold's staircase belong, and what is left to whoever trains one weight alone.

The first table folds the same channels of the tiny Llama by other exponents between harden's lowest and highest.

The second table scales the two channels of the pairs that one kind of weight belongs to, far above everything, and
trains that weight alone. The learning rate that trains the inflated channel then trains one vector of a weight that can
be scaled on one side only (attention output, gate, down, head), and one number of the others, where two scales cross.
What these are good for is what no staircase takes from the attacker. Channels are drawn at random as well, to see
whether another choice would be better.

    python examples/reproduce/staircase.py --out staircase
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from setting import TINY_LLAMA, markdown
from torch import Tensor
from transformers import AutoConfig

from specdef_cli import AttackOptions, Fold, HardenOptions, attack, harden, load_tokenizer
from specdef_cli.attack.options import AttackTable, Suite
from specdef_cli.attack.trainings import Training
from specdef_cli.hardening.fold import HIGHEST_EXPONENT, LOWEST_EXPONENT, constant, spread, staircase
from specdef_cli.model.body import SymmetricPair
from specdef_cli.model.skeleton import Skeleton
from specdef_cli.model.symmetries import symmetries

BASE = TINY_LLAMA / "model"
Steps = tuple[tuple[int, ...], ...]
"""Exponents, indexed [layer][exponent]."""

Layout = Callable[[int, int], Steps]
"""(layers, exponents in each) → the exponents."""


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


LAYOUTS: dict[str, Layout] = {
    "one exponent": partial(constant, alpha=2.0**LOWEST_EXPONENT),
    "upwards": upwards,
    "downwards": downwards,
    "first layer apart, one exponent for the others": first_apart,
    "first layer apart, attention above the MLP": attention_above,
    "first layer apart, the MLP above attention (profile bfloat16's)": staircase,
}
TRAINED = (
    Training(),
    Training(where=("model.layers.[!0].*", "model.norm.*", "lm_head.*"), name="all but the first layer"),
    Training(where=("*.q_proj.weight",), name="q_proj alone"),
    Training(where=("*.o_proj.weight",), name="o_proj alone"),
    Training(where=("*.gate_proj.weight",), name="gate_proj alone"),
    Training(where=("*.down_proj.weight",), name="down_proj alone"),
    Training(where=("*norm.weight",), name="norms alone"),
)

_FIRST = "model.layers.0."
ALONE = {
    "o_proj": (f"{_FIRST}self_attn.value_output",),
    "gate_proj": (f"{_FIRST}post_attention_layernorm.norm_readers",),
    "down_proj": (f"{_FIRST}mlp.up_down",),
    "lm_head": ("model.norm.norm_readers",),
    "q_proj": (f"{_FIRST}self_attn.query_key", f"{_FIRST}input_layernorm.norm_readers"),
    "k_proj": (f"{_FIRST}self_attn.query_key", f"{_FIRST}input_layernorm.norm_readers"),
    "v_proj": (f"{_FIRST}self_attn.value_output", f"{_FIRST}input_layernorm.norm_readers"),
    "up_proj": (f"{_FIRST}mlp.up_down", f"{_FIRST}post_attention_layernorm.norm_readers"),
}
"""The pairs of the first layer (of the end, for the head) that each kind of weight belongs to."""


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
        chosen: The channels that harden scales, inflated and deflated, by the name of the pair.
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
        pairs = symmetries(Skeleton.of(AutoConfig.from_pretrained(BASE), shapes)).pairs
        result = harden(HardenOptions(str(BASE), scratch / "harden", Fold("bfloat16")))
        assert result is not None
        chosen = {pair.name: pair.channels for pair in result.manifest.folded}
        return cls(tensors, {pair.name: pair for pair in pairs}, chosen, scratch, options)

    def shares(
        self, name: str, exponents: Mapping[SymmetricPair, Mapping[int, int]], *training: Training
    ) -> dict[str, float]:
        """Fold, attack: progress as a share of the control's at the best learning rate, by what was trained."""
        directory = fold(self.tensors, exponents, self.scratch / name)
        suite = Suite("staircase", (AttackTable(training, learning_rates="search"),))
        options = dataclasses.replace(self.options, model=directory, out=self.options.out / name, suite=suite)
        report = attack(options)
        return {
            attack.spec.training.label: attack.share() or 0.0 for attack in report.attacks if attack.subject == "model"
        }

    def exponents(self, layout: Layout) -> dict[SymmetricPair, dict[int, int]]:
        """harden's channels with the exponents of a layout."""
        folded = [self.pairs[name] for name in self.chosen]
        steps = spread(folded, 2, layout)
        return {
            pair: {inflated: steps[pair.name][0], deflated: -steps[pair.name][1]}
            for pair in folded
            for inflated, deflated in [self.chosen[pair.name]]
        }

    def layouts(self) -> str:
        """The first table."""
        columns = {
            name: self.shares(re.sub(r"\W+", "-", name), self.exponents(layout), *TRAINED)
            for name, layout in LAYOUTS.items()
        }
        trained = next(iter(columns.values()))
        rows = ((row, *(f"{column[row]:.1%}" for column in columns.values())) for row in trained)
        return markdown(("trained", *columns), rows)

    def channels(self, draws: int) -> str:
        """The second table, with channels drawn ``draws`` times for each weight."""
        rows = []
        for weight, names in ALONE.items():
            pairs = [self.pairs[name] for name in names]
            training = Training(where=(f"*{weight}.weight",))
            generator = random.Random(0)
            choices = [[tuple(self.chosen[name]) for name in names]]
            choices += [[tuple(generator.sample(range(pair.channels), 2)) for pair in pairs] for _ in range(draws)]
            found = []
            for number, choice in enumerate(choices):
                exponents = {
                    pair: {inflated: HIGHEST_EXPONENT, deflated: -HIGHEST_EXPONENT}
                    for pair, (inflated, deflated) in zip(pairs, choice, strict=True)
                }
                found.append(self.shares(f"{weight}-{number}", exponents, training)[training.label])
            drawn = found[1:]
            figures = (found[0], statistics.fmean(drawn), min(drawn), max(drawn))
            left = "one vector" if len(names) == 1 else "one number"
            rows.append((weight, left, *(f"{share:.1%}" for share in figures)))
        return markdown(("trained", "left", "harden's channels", f"mean of {draws} draws", "least", "most"), rows)


def main() -> None:
    """Fold, attack, print two Markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=4, help="how often channels are drawn for each weight")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    options = AttackOptions(
        model="", control=BASE, out=arguments.out, runs=arguments.out / "runs", steps=arguments.steps, batch_size=8,
        sequence_length=64, eval_every=15, eval_sequences=64, jobs=arguments.jobs,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        experiment = Experiment.of_tiny_llama(Path(scratch), options)
        print(experiment.layouts(), experiment.channels(arguments.draws), sep="\n\n")


if __name__ == "__main__":
    main()
