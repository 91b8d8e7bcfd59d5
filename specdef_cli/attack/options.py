"""What the user of an attack decides, checked before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from specdef_cli.attack.optimizers import optimizer_choice
from specdef_cli.attack.spec import Dtype, Schedule, Task, Variant
from specdef_cli.attack.suite import AttackTable, RatePolicy, Suite
from specdef_cli.attack.training import Training, adapters
from specdef_cli.errors import SpecDefError

Recipe = Literal["full", "lora", "dora", "ia3", "prompt"]
ExpansionKind = Literal["width", "depth", "inject"]


@dataclass(frozen=True)
class Expansion:
    """How the attacker grows the model first.

    Attributes:
        kind: ``width`` (a parallel path), ``depth`` (Theorem 8's factors) or ``inject`` (an identity layer after the
            pair).
        factor: For ``width``, how many times as many parameters the attacked layers have afterwards (> 1); for
            ``depth``, the number N of factors (a whole number, ≥ 2); of no effect for ``inject``, which adds one layer.
    """

    kind: ExpansionKind = "width"
    factor: float = 2.0

    def __post_init__(self) -> None:
        _choice("expansion", self.kind, get_args(ExpansionKind))
        if self.kind == "inject":
            return
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise SpecDefError(f"--expand {self.factor:g} does not grow anything", "Give a factor above 1, e.g. 2x.")
        if self.kind == "depth" and self.factor != int(self.factor):
            raise SpecDefError(
                f"--expansion depth cannot make {self.factor:g} factors", "Give a whole number of factors, e.g. 2x."
            )

    @property
    def variant(self) -> Variant:
        """The variant of a run that grows the model like this."""
        return Variant(self.kind, None if self.kind == "inject" else self.factor)

    @classmethod
    def parse(cls, text: str, kind: ExpansionKind = "width") -> Expansion:
        """Read a growth factor as users write it: ``2x``, ``1.5x``, ``3``.

        Raises:
            SpecDefError: ``text`` is not a factor above 1.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*[x×]?\s*", text, re.IGNORECASE)
        if match is None:
            raise SpecDefError(f"--expand {text!r} is not a factor", "Write it like 2x or 1.5x.")
        return cls(kind, float(match.group(1)))


@dataclass(frozen=True)
class AttackOptions:
    """Everything an attack depends on.

    Attributes:
        model: The directory under attack (or a Hub id).
        out: Where finished runs and the report are kept.
        runs: Where finished runs are kept instead, to share the control's between reports.
        control: The undefended model, a directory or a Hub id; ``None`` is the base that the model's manifest names.
        dataset: A Hub id, or a JSONL, JSON, CSV, text or parquet file; ``None`` is English prose that every Python
            installation has.
        dataset_config, dataset_split: Which part of a Hub dataset; the split defaults to ``train``.
        text_column: The column with the text; ``None`` takes what the rows have
            (:data:`specdef_cli.attack.data.forms.FORMS`).
        label_column, image_column: Columns of the dataset; of classification alone.
        retained: Text, as ``dataset``, that the attacker wants to keep the model's ability on; ``None`` is the source
            of Python's standard library, and ``none`` leaves that measurement out.
        eval_tasks: Tasks of lm-eval on which accuracy is measured after every run (``specdef-cli[eval]``).
        eval_task_path: A directory with tasks of the user's own, as lm-eval's ``--include_path``.
        task: ``None`` is what the control's architecture says.
        suite: Which attacks to run. It takes the place of the fields from ``recipes`` to ``train``.
        recipes: What is trained: all parameters (``full``) or adapters. Empty means full and LoRA.
        lora_targets: Module names as PEFT takes them; empty means every linear (``all-linear``).
        lora_rank, lora_alpha: As PEFT takes them; α defaults to twice the rank.
        optimizers: Names of :data:`specdef_cli.attack.optimizers.OPTIMIZERS`.
        learning_rates: Rates that every attack and the control run at. Empty means decades that go on below η₀/α for
            the hardened model.
        search: Search the best learning rate of every attack, from those decades on, until it is bracketed.
        expansions: Ways to grow the model first; each is attacked next to the plain ones.
        freeze_compensation: Attack also with every compensation layer frozen.
        channel_rates: Attack also with a learning rate for every row and column, in proportion to its size.
        collapse: Attack the collapsed model with every recipe, and not only the first.
        rebalance: The same for the rebalanced model (a fold).
        train: Globs of parameter names; where given, only these train. Hardened layers answer to their original names
            too.
        schedule, warmup_steps: The learning rate's course.
        max_grad_norm: Gradient clipping, as the Trainer does it; 0 turns it off.
        weight_decay: As the optimizer takes it.
        steps: Optimizer steps of every run.
        batch_size: Sequences of a step, over all processes and passes together.
        gradient_accumulation: Passes that the sequences of a step are split into, to save memory.
        gradient_checkpointing: Compute activations again in the backward pass, to save memory.
        sequence_length: Tokens of a sequence.
        eval_every: Steps between evaluations; ``None`` is a tenth of the steps.
        eval_sequences: Held-out sequences that are evaluated, at most.
        seeds: One run each for adapters' and paths' initial values, dropout and data order.
        jobs: Runs at a time, each in a process of its own and, where there are several GPUs, on one of its own.
        dtype: The dtype of training. float32 unless memory forbids: in bfloat16, small rates round to nothing, which
            flatters a defence. ``mixed`` keeps float32 parameters and computes in bfloat16.
        trust_remote_code: Passed on to transformers for models that carry their own code.
        revision, token: Passed on to the Hub.
    """

    model: str | Path
    out: Path
    runs: Path | None = None
    control: str | Path | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    text_column: str | None = None
    label_column: str = "label"
    image_column: str = "image"
    retained: str | None = None
    eval_tasks: tuple[str, ...] = ()
    eval_task_path: Path | None = None
    task: Task | None = None
    suite: Suite | None = None
    recipes: tuple[Recipe, ...] = ()
    lora_targets: tuple[str, ...] = ()
    lora_rank: int = 16
    lora_alpha: float | None = None
    optimizers: tuple[str, ...] = ("adamw",)
    learning_rates: tuple[float, ...] = ()
    search: bool = False
    expansions: tuple[Expansion, ...] = ()
    freeze_compensation: bool = False
    channel_rates: bool = False
    collapse: bool = False
    rebalance: bool = False
    train: tuple[str, ...] = ()
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    steps: int = 30
    batch_size: int = 16
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    sequence_length: int = 128
    eval_every: int | None = None
    eval_sequences: int = 64
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1
    dtype: Dtype = "float32"
    trust_remote_code: bool = False
    revision: str | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        for optimizer in self.optimizers:
            optimizer_choice(optimizer)
        for recipe in self.recipes:
            _choice("recipe", recipe, get_args(Recipe))
        _choice("schedule", self.schedule, get_args(Schedule))
        _choice("dtype", self.dtype, get_args(Dtype))
        if self.task is not None:
            _choice("task", self.task, get_args(Task))
        for name in (
            "steps", "batch_size", "gradient_accumulation", "eval_sequences", "lora_rank", "sequence_length", "jobs",
        ):  # fmt: skip
            _positive(name, getattr(self, name))
        if self.sequence_length < 2:
            raise SpecDefError(
                f"--sequence-length {self.sequence_length} leaves no token to predict", "Give 2 or more tokens."
            )
        if self.eval_every is not None:
            _positive("eval_every", self.eval_every)
        for rate in self.learning_rates:
            if not (math.isfinite(rate) and rate > 0):
                raise SpecDefError(f"--lr {rate} is not a learning rate", "Give a positive number, e.g. --lr 1e-4.")
        for name in ("warmup_steps", "max_grad_norm", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SpecDefError(f"{_flag(name)} {getattr(self, name)} is negative", "Give 0 or more.")
        if not self.seeds:
            raise SpecDefError("no seed is given", "Give at least one seed.")
        if self.learning_rates and self.search:
            raise SpecDefError(
                f"--lr {self.learning_rates[0]:g} and --lr-sweep contradict each other", "Give one of them."
            )
        adapted = [recipe for recipe in self.recipes if recipe != "full"]
        if self.train and adapted:
            raise SpecDefError(
                f"--train {self.train[0]} selects among the model's own parameters, and {adapted[0]} trains none of "
                "them",
                "Use --recipe full with --train, or choose adapters with --lora-targets.",
            )
        if self.suite is not None:
            self._refuse_beside_suite()

    def _refuse_beside_suite(self) -> None:
        for name in (
            "recipes", "lora_targets", "learning_rates", "search", "expansions", "freeze_compensation", "channel_rates",
            "collapse", "rebalance", "train",
        ):  # fmt: skip
            if getattr(self, name):
                raise SpecDefError(
                    f"{_flag(name)} stands beside the suite {self.suite.name if self.suite else ''}, which decides it",
                    "Leave the flag out, or copy the suite's file and edit it.",
                )

    @property
    def tables(self) -> tuple[AttackTable, ...]:
        """Which attacks to run: the suite's, or what the other fields come to."""
        if self.suite is not None:
            return self.suite.attacks
        recipes: tuple[Recipe, ...] = self.recipes or (("full",) if self.train else ("full", "lora"))
        trainings = tuple(self._training(recipe) for recipe in recipes)
        rates: tuple[float, ...] | RatePolicy = self.learning_rates or ("search" if self.search else "grid")
        informed = trainings if self.collapse or self.rebalance else trainings[:1]
        tables = [
            AttackTable(trainings, self.optimizers, learning_rates=rates),
            AttackTable(informed, self.optimizers, ("informed",), rates),
        ]
        others = [Variant("channel-rates")] * self.channel_rates
        others += [Variant("freeze-compensation")] * self.freeze_compensation
        others += [expansion.variant for expansion in self.expansions]
        if others:
            tables.append(AttackTable(trainings[:1], self.optimizers, tuple(others), rates))
        return tuple(tables)

    def _training(self, recipe: Recipe) -> Training:
        if recipe == "full":
            return Training("full", parameters=self.train)
        return adapters(recipe, self.lora_rank, self.lora_alpha, targets=self.lora_targets)

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, self.steps // 10)


_FLAGS = {"recipes": "--recipe", "learning_rates": "--lr", "search": "--lr-sweep", "expansions": "--expand"}


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise SpecDefError(f"{_flag(name)} {value} is not positive", "Give 1 or more.")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SpecDefError(f"--{name} {value!r} is unknown", f"Choose one of: {', '.join(choices)}.")
