"""What hardening costs in function: the paper's construction for each α, gauge and stored dtype, and a fold.

The tiny Llama is stored in the dtype, hardened as the command does it, loaded again, and compared with the base in that
dtype on held-out base text. Where hardening refuses, the same factors are built in memory and cast to the dtype, which
gives what publishing them would have cost.

    python examples/reproduce/utility.py
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from setting import RESIDUAL_WRITERS, TINY_LLAMA, base_text, insert, markdown
from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli import Factors, Fold, HardenOptions, SpecDefError, harden, load_model, load_tokenizer
from specdef_cli.attack.train import quiet
from specdef_cli.certify.tools import next_token_loss
from specdef_cli.errors import dtype_name
from specdef_cli.hardening.verify import OutputComparison, compare_outputs
from specdef_cli.model.inputs import token_batch
from specdef_cli.spectral import Gauge

BASE = TINY_LLAMA / "model"
ALPHAS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e9)
GAUGES: tuple[Gauge, ...] = get_args(Gauge)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOP_K = 25


@dataclass(frozen=True)
class Observed:
    """What a model makes of a text.

    Attributes:
        loss: Mean next-token cross-entropy (nats a byte).
        logits: float32, shape [sequences, length, vocabulary].
    """

    loss: float
    logits: Tensor


@dataclass(frozen=True)
class Cost:
    """One model against another on the same text.

    Attributes:
        loss: By how much its loss is higher (nats a byte).
        outputs: Its logits against the other's, at every position.
        refusal: Why hardening refuses it and what it allows; empty where it is published.
    """

    loss: float
    outputs: OutputComparison
    refusal: str = ""

    @property
    def cell(self) -> str:
        """Loss · greedy agreement · largest difference of a logit."""
        figures = "not finite"
        if self.outputs.equal:
            figures = "identical"
        elif math.isfinite(self.loss):
            loss = round(self.loss, 4) + 0.0  # no −0
            figures = f"{loss:+.4f} · {self.outputs.agreement:.2%} · {self.outputs.max_abs:.2g}"
        return f"refused: {figures}" if self.refusal else figures


@dataclass(frozen=True)
class Column:
    """Everything in one dtype.

    Attributes:
        base: The loss of the base.
        cast: The base against the base in float32.
        factored: The hardened models, by gauge and α, against the base.
        folded: The folded one; ``None`` where folding refuses.
    """

    dtype: torch.dtype
    base: float
    cast: Cost
    factored: Mapping[tuple[Gauge, float], Cost]
    folded: Cost | None

    @property
    def name(self) -> str:
        """The dtype without ``torch.``."""
        return dtype_name(self.dtype)


def observe(model: PreTrainedModel, tokens: Tensor) -> Observed:
    """Run a text, int64 of shape [sequences, length], through a model."""
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=sequence).logits.float() for sequence in tokens.split(1)])
    losses = [next_token_loss(*sequence) for sequence in zip(logits.split(1), tokens.split(1), strict=True)]
    return Observed(statistics.fmean(losses), logits)


def compare(reference: Observed, other: Observed, refusal: str = "") -> Cost:
    """What ``other`` costs against ``reference``."""
    return Cost(other.loss - reference.loss, compare_outputs(reference.logits, other.logits), refusal)


def hardened(base: Path, construction: Fold | Factors) -> PreTrainedModel:
    """The model that hardening publishes.

    Raises:
        SpecDefError: It refuses.
    """
    with tempfile.TemporaryDirectory(prefix="specdef-utility-") as scratch:
        out = Path(scratch) / "hardened"
        harden(HardenOptions(str(base), out, construction))
        return load_model(out)


def measure(dtype: torch.dtype, tokens: Tensor, alphas: Sequence[float] = ALPHAS) -> Column:
    """Harden the base in one dtype in every way."""
    original = observe(load_model(BASE), tokens)
    with tempfile.TemporaryDirectory(prefix="specdef-utility-") as scratch:
        base = Path(scratch)
        load_model(BASE, dtype=dtype).save_pretrained(base)
        load_tokenizer(BASE).save_pretrained(base)
        reference = observe(load_model(base), tokens)
        factored = {}
        for gauge, alpha in ((gauge, alpha) for gauge in GAUGES for alpha in alphas):
            refusal = ""
            try:
                model = hardened(base, Factors(alpha=alpha, top_k=TOP_K, gauge=gauge))
            except SpecDefError as error:
                refusal = f"{error.problem}. {error.hint}"
                model = load_model(base, dtype=torch.float32)
                insert(model, RESIDUAL_WRITERS, alpha, TOP_K, gauge)
                model.to(dtype)
            factored[gauge, alpha] = compare(reference, observe(model, tokens), refusal)
        try:
            folded = compare(reference, observe(hardened(base, Fold()), tokens))
        except SpecDefError:
            folded = None
    return Column(dtype, reference.loss, compare(original, reference), factored, folded)


def table(columns: Sequence[Column]) -> str:
    """A row for each way of hardening, a column for each dtype, as Markdown; and where refusals begin."""
    rows = [
        ("base", *(f"{column.base:.4f}" for column in columns)),
        ("base, against float32", *(column.cast.cell for column in columns)),
    ]
    rows += [
        (f"factors, {gauge}, α = {alpha:.0e}", *(column.factored[gauge, alpha].cell for column in columns))
        for gauge, alpha in columns[0].factored
    ]
    rows.append(("fold", *(column.folded.cell if column.folded else "refused" for column in columns)))
    lines = [markdown(("", *(column.name for column in columns)), rows), ""]
    for column in columns:
        for gauge in GAUGES:
            refusals = [cost.refusal for (used, _), cost in column.factored.items() if used == gauge and cost.refusal]
            if refusals:
                lines.append(f"- {column.name}, {gauge}, smallest α refused: {refusals[0]}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print a Markdown table."""
    _, held_out = base_text()
    tokens = token_batch(BASE, held_out, sequences=16, length=256)
    with quiet():
        columns = [measure(dtype, tokens) for dtype in DTYPES]
    print(table(columns))
    print(
        f"\nLoss above the base's in the same dtype (nats a byte) · positions of {tokens.numel()} at which the most "
        f"likely next byte is the same · largest difference of a logit. k = {TOP_K}, every o_proj and down_proj. "
        "Refused: nothing is published; the figures are what it would have cost."
    )


if __name__ == "__main__":
    main()
