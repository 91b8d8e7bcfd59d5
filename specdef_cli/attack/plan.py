"""Which runs an attack is made of: every attack of the tables, its control, the learning rates to begin with, and
how long they take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.one_run import RunResult, RunSpec
from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.options import BUILTIN_PROMPTS, AttackOptions, AttackTable
from specdef_cli.attack.target import Target
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.variants import Variant, informed_variants
from specdef_cli.errors import WrongUsage

MAX_RATES = 12
"""More decades than this (α beyond about 10⁹) are sampled every second, third … decade."""

SEARCHED_RUNS = 8
"""Runs of a search for a learning rate, on average over those of ``make attack-suite``."""

SEE_NO_SCALE = ("hira", "adapter")
"""Trainings that a diagonal hardening does not change."""


@dataclass(frozen=True)
class Series:
    """The runs of one attack, which differ in learning rate and seed alone."""

    first: RunSpec
    grid: tuple[float, ...]  # the rates to begin with, largest first
    search: bool  # whether further rates are tried until the best one is bracketed
    seeds: tuple[int, ...]
    """Without a search every rate is run with every seed; with it, all but the first only at the best rate."""
    optional: bool  # whether it may be left out where the model has nothing that it could train
    thorough: bool = False  # whether every run of a search is made in full

    @property
    def hurried(self) -> bool:
        """Whether runs end once they cannot become the best; never if they may diverge and recover, or warm up."""
        first = self.first
        return self.search and not self.thorough and first.stop_at_divergence and not first.warmup_steps

    def runs(self, rates: Iterable[float], seeds: Iterable[int]) -> tuple[RunSpec, ...]:
        seeds = tuple(seeds)
        return tuple(replace(self.first, learning_rate=rate, seed=seed) for rate in rates for seed in seeds)


def default_learning_rates(optimizer: str, alpha: float) -> tuple[float, ...]:
    """Decades from the optimizer's largest usual rate η₀ to one below η₀/α**p (its smallest usual rate at least),
    largest first.

    Args:
        alpha: The largest inflation, 1 for an ordinary model.
    """
    choice = OPTIMIZERS.choose(optimizer)
    top = round(math.log10(max(choice.learning_rates)))
    bottom = round(math.log10(min(choice.learning_rates)))
    if alpha > 1:
        bottom = min(bottom, top - choice.alpha_power * math.ceil(math.log10(alpha) - 1e-9) - 1)
    stride = math.ceil((top - bottom + 1) / MAX_RATES)
    exponents = [*range(top, bottom, -stride), bottom]
    return tuple(float(f"1e{exponent}") for exponent in exponents)


def make_plan(options: AttackOptions, target: Target) -> tuple[Series, ...]:
    """Every attack, the controls first: one for each training and optimizer, on the same budget and data.

    Without rates of the user's, the control and attacks on what is, or has again become, an ordinary model begin with
    the optimizer's usual rates, a search with the second largest, which is the best or next to it. Where an inflated
    factor is in the way, the decades go on below η₀/α.
    """
    controls: list[Series] = []
    attacks: list[Series] = []
    edits: list[Series] = []
    for table in options.tables:
        if table.models == "chat" and not target.chat:
            continue
        variants = _variants(table, target)
        trained = [variant for variant in variants if not variant.choice.edits]
        for training, optimizer in _combinations(table, target):
            for variant in trained:
                series = _series(options, table, target, training, optimizer, variant)
                attacks.append(series)
                grid = series.grid if _fixed(table) else _usual_rates(options, table, optimizer)
                first = replace(series.first.control(target.control), learning_rate=grid[0])
                controls.append(replace(series, first=first, grid=grid))
        for variant in variants if target.task == "causal-lm" else ():
            if variant.choice.edits:  # which is not trained: a run of the control, and one of the model
                first = _series(options, table, target, Training("none"), "adamw", variant).first
                for spec in (first.control(target.control), first):
                    spec = replace(spec, learning_rate=0.0)
                    edits.append(Series(spec, (0.0,), search=False, seeds=options.seeds[:1], optional=True))
    if not (attacks or edits):
        asked = dict.fromkeys(str(asked) for table in options.tables for asked in (*table.trainings, *table.variants))
        raise WrongUsage(
            f"no attack is left: {', '.join(asked)} find nothing in this model",
            "Choose another --training or --variant; `specdef attack --list` shows all.",
        )
    return (*_distinct(controls), *_distinct(attacks), *_distinct(edits))


def _series(
    options: AttackOptions, table: AttackTable, target: Target, training: Training, optimizer: str, variant: Variant
) -> Series:
    alpha = target.alpha if variant.choice.trains_inflated else 1.0
    grid = _usual_rates(options, table, optimizer)
    if _fixed(table):
        grid = tuple(sorted(set(table.learning_rates), reverse=True))  # type: ignore[arg-type]
    elif alpha > 1:
        grid = default_learning_rates(optimizer, alpha)
    first = RunSpec(
        subject="model",
        checkpoint=target.model,
        data=target.data,
        task=target.task,
        variant=variant,
        training=training,
        optimizer=optimizer,
        learning_rate=grid[0],
        eval_every=options.eval_interval,
        seed=options.seeds[0],
        prompts=target.prompts if target.asked or variant.choice.edits else "",
        **options.budget,
    )
    # A variant that the user did not name may have nothing to work on; the report then says so.
    optional = options.suite is not None or variant not in (Variant(), *options.variants)
    return Series(first, grid, table.learning_rates == "search", options.seeds, optional, options.thorough)


def _usual_rates(options: AttackOptions, table: AttackTable, optimizer: str) -> tuple[float, ...]:
    """The first rates for a model without inflated weights."""
    rates = OPTIMIZERS.choose(optimizer).learning_rates
    return rates[1:2] if table.learning_rates == "search" and not options.thorough else rates


def _fixed(table: AttackTable) -> bool:
    return not isinstance(table.learning_rates, str)


def _variants(table: AttackTable, target: Target) -> list[Variant]:
    """A table's variants that apply to this model."""
    found: list[Variant] = []
    for variant in table.variants:
        if isinstance(variant, Variant):
            found += [variant] if variant.applies_to(target.constructions) else []
        else:
            folded = target.manifest is not None and bool(target.manifest.folded)
            found += informed_variants(target.constructions, surely_folded=folded)
    return list(dict.fromkeys(found))


def _combinations(table: AttackTable, target: Target) -> list[tuple[Training, str]]:
    return [
        (training, optimizer)
        for asked in table.trainings
        if asked.method != "none"
        for training in asked.on(target)
        for optimizer in table.optimizers
    ]


def _distinct(series: list[Series]) -> list[Series]:
    """Drop attacks that several tables name."""
    found: dict[RunSpec, Series] = {}
    for candidate in series:
        found.setdefault(candidate.first.attack, candidate)
    return list(found.values())


def expected_runs(series: Series) -> int:
    """Runs of a series: as many as it names, or what a search takes on average."""
    return SEARCHED_RUNS + len(series.seeds) - 1 if series.search else len(series.grid) * len(series.seeds)


def in_order(plan: Sequence[Series]) -> tuple[Series, ...]:
    """A plan as it is run: likely bypasses, then common recipes, then the rest; each after its control."""
    controls = {series.first.recipe: series for series in plan if series.first.subject == "control"}
    ordered: dict[int, Series] = {}
    for attack in sorted((series for series in plan if series.first.subject == "model"), key=_rank):
        for series in (controls.get(attack.first.recipe), attack):
            if series is not None:
                ordered.setdefault(id(series), series)
    return tuple(ordered.values())


def _rank(series: Series) -> int:
    """0 undoes the hardening or edits, 1 sees no scale, 2 is full fine-tuning, 3 LoRA, 4 anything else."""
    spec = series.first
    if spec.is_edit:
        return 0
    plain, usual = spec.variant.choice.function is None, spec.optimizer == "adamw"
    if usual and spec.variant.choice.informed is not None and spec.training == Training("full"):
        return 0
    known = [*(Training(name) for name in SEE_NO_SCALE), Training("full"), Training("lora")]
    return max(1, known.index(spec.training)) if usual and plain and spec.training in known else 4


SHORTENED = 0.6
"""Mean time of a run in a search, which ends what cannot become its best, relative to a full run."""


SECOND_ORDER_TIMES = 3
"""How many times as long a step takes that differentiates the gradient once more."""


FORWARD_SHARE = 1 / 3
"""Of a training step's time, what the forward pass takes, which is all of an evaluation."""


PROMPT_TOKENS = 4000
"""Tokens that an edited model reads and writes to be measured, about."""


@dataclass(frozen=True)
class Speed:
    """Seconds to load a model and set a run up (``load``), and for each token that is trained on (``token``)."""

    load: float
    token: float

    def run(self, spec: RunSpec, held_out: int) -> float:
        """Seconds of a run whose evaluations take ``held_out`` sequences each."""
        if spec.is_edit:
            return len(spec.variant.strengths) * (self.load + self.token * FORWARD_SHARE * PROMPT_TOKENS)
        times = SECOND_ORDER_TIMES if OPTIMIZERS.choose(spec.optimizer).second_order else 1
        evaluated = FORWARD_SHARE * held_out * (spec.steps // spec.eval_every + 1)
        return self.load + self.token * spec.sequence_length * (times * spec.steps * spec.batch_size + evaluated)


def speed_of(finished: RunResult, held_out: int) -> Speed:
    """Estimate the speed from a run's last steps, without loading."""
    before, last = finished.evaluations[-2:]
    trained = (last.step - before.step) * finished.spec.batch_size
    tokens = finished.spec.sequence_length * (trained + FORWARD_SHARE * held_out)
    return Speed(0.0, (last.seconds - before.seconds) / tokens)


@dataclass(frozen=True)
class PlannedAttack:
    label: str
    learning_rates: tuple[float, ...]  # those to begin with
    runs: int  # how many there will be; of a search, about
    finished: int  # how many of those to begin with are there already
    search: bool
    seconds: float  # what the missing runs take, about


@dataclass(frozen=True)
class Forecast:
    """A plan in the order in which it is run; ``seconds`` is what is missing of it, ``budget`` a run in words."""

    model: str
    control: str
    data: str
    budget: str
    attacks: tuple[PlannedAttack, ...]
    assumed: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    time_limit: float | None

    @property
    def runs(self) -> str:
        """How many runs there are, in words: ``34``, or ``about 45`` with a search among them."""
        count = sum(attack.runs for attack in self.attacks)
        return f"about {count}" if any(attack.search for attack in self.attacks) else str(count)


def assumptions(options: AttackOptions, specs: Sequence[RunSpec], control: str, data: AttackData) -> tuple[str, ...]:
    """Sentences on what the user left open and was chosen."""
    said = []
    if options.control is None:
        said.append(f"Control: {control}, the base named in the manifest.")
    if options.dataset is None:
        said.append(f"Data: {data.name}.")
    said += data.remarks
    trained = [spec for spec in specs if not spec.is_edit]
    if len(trained) < len(specs) and options.prompts is None:
        said.append(f"Prompts that edits tell apart: {BUILTIN_PROMPTS}.")
    if not trained:
        return tuple(said)
    if options.suite is not None:
        said.append(f"Attacks: the suite {options.suite.name}.")
    elif not options.trainings:
        said.append(f"Recipes: {' and '.join(dict.fromkeys(spec.training.label for spec in trained))}.")
    if not options.learning_rates:
        said.append(f"Learning rates: {_rates_in_words(options, trained)}.")
    said.append(f"Budget of every run: {options.in_words}.")
    return tuple(said)


def _rates_in_words(options: AttackOptions, specs: Sequence[RunSpec]) -> str:
    rates = sorted({spec.learning_rate for spec in specs}, reverse=True)
    usual = sorted({spec.learning_rate for spec in specs if spec.subject == "control"}, reverse=True)
    if any(table.learning_rates == "search" for table in options.tables):
        return "searched for every attack"
    span = f"{usual[0]:g} to {usual[-1]:g}"
    return f"{span}; the hardened model down to {rates[-1]:g}, below η₀/α" if rates[-1] < usual[-1] else span


def plan_notes(options: AttackOptions, target: Target) -> tuple[str, ...]:
    """Sentences on what is known before any run: how the model was made, and what does not apply to it."""
    found = target.recognised.sentence or "Nothing in the weights shows that this package hardened it."
    asked = dict.fromkeys(variant for variant in options.variants if isinstance(variant, Variant))
    missing = [variant for variant in asked if not variant.applies_to(target.constructions)]
    untrained = [training for table in options.tables for training in table.trainings if not training.on(target)]
    words = {"factored": "a layer stored as factors", "folded": "a folded pair", "scaled": "a scaled module"}
    return (
        *([f"The model comes without a manifest. {found}"] if target.manifest is None else []),
        *(f"Not tried: {training}. The model has nothing for it." for training in dict.fromkeys(untrained)),
        *(
            f"Not tried: {variant}. It works on {words[variant.choice.needs]}, and the model has none."
            for variant in missing
        ),
    )
