"""What the user of an attack decides, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from specdef_cli.attack.optimizers.table import OPTIMIZERS
from specdef_cli.attack.spec import Budget
from specdef_cli.attack.suite import AttackTable, RatePolicy, Suite
from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings.table import Training
from specdef_cli.attack.variants.table import INFORMED, VARIANTS, Variant
from specdef_cli.errors import SpecDefError
from specdef_cli.option import as_declared, flag_of, option, require_positive

NO_RETAINED = "none"
"""Leaves out what is measured on retained text."""


MAX_SEEDS = 1000
"""Upper bound on --seeds, to catch typos."""

_MEMORY = "Budget / To save memory."
_HUB_DATA = "Data / Part of a Hub data set."
_COLUMNS = "Data / Columns"


def seeds_of(count: int) -> tuple[int, ...]:
    """The seeds of so many runs of every attack: 0, 1, …"""
    if not 1 <= count <= MAX_SEEDS:
        raise SpecDefError(f"--seeds {count} is not a number of runs", f"Give 1 to {MAX_SEEDS}.")
    return tuple(range(count))


@dataclass(frozen=True)
class AttackOptions(Budget):
    """Everything an attack depends on, besides the budget of a run (:class:`Budget`)."""

    model: str | Path
    out: Path = option(
        Path("attack"), "Runs and report; keeps finished runs.", "--out", "-o", metavar="DIR", group="Output"
    )
    runs: Path | None = option(
        None, "Keep runs here, to share the control's.", metavar="DIR", shown_default="OUT/runs", group="Output"
    )
    control: str | Path | None = option(
        None,
        "The undefended model, attacked alike.",
        metavar="BASE",
        shown_default="manifest's",
        group="Model",
    )
    control_subfolder: str | None = option(
        None, "Folder in BASE that it is in.", metavar="DIR", group="Model / In a folder of it."
    )
    dataset: str | None = option(
        None, "Hub id, file or directory.", metavar="DATA", shown_default="prose of Python's", group="Data"
    )
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.", metavar="NAME", group=_HUB_DATA)
    dataset_split: str | None = option(
        None, "Split of the dataset.", metavar="NAME", shown_default="train", group=_HUB_DATA
    )
    text_column: str | None = option(
        None,
        "Column with the text.",
        metavar="NAME",
        shown_default="text or messages",
        group=_COLUMNS,
    )
    text_pair_column: str | None = option(
        None, "Column with a second text (classification of pairs).", metavar="NAME", group=_COLUMNS
    )
    label_column: str = option("label", "Column with the label (classification).", metavar="NAME", group=_COLUMNS)
    image_column: str = option("image", "Column with the image.", metavar="NAME", group=_COLUMNS)
    retained: str | None = option(
        None,
        "Watch ability on it, or none.",
        metavar="DATA",
        shown_default="Python's source",
        group="Measurements",
    )
    prompts: str | None = option(
        None, "Count refusals of these; edits aim at them.", metavar="DATA", group="Measurements"
    )
    prompts_harmless: str | None = option(
        None, "Compare --prompts with these.", metavar="DATA", shown_default="questions", group="Measurements"
    )
    refusal_words: tuple[str, ...] = option(
        (), "It marks a refusal.", "--refusal-word", metavar="WORDS", shown_default="the report's", group="Measurements"
    )
    eval_task_path: Path | None = option(
        None,
        "Directory with lm-eval tasks of your own.",
        metavar="DIR",
        group="Measurements / Accuracy on tasks of lm-eval.",
    )
    task: Task | None = option(
        None, "causal-lm, masked-lm, …", metavar="TASK", shown_default="the architecture's", group="Data"
    )
    suite: Suite | None = None  # which attacks to run. It takes the place of the fields from variants to search.
    variants: tuple[str | Variant, ...] = option(
        (), "What is done to the model first, e.g. width:2.", "--variant", metavar="NAME", group="Attacks"
    )
    trainings: tuple[str | Training, ...] = option(
        (),
        "full, lora:16@q_proj, full@*norm*, …",
        "--training",
        "--recipe",
        metavar="NAME",
        shown_default="full, lora",
        group="Attacks",
    )
    """What is trained: ``full``, ``lora:16``, or the :class:`Training` itself. Empty means full and LoRA, and full
    alone for variants that do not undo the hardening."""
    optimizers: tuple[str, ...] = option(
        (), "adamw, sgd, …", "--optimizer", metavar="NAME", shown_default="adamw", group="Attacks"
    )
    learning_rates: tuple[float, ...] = option(
        (), "Learning rate.", "--lr", metavar="RATE", shown_default="searched", group="Attacks"
    )
    search: bool = option(
        True, "Bracket the best rate, or try decades alone.", "--lr-sweep/--no-lr-sweep", group="Attacks"
    )
    thorough: bool = option(False, "Finish runs that cannot become the best.", group="Attacks")
    gradient_accumulation: int = option(1, "Passes a step, to save memory.", metavar="N", group=_MEMORY)
    gradient_checkpointing: bool = option(False, "Compute activations twice, to save memory.", group=_MEMORY)
    eval_every: int | None = option(
        None, "Steps between evaluations.", metavar="N", shown_default="a tenth of --steps", group="Measurements"
    )
    eval_sequences: int = option(64, "Held-out sequences.", metavar="N", group="Measurements")
    free: tuple[str, ...] = ()
    """Which of ``steps``, ``batch_size``, ``sequence_length``, ``eval_every`` and ``eval_sequences`` may be lowered to
    suit the size of the model and the time limit."""
    time_limit: float | None = None
    """Seconds after which no further run starts; ``None`` runs all. The most telling attacks come first."""
    report_to: tuple[str, ...] = option(
        (), "tensorboard (in OUT/logs), wandb, trackio, mlflow.", metavar="NAME", group="Output"
    )
    seeds: tuple[int, ...] = (0,)  # one run each for adapters' and paths' initial values, dropout and data order
    jobs: int = option(1, "Runs at a time, each on a GPU of its own.", "--jobs", "-j", metavar="N", group="Budget")
    dask: str | None = option(None, "Runs on this cluster's workers.", metavar="ADDRESS", group="Budget")
    manifest: Path | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    subfolder: str | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        as_declared(self)
        for optimizer in self.optimizers:
            OPTIMIZERS.choose(optimizer)
        variants = tuple(Variant.parse(asked) if isinstance(asked, str) else asked for asked in self.variants)
        trainings = tuple(Training.parse(asked) if isinstance(asked, str) else asked for asked in self.trainings)
        object.__setattr__(self, "variants", variants)
        object.__setattr__(self, "trainings", trainings)
        require_positive(
            self, "steps", "batch_size", "gradient_accumulation", "eval_sequences", "sequence_length", "jobs"
        )
        if self.sequence_length < 2:
            raise SpecDefError(
                f"--sequence-length {self.sequence_length} leaves no token to predict", "Give 2 or more tokens."
            )
        if self.eval_every is not None:
            require_positive(self, "eval_every")
        for rate in self.learning_rates:
            if not (math.isfinite(rate) and rate > 0):
                raise SpecDefError(f"--lr {rate} is not a learning rate", "Give a positive number, e.g. --lr 1e-4.")
        for name in ("warmup_steps", "max_grad_norm", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SpecDefError(f"{_flag(name)} {getattr(self, name)} is negative", "Give 0 or more.")
        if self.dask is not None and self.jobs > 1:
            raise SpecDefError(
                f"--jobs {self.jobs} is of this machine, and --dask makes as many runs at a time as it has workers",
                "Leave --jobs out.",
            )
        if not self.seeds:
            raise SpecDefError("no seed is given", "Give at least one seed.")
        if self.prompts_harmless is not None and self.prompts is None:
            raise SpecDefError("--prompts-harmless needs --prompts", "Give both, or neither.")
        if self.suite is not None:
            self._refuse_beside_suite()

    def _refuse_beside_suite(self) -> None:
        decided = {name: getattr(self, name) for name in ("variants", "trainings", "optimizers", "learning_rates")}
        for name, value in {**decided, "search": not self.search}.items():
            if value:
                suite = self.suite.name if self.suite else ""
                raise SpecDefError(
                    f"{_flag(name)} cannot be given with --suite {suite}, which decides it",
                    "Leave the flag out, or copy the suite's file and edit it.",
                )

    @property
    def tables(self) -> tuple[AttackTable, ...]:
        """Which attacks to run: the suite's, or what the other fields come to."""
        if self.suite is not None:
            return self.suite.attacks
        asked: tuple[Training, ...] = self.trainings  # type: ignore[assignment]
        variants: tuple[Variant, ...] = self.variants  # type: ignore[assignment]
        trainings = asked or (Training("full"), Training("lora"))
        optimizers = self.optimizers or ("adamw",)
        rates: tuple[float, ...] | RatePolicy = self.learning_rates or ("search" if self.search else "grid")
        undoing = tuple(variant for variant in variants if variant.choice.informed is not None)
        others = tuple(variant for variant in variants if variant not in undoing)
        if Training("none") in asked and not any(variant.choice.edits for variant in others):
            others += tuple(Variant(name) for name, choice in VARIANTS.items() if choice.edits)
        return (
            AttackTable(trainings, optimizers, (Variant(), *undoing), rates),
            AttackTable(trainings[:1], optimizers, (INFORMED,), rates),
            AttackTable(asked or trainings[:1], optimizers, others, rates),
        )

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, self.steps // 10)


def _flag(name: str) -> str:
    return flag_of(AttackOptions, name)
