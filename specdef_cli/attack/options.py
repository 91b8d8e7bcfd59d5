"""What the user of an attack decides, checked before anything is loaded, and suites: which attacks belong together.

A suite is a TOML file that a user can copy and edit. Each ``[[attacks]]`` table stands for every combination of what it
lists: what is trained × with which optimizer × after which change to the model, over learning rates, each named as on
the command line. ``[budget]`` gives what a run may cost; flags of the command line win over it. The ones that come with
the package are in ``suites/``. ``every`` stands for every row of a table.

    [budget]
    steps = 30

    [[attacks]]
    trainings = ["full", "lora:16", { training = "full@*norm*", name = "norms" }]
    optimizers = ["adamw", "sgd"]
    variants = ["plain", "informed", "width:2"]
    learning_rates = "search"
"""

from __future__ import annotations

import importlib.util
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic.dataclasses import dataclass as checked_dataclass

from specdef_cli.attack.one_run import Budget
from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings import TRAININGS, Training
from specdef_cli.attack.variants import INFORMED, VARIANTS, Variant
from specdef_cli.checkpoint.output import writable_ancestor
from specdef_cli.errors import SpecDefError, WrongUsage, first_violation, require_extra
from specdef_cli.option import Source, flag_of, into_folder, option, parse_duration

NO_RETAINED = "none"  # leaves out what is measured on retained text

BUILTIN_PROMPTS = "questions about cooking and about astronomy"

MAX_SEEDS = 1000  # to catch typos

CHOICES = ("variants", "trainings", "optimizers", "learning_rates", "search")
"""Options that say which attacks to run."""

_ROWS = ((30, 16, 128, 64), (30, 8, 128, 32), (20, 8, 96, 16), (20, 4, 96, 16), (15, 4, 64, 8), (10, 4, 64, 8),
         (10, 2, 64, 8), (6, 2, 32, 4))  # fmt: skip
BUDGETS = tuple(
    dict(zip(("steps", "batch_size", "sequence_length", "eval_sequences"), row, strict=True)) for row in _ROWS
)
"""Budgets of a run, largest first. Fewer steps than the last one's tell nothing."""

LOWERED = (*BUDGETS[0], "eval_every")  # to suit the size of the model and the time limit

EVALUATIONS = 3  # of a run on a lowered budget, besides the one at step 0

RUN_SECONDS, RUNS_OF_A_LIMIT = 60, 45
"""A run takes at most so long on a usual machine; under a time limit, at most this part of it."""

USUAL_SPEED = {"cpu": 1e11, "accelerator": 1e14}
"""Floating-point operations a second of training in float32 on a few cores, and on a data centre's GPU."""

_AT_A_TIME = "Budget / Runs at once, here or on a cluster."
_MEMORY = "Budget / To save memory."
_HUB_DATA = "Data / Part of a Hub data set."
_COLUMNS = "Data / Columns"


def seeds_of(count: int) -> tuple[int, ...]:
    """Return that many seeds: 0, 1, …"""
    if not 1 <= count <= MAX_SEEDS:
        raise WrongUsage(f"--seeds {count} is not a number of runs", f"Give 1 to {MAX_SEEDS}.")
    return tuple(range(count))


@dataclass(frozen=True)
class AttackOptions(Budget, Source):
    """Everything an attack depends on, besides the budget of a run (:class:`Budget`)."""

    out: Path = option(
        Path("attack"), "Runs and report; keeps finished runs.", "--out", "-o", metavar="DIR", group="Output"
    )
    runs: Path | None = option(
        None, "Keep runs here, to share the control's.", metavar="DIR", shown_default="OUT/runs", group="Output"
    )
    control: str | Path | None = option(
        None, "Undefended model, attacked likewise.", metavar="BASE", shown_default="manifest's", group="Model"
    )
    control_subfolder: str | None = option(
        None, "Folder in BASE that it is in.", metavar="DIR", group="Model / Folder that the model is in."
    )
    dataset: str | None = option(
        None, "Hub id, file or directory.", metavar="DATA", shown_default="Python's prose", group="Data"
    )
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.", metavar="NAME", group=_HUB_DATA)
    dataset_split: str | None = option(
        None, "Split of the dataset.", metavar="NAME", shown_default="train", group=_HUB_DATA
    )
    text_column: str | None = option(
        None, "Column with the text.", metavar="NAME", shown_default="text or messages", group=_COLUMNS
    )
    text_pair_column: str | None = option(
        None, "Column with a second text (classification of pairs).", metavar="NAME", group=_COLUMNS
    )
    label_column: str = option("label", "Column with the label (classification).", metavar="NAME", group=_COLUMNS)
    image_column: str = option("image", "Column with the image.", metavar="NAME", group=_COLUMNS)
    retained: str | None = option(
        None, "Watch ability on this, or none.", metavar="DATA", shown_default="Python's source", group="Measurements"
    )
    prompts: str | None = option(
        None, "Count refusals of these; edits aim at them.", metavar="DATA", group="Measurements"
    )
    prompts_harmless: str | None = option(
        None, "Compare --prompts with these.", metavar="DATA", shown_default="questions", group="Measurements"
    )
    refusal_words: tuple[str, ...] = option(
        (), "Marks a refusal.", "--refusal-word", metavar="WORDS", shown_default="the report's", group="Measurements"
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
        (), "Learning rate.", "--lr", metavar="RATE", shown_default="searched", group="Attacks", above=0
    )
    search: bool = option(
        True, "Bracket the best rate, or try only decades.", "--lr-sweep/--no-lr-sweep", group="Attacks"
    )
    thorough: bool = option(False, "Finish even runs that cannot become the best.", group="Attacks")
    gradient_accumulation: int = option(1, "Passes a step, to save memory.", metavar="N", group=_MEMORY, at_least=1)
    gradient_checkpointing: bool = option(False, "Compute activations twice, to save memory.", group=_MEMORY)
    eval_every: int | None = option(
        None,
        "Steps between evaluations.",
        metavar="N",
        shown_default="a tenth of --steps",
        group="Measurements",
        at_least=1,
    )
    eval_sequences: int = option(64, "Held-out sequences.", metavar="N", group="Measurements", at_least=1)
    free: tuple[str, ...] = ()  # which of LOWERED may be
    time_limit: float | None = option(
        None,
        "Stop then; the most telling attacks run first.",
        metavar="45m",
        group="Budget",
        parse=parse_duration,
        above=0,
    )
    """Seconds after which no further run starts; ``None`` runs all. The most telling attacks come first."""
    report_to: tuple[str, ...] = option(
        (), "tensorboard (in OUT/logs), wandb, trackio, mlflow.", metavar="NAME", group="Output"
    )
    seeds: tuple[int, ...] = option(
        (0,), "Runs of each attack.", metavar="N", shown_default="1", group="Budget", parse=seeds_of
    )
    """One run each, for adapters' and paths' initial values, dropout and data order."""
    jobs: int = option(
        1, "Runs at once, each on its own GPU.", "--jobs", "-j", metavar="N", group=_AT_A_TIME, at_least=1
    )
    dask: str | None = option(
        None, "Address of a Dask scheduler, whose workers make the runs.", metavar="ADDRESS", group=_AT_A_TIME
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        into_folder(self, "control")
        for optimizer in self.optimizers:
            OPTIMIZERS.choose(optimizer)
        variants = tuple(Variant.parse(asked) if isinstance(asked, str) else asked for asked in self.variants)
        trainings = tuple(Training.parse(asked) if isinstance(asked, str) else asked for asked in self.trainings)
        object.__setattr__(self, "variants", variants)
        object.__setattr__(self, "trainings", trainings)
        if self.warmup_steps >= self.steps:
            raise WrongUsage(
                f"--warmup-steps {self.warmup_steps} is all of a run of {self.steps} steps",
                f"Give fewer, or --steps {self.warmup_steps + 1} or more.",
            )
        if self.dask is not None and self.jobs > 1:
            raise WrongUsage(
                f"--jobs {self.jobs} is of this machine, and --dask makes as many runs at a time as it has workers",
                "Leave --jobs out.",
            )
        if not self.seeds:
            raise WrongUsage("no seed is given", "Give at least one seed.")
        if not all(word.strip() for word in self.refusal_words):
            raise WrongUsage("a --refusal-word is empty, and would be in every answer", "Give words of a refusal.")
        if self.prompts_harmless is not None and self.prompts is None:
            raise WrongUsage("--prompts-harmless needs --prompts", "Give both, or neither.")
        if self.dataset is None and self.retained in (None, NO_RETAINED):
            for name in ("dataset_config", "dataset_split", "text_column", "text_pair_column"):
                if getattr(self, name) is not None:
                    raise WrongUsage(
                        f"{flag_of(AttackOptions, name)} {getattr(self, name)} needs --dataset",
                        "Give --dataset DATA.",
                    )
        if self.eval_task_path is not None and not self.eval_tasks:
            raise WrongUsage("--eval-task-path needs --eval-task", "Name a task, or leave it out.")
        given = next((name for name in CHOICES if getattr(self, name) not in ((), True)), None)
        if self.suite is not None and given is not None:
            raise WrongUsage(
                f"{flag_of(AttackOptions, given)} cannot be given with --suite {self.suite.name}, which decides it",
                "Leave the flag out, or copy the suite's file and edit it.",
            )

    @property
    def tables(self) -> tuple[AttackTable, ...]:
        """The attacks to run: the suite's, or those that the other fields describe."""
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
        return self.eval_every or max(1, self.steps // 10)

    def require_present(self) -> None:
        """Refuse data, trackers and libraries that are not there, and an output that cannot be written."""
        for dataset in (self.dataset, self.retained, self.prompts, self.prompts_harmless):
            if dataset is not None and dataset != NO_RETAINED:
                require_data(dataset)
        require_trackers(self.report_to)
        if self.eval_tasks:
            require_extra("eval", "accuracies on tasks")
        writable_ancestor(self.out)

    def lowered_for(self, parameters: int, device: str) -> AttackOptions:
        """These options, lowered where ``free`` allows it to suit the model's size, the device and the time limit.

        The machine's own speed does not matter: the same command gives the same figures on another one of the kind.
        """
        speed = USUAL_SPEED["cpu" if device == "cpu" else "accelerator"]
        seconds = min(RUN_SECONDS, (self.time_limit or math.inf) / RUNS_OF_A_LIMIT)
        lowered = self
        for budget in ({}, *BUDGETS):  # first of all as it is
            lower = {name: min(value, getattr(self, name)) for name, value in budget.items() if name in self.free}
            if "eval_every" in self.free and budget:
                lower["eval_every"] = max(1, lower.get("steps", self.steps) // EVALUATIONS)
            lowered = replace(self, **lower)
            if 6 * parameters * lowered.steps * lowered.batch_size * lowered.sequence_length <= speed * seconds:
                break
        return lowered


RatePolicy = Literal["grid", "search"]
BudgetName = Literal["steps", "batch_size", "sequence_length", "eval_every", "eval_sequences", "seeds"]


def _variant(asked: str | Variant) -> Variant | str:
    return asked if isinstance(asked, Variant) or asked == INFORMED else Variant.parse(asked)


def _training(asked: str | Mapping[str, str] | Training) -> Training:
    """A training, also as ``{ training = …, name = … }`` for one that the report calls something else."""
    if not isinstance(asked, Mapping):
        return Training.parse(asked) if isinstance(asked, str) else asked
    if set(asked) != {"training", "name"}:
        raise ValueError(f"{dict(asked)} has not the keys training and name")
    return replace(Training.parse(asked["training"]), name=asked["name"])


def _all_of(rows: Iterable[str]) -> pydantic.BeforeValidator:
    """Replace ``every`` by the names of all rows."""
    return pydantic.BeforeValidator(
        lambda asked: [name for each in asked for name in (rows if each == "every" else (each,))]
    )


_Training = Annotated[Training, pydantic.PlainValidator(_training)]
_Variant = Annotated[Variant | Literal["informed"], pydantic.PlainValidator(_variant)]
_Optimizer = Annotated[str, pydantic.AfterValidator(lambda name: OPTIMIZERS.choose(name).name)]

_Rates = Annotated[
    Annotated[tuple[pydantic.PositiveFloat, ...], pydantic.Field(min_length=1), pydantic.Tag("list")]
    | Annotated[RatePolicy, pydantic.Tag("name")],
    pydantic.Discriminator(lambda asked: "name" if isinstance(asked, str) else "list"),
]


@checked_dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class AttackTable:
    """One ``[[attacks]]`` table: every combination of its lists."""

    trainings: Annotated[tuple[_Training, ...], _all_of(TRAININGS)] = (Training(),)
    optimizers: Annotated[tuple[_Optimizer, ...], _all_of(OPTIMIZERS)] = ("adamw",)
    variants: tuple[_Variant, ...] = (Variant(),)
    """What is done to the model first; ``informed`` is what undoes this model's hardening."""
    learning_rates: _Rates = "grid"
    """How the rates are found (decades, or decades and then a search), or the rates themselves."""
    models: Literal["any", "chat"] = "any"  # chat for models with a chat template alone


@checked_dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Suite:
    """Attacks and their budget."""

    name: str
    attacks: Annotated[tuple[AttackTable, ...], pydantic.Field(min_length=1)]
    budget: dict[BudgetName, pydantic.PositiveInt] = field(default_factory=dict)
    description: str = ""  # one line for --list

    def __post_init__(self) -> None:
        called: dict[str, Training] = {}
        for training in (training for table in self.attacks for training in table.trainings):
            if called.setdefault(training.label, training) != training:
                raise ValueError(f"two trainings are called {training.label!r}: {called[training.label]}, {training}")


def suite_names() -> tuple[str, ...]:
    """The suites that come with the package."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in (files("specdef_cli.attack") / "suites").iterdir()))


def load_suite(name: str) -> Suite:
    """Read a suite that comes with the package, or a file of the user's."""
    own = name in suite_names()
    path: Any = files("specdef_cli.attack") / "suites" / f"{name}.toml" if own else Path(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        return pydantic.TypeAdapter(Suite).validate_python({**data, "name": Path(name).stem})
    except WrongUsage as error:  # a value of the file, not of the command line
        raise SpecDefError(f"{name}: {error.problem}", error.hint) from error
    except OSError as error:
        raise WrongUsage(
            f"no suite {name!r} found", f"Choose one of {', '.join(suite_names())}, or give a TOML file."
        ) from error
    except (ValueError, TypeError) as error:
        reason = first_violation(error) if isinstance(error, pydantic.ValidationError) else error
        example = files("specdef_cli.attack") / "suites" / "quick.toml"
        raise SpecDefError(f"{name} is not a suite: {reason}", f"Write it like {example}.") from error


FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text", ".md", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes that may stand behind these; `datasets` unpacks them."""

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def require_data(dataset: str) -> None:
    """Refuse a data set that is a path to nothing."""
    if "://" in dataset:
        address = re.match(r"\w+://(?:[\w.-]+\.\w+/)?datasets/([\w.-]+/[\w.-]+)", dataset)
        raise SpecDefError(
            f"{dataset} is an address, not a file, a directory or a Hub id",
            f"Give {address[1]}." if address else "Download it, and give the file.",
        )
    path = Path(dataset).expanduser()
    like_a_file = path.suffix.lower() in (*FILE_SUFFIXES, *COMPRESSIONS)
    if not path.exists() and (like_a_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset)):
        raise SpecDefError(f"no data file {path} found", "Check the path, or give a Hub id.")


def require_trackers(trackers: tuple[str, ...]) -> None:
    """Refuse trackers that are unknown or not installed."""
    for tracker in trackers:
        if tracker not in TRACKERS:
            raise WrongUsage(f"--report-to {tracker!r} is unknown", f"Choose one of: {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(tracker) is None:
            raise SpecDefError(
                f"--report-to {tracker} needs {tracker}, which is not installed", f"pip install {tracker}"
            )
