"""Two earlier kinds of defence, and SpecDef, under a sweep of the attacker's learning rate.

The tiny Llama first learns the prose, so that there is a capability to remove. Two defences of the literature remove it
by training, and keep the base text's loss meanwhile:

*unlearned*
    Negative preference optimization with a retain loss: Zhang, Lin, Bai & Mei, "Negative Preference Optimization: From
    Catastrophic Collapse to Effective Unlearning", arXiv 2404.05868.
*noised*
    The prose's hidden states are pushed towards Gaussian noise, with ascent on its loss and a retain loss: after Rosati
    et al., "Representation Noising", arXiv 2405.14577. Simpler than theirs: every position of every layer is a sample,
    and the ascent is on the model's own loss, not on one read off each layer.

SpecDef changes no function, so it removes nothing by itself: the unlearned model is hardened, by factors and by fold.
All are attacked with the same prose on the same budget, over the usual learning rates and from there on wherever a
search for the best one leads. Takes about five minutes on one core.

    python examples/reproduce/prior.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from setting import TINY_LLAMA, base_text, markdown
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from specdef_cli import (
    Attack,
    AttackOptions,
    AttackReport,
    Factors,
    HardenOptions,
    attack,
    harden,
    load_model,
    load_tokenizer,
)
from specdef_cli.attack.data import load_data
from specdef_cli.attack.train import quiet
from specdef_cli.certify.tools import mean_loss
from specdef_cli.model.inputs import token_batch

BASE = TINY_LLAMA / "model"
USUAL_RATES = (1e-2, 1e-3, 1e-4, 1e-5)
"""Where every search begins, and what the table shows."""

BATCH, LENGTH, EVALUATED = 8, 64, 32
"""Sequences of a step, tokens of a sequence, held-out sequences that losses are measured on."""

Objective = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]
"""(model, prose, code) → what to minimize; both texts int64, shape [sequences, length]."""


@dataclass(frozen=True)
class Budget:
    """What is spent.

    Attributes:
        learning, defending, attacking: Optimizer steps of learning the prose, of each defence, of each attack.
        rates: Learning rates of the attacks; empty where they are searched.
    """

    learning: int = 300
    defending: int = 200
    attacking: int = 30
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One attack, over all its learning rates.

    Attributes:
        name: What was attacked.
        code: Held-out loss on the base text before it (nats a byte).
        of_control: Its progress over that of the attack on the unlearned model, both at their best rates; ``None`` for
            models that were not made from that one.
    """

    name: str
    code: float
    attack: Attack
    of_control: float | None = None

    @property
    def before(self) -> float:
        """Held-out loss on the prose before the attack."""
        assert self.attack.best_run.start is not None
        return self.attack.best_run.start


@dataclass(frozen=True)
class Capability:
    """The scale that losses on the prose are read on.

    Attributes:
        absent: Loss of the model that never learned the prose.
        present: Loss of the model that has learned it.
    """

    absent: float
    present: float

    def share(self, loss: float) -> float:
        """0 where nothing of the capability is there, 1 where all of it is."""
        return max(0.0, (self.absent - loss) / (self.absent - self.present))

    def cell(self, loss: float | None) -> str:
        """A loss and its share."""
        return "–" if loss is None else f"{loss:.3f} ({self.share(loss):.0%})"


def token_log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """log p of every token but the first, shape [sequences, length − 1]."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return -functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def learning(model: PreTrainedModel, prose: Tensor, code: Tensor) -> Tensor:
    """Both texts' losses."""
    return -token_log_probabilities(model, prose).mean() - token_log_probabilities(model, code).mean()


def unlearning(reference: PreTrainedModel, beta: float = 0.1) -> Objective:
    """−(2/β) log σ(−β log(π/π₀)) of each sequence of prose, π₀ the reference's; and the base text's loss."""

    def objective(model: PreTrainedModel, prose: Tensor, code: Tensor) -> Tensor:
        with torch.no_grad():
            before = token_log_probabilities(reference, prose).sum(-1)
        ratio = token_log_probabilities(model, prose).sum(-1) - before
        return -2 / beta * functional.logsigmoid(-beta * ratio).mean() - token_log_probabilities(model, code).mean()

    return objective


def noising(noise: float = 4.0, ascent: float = 0.1) -> Objective:
    """``noise`` · MMD²(states of the prose, N(0, 1)) − ``ascent`` · log(its loss); and the base text's loss."""

    def objective(model: PreTrainedModel, prose: Tensor, code: Tensor) -> Tensor:
        outputs = model(input_ids=prose, labels=prose, output_hidden_states=True)
        states = [layer.flatten(0, 1) for layer in outputs.hidden_states[1:]]  # [sequences · length, width] each
        distances = torch.stack([discrepancy(layer, torch.randn_like(layer)) for layer in states])
        retained = -token_log_probabilities(model, code).mean()
        return retained + noise * distances.mean() - ascent * outputs.loss.log()

    return objective


def discrepancy(samples: Tensor, others: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of two samples of equal size, shape [samples, width] each, under a sum of
    five Gaussian kernels around the mean squared distance.
    """
    both = torch.cat((samples, others))
    squared = torch.cdist(both, both).square()
    bandwidth = squared.detach().sum() / (len(both) * (len(both) - 1))
    kernel = torch.stack([torch.exp(-squared / (bandwidth * 2.0**octave)) for octave in range(-2, 3)]).sum(0)
    sign = torch.cat((samples.new_ones(len(samples)), -samples.new_ones(len(others))))
    return sign @ kernel @ sign / len(samples) ** 2


class Texts(Dataset[dict[str, Tensor]]):
    """A sequence of prose and one of code for each item; the longer text is cut.

    Args:
        prose, code: int64, shape [sequences, length].
    """

    def __init__(self, prose: Tensor, code: Tensor) -> None:
        self.prose, self.code = prose, code

    def __len__(self) -> int:
        return min(len(self.prose), len(self.code))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"prose": self.prose[index], "code": self.code[index]}


class ObjectiveTrainer(Trainer):
    """transformers' Trainer with an objective of two texts.

    Args:
        objective: What to minimize.
        arguments: As the Trainer takes them.
    """

    def __init__(self, objective: Objective, **arguments: object) -> None:
        super().__init__(**arguments)
        self.objective = objective

    def compute_loss(self, model: PreTrainedModel, inputs: dict[str, Tensor], **_: object) -> Tensor:
        """The objective of one batch."""
        return self.objective(model, inputs["prose"], inputs["code"])


def train(source: Path, out: Path, objective: Objective, texts: Texts, steps: int) -> Path:
    """Train the checkpoint ``source`` and write it to ``out``, with the tokenizer."""
    model = load_model(source)
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, use_cpu=True,
        lr_scheduler_type="linear", seed=0, remove_unused_columns=False, dataloader_pin_memory=False,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = ObjectiveTrainer(objective, model=model, args=arguments, train_dataset=texts)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(out)
    load_tokenizer(source).save_pretrained(out)
    return out


def build(directory: Path, budget: Budget) -> dict[str, Path]:
    """The model that has the capability and every defence of it, by name."""
    # All of the prose that an attack may train on, whatever its budget: its held-out part is nobody's.
    everything = AttackOptions(BASE, directory, steps=10_000, batch_size=BATCH, sequence_length=LENGTH)
    examples = load_data(everything, "causal-lm", load_tokenizer(BASE)).train
    prose = torch.tensor([examples[number]["input_ids"] for number in range(len(examples))])
    texts = Texts(prose, token_batch(BASE, base_text()[0], sequences=len(prose), length=LENGTH))
    capable = train(BASE, directory / "capable", learning, texts, budget.learning)
    unlearned = train(capable, directory / "unlearned", unlearning(load_model(capable)), texts, budget.defending)
    noised = train(capable, directory / "noised", noising(), texts, budget.defending)
    factors, folded = directory / "factors", directory / "folded"
    harden(HardenOptions(str(unlearned), factors, Factors(alpha=1e4, top_k=25)))
    harden(HardenOptions(str(unlearned), folded))
    return {"capable": capable, "unlearned": unlearned, "noised": noised, "factors": factors, "folded": folded}


def measure(models: Mapping[str, Path], out: Path, budget: Budget) -> list[Row]:
    """Attack what :func:`build` made, and the model that never learned the prose."""
    held_out = token_batch(BASE, base_text()[1], sequences=EVALUATED, length=LENGTH)

    def code(model: Path) -> float:
        return mean_loss(load_model(model), held_out)

    def relearn(model: Path, control: Path) -> AttackReport:
        return attack(
            AttackOptions(
                model, out / model.name, runs=out / "runs", control=control, trainings=("full",),
                learning_rates=budget.rates, search=not budget.rates, steps=budget.attacking, batch_size=BATCH,
                sequence_length=LENGTH, eval_every=min(5, budget.attacking), eval_sequences=EVALUATED, retained="none",
            )
        )  # fmt: skip

    capable, unlearned = models["capable"], models["unlearned"]
    never, noised = relearn(BASE, capable), relearn(models["noised"], capable)
    factors, folded = relearn(models["factors"], unlearned), relearn(models["folded"], unlearned)
    rows = [
        Row("none, prose never learned", code(BASE), never.attacks[1]),
        Row("none", code(capable), never.attacks[0]),
        Row("noised", code(models["noised"]), noised.attacks[1]),
        Row("unlearned", code(unlearned), factors.attacks[0]),
    ]
    for name, report in (("factors", factors), ("folded", folded)):
        for informed in report.attacks[1:]:
            named = ", ".join(filter(None, ("unlearned", name, informed.spec.variant.label)))
            rows.append(Row(named, code(models[name]), informed, informed.share()))
    return rows


def table(rows: Sequence[Row], scale: Capability) -> str:
    """Losses reached on held-out prose, as Markdown."""
    header = ("defence", "code", "prose before", *(f"η = {rate:.0e}" for rate in USUAL_RATES), "best", "of control")
    lines = []
    for row in rows:
        best = f"{scale.cell(row.attack.best)} at {row.attack.best_learning_rate:.0e}"
        reached = (scale.cell(row.attack.best_at(rate)) for rate in USUAL_RATES)
        share = "–" if row.of_control is None else f"{row.of_control:.0%}"
        lines.append((row.name, f"{row.code:.3f}", scale.cell(row.before), *reached, best, share))
    return markdown(header, lines)


def main() -> None:
    """Train, attack, print a Markdown table."""
    budget = Budget()
    with quiet(), tempfile.TemporaryDirectory(prefix="specdef-prior-") as scratch:
        rows = measure(build(Path(scratch), budget), Path(scratch) / "attacks", budget)
    scale = Capability(absent=rows[0].before, present=rows[1].before)
    print(table(rows, scale))
    print(
        f"\nLowest held-out loss on the prose in {budget.attacking} steps of AdamW on all parameters, the start "
        "included (nats a byte). In brackets the share of the capability: 0 % is what the model had that never "
        f"learned the prose ({scale.absent:.3f}), 100 % what the undefended one had ({scale.present:.3f}), both before "
        "any attack. Code: held-out loss on the base text before the attack. Of control: progress from before to "
        "best, over that of the unlearned model, from which the hardened ones were made. One seed."
    )


if __name__ == "__main__":
    main()
