"""What an attack says besides its figures: beforehand a plan with its time, in the report what to know to read it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Subset

from specdef_cli.attack.data.examples import AttackData
from specdef_cli.attack.optimizers.table import OPTIMIZERS
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.plan import Series, expected_runs, in_order
from specdef_cli.attack.prompts import BUILTIN_NAME
from specdef_cli.attack.queue import Outcome
from specdef_cli.attack.results import AttackReport
from specdef_cli.attack.run_result import RunResult
from specdef_cli.attack.spec import RunSpec
from specdef_cli.attack.target import Target
from specdef_cli.attack.variants.table import Variant
from specdef_cli.parse import in_words

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


def measure_speed(first: RunSpec, data: AttackData, train: Callable[[RunSpec, AttackData], RunResult]) -> Speed:
    """Train the control for two steps, each followed by an evaluation; the first pair warms caches up."""
    count = min(first.batch_size, len(data.held_out))
    few = replace(data, held_out=Subset(data.held_out, range(count)), retained=None)  # type: ignore[arg-type]
    began = time.perf_counter()
    result = train(replace(first, steps=2, eval_every=1, warmup_steps=0, eval_tasks=()), few)
    load = time.perf_counter() - began - result.seconds
    return Speed(max(load, 0.0), speed_of(result, count).token)


def speed_of(finished: RunResult, held_out: int) -> Speed:
    """What the last steps of a run with evaluations of ``held_out`` sequences tell; nothing of loading."""
    before, last = finished.evaluations[-2:]
    trained = (last.step - before.step) * finished.spec.batch_size
    tokens = finished.spec.sequence_length * (trained + FORWARD_SHARE * held_out)
    return Speed(0.0, (last.seconds - before.seconds) / tokens)


@dataclass(frozen=True)
class PlannedAttack:
    """One series of a plan."""

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


def foresee(
    plan: Sequence[Series], jobs: int, speed: Speed, held_out: int, load: Callable[[RunSpec], object]
) -> tuple[PlannedAttack, ...]:
    """What each series of a plan takes; ``load`` finds a finished run, or ``None``."""
    attacks = []
    for series in in_order(plan):
        grid = series.runs(series.grid, series.seeds[:1] if series.search else series.seeds)
        finished = sum(load(spec) is not None for spec in grid)
        missing = max(expected_runs(series) - finished, 0) * (SHORTENED if series.hurried else 1.0)
        seconds = missing * speed.run(series.first, held_out) / jobs
        attacks.append(
            PlannedAttack(series.first.label, series.grid, expected_runs(series), finished, series.search, seconds)
        )
    return tuple(attacks)


SAME_START = 0.01
"""Starting losses that differ by more than this share are worth a warning."""


def assumptions(options: AttackOptions, specs: Sequence[RunSpec], control: str, data: AttackData) -> tuple[str, ...]:
    """What the user left open and was chosen."""
    said = []
    if options.control is None:
        said.append(f"Control: {control}, the base named in the manifest.")
    if options.dataset is None:
        said.append(f"Data: {data.name}.")
    said += data.remarks
    trained = [spec for spec in specs if not spec.is_edit]
    if len(trained) < len(specs) and options.prompts is None:
        said.append(f"Prompts that edits tell apart: {BUILTIN_NAME}.")
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
        return f"searched for every attack, between {rates[0]:g} and {rates[-1]:g}"
    span = f"{usual[0]:g} to {usual[-1]:g}"
    return f"{span}; the hardened model down to {rates[-1]:g}, below η₀/α" if rates[-1] < usual[-1] else span


def plan_notes(options: AttackOptions, target: Target) -> tuple[str, ...]:
    """What is known before anything is run: how the model was made, and what it has nothing for."""
    return (*_origin(target), *_not_tried(options, target))


def _origin(target: Target) -> list[str]:
    """How the model was made, where no manifest says so."""
    if target.manifest is not None:
        return []
    found = target.recognised.sentence or "Nothing in the weights shows that this package hardened it."
    return [f"The model comes without a manifest. {found}"]


def _not_tried(options: AttackOptions, target: Target) -> list[str]:
    """What the user asked for and this model has nothing for."""
    asked = dict.fromkeys(variant for variant in options.variants if isinstance(variant, Variant))
    missing = [variant for variant in asked if not variant.applies_to(target.constructions)]
    untrained = [training for table in options.tables for training in table.trainings if not training.on(target)]
    words = {"factored": "a layer stored as factors", "folded": "a folded pair", "any": "nothing"}
    return [
        *(f"Not tried: {training}. The model has nothing for it." for training in dict.fromkeys(untrained)),
        *(
            f"Not tried: {variant}. It works on {words[variant.choice.needs]}, and the model has none."
            for variant in missing
        ),
    ]


def outcome_notes(options: AttackOptions, outcome: Outcome) -> tuple[str, ...]:
    """What was left out, or kept from being run by the time limit."""
    said = [f"Not tried: {label}: {reason}." for label, reason in outcome.left_out]
    if outcome.not_reached:
        said.append(f"Not reached within {in_words(options.time_limit or 0)}: {'; '.join(outcome.not_reached)}.")
    if outcome.cut_short:
        said.append(
            f"Cut short by the time limit, so that better learning rates may exist: {'; '.join(outcome.cut_short)}."
        )
    if outcome.coarse:
        said.append(f"Best learning rate known to a decade only, for want of time: {'; '.join(outcome.coarse)}.")
    return tuple(said)


def report_notes(options: AttackOptions, target: Target, report: AttackReport) -> tuple[str, ...]:
    """What must be known to read the figures of a report."""
    notes = []
    if len(options.seeds) == 1:
        notes.append("One seed: differences of a few thousandths of a nat are noise.")
    if options.dtype not in ("float32", "mixed"):  # of mixed, the parameters are float32
        notes.append(
            f"Trained in {options.dtype}: small learning rates may round to no change, which flatters a defence. "
            "Train in float32 to be sure."
        )
    if options.learning_rates and target.alpha > 1:
        hidden = max(options.learning_rates) / target.alpha
        if min(options.learning_rates) > hidden:
            notes.append(
                f"The learning rates given do not reach below η₀/α = {hidden:.0e}, where Adam trains a hardened model "
                "again. The attacks without knowledge may look weaker than they are."
            )
    if any(run.start is None and not run.spec.is_edit for run in report.runs):
        notes.append("At least one model was broken before training: its held-out loss at step 0 is not finite.")
    notes += _given_up(report)
    notes += _other_start(report)
    for attack in report.attacks:
        edge = report.at_edge(attack)
        if edge is not None:
            notes.append(
                f"{attack.label} did best at the {edge} learning rate tried ({attack.best_learning_rate:g}); "
                "its true best may lie beyond."
            )
    return tuple(notes)


def _given_up(report: AttackReport) -> list[str]:
    """Which attacks have runs that were given up although they could have gone on."""
    cut = {}
    for attack in report.attacks:
        rates = [run.spec.learning_rate for run in attack.runs if run.cut]
        if attack.subject == "model" and rates:
            cut[attack.label] = min(rates)
    if not cut:
        return []
    told = "; ".join(f"{label} from {rate:g} on" for label, rate in cut.items())
    return [
        f"Given up where the held-out loss passed twice its start: {told}. A run may come back after thousands of "
        "steps: --no-stop-at-divergence lets it go on."
    ]


def _other_start(report: AttackReport) -> list[str]:
    """Hardening keeps the function, so every run starts at the control's loss, unless the attack itself breaks it."""
    others = []
    for attack in report.attacks:
        control = report.control_of(attack)
        start, expected = attack.best_run.start, control.best_run.start if control else None
        if start is not None and expected is not None and abs(start - expected) > SAME_START * expected:
            others.append(f"{attack.label} at {start:.3f} (its control at {expected:.3f})")
    if not others:
        return []
    return [
        f"Other held-out losses before training than the control's: {'; '.join(others)}. Either the control is not the "
        "model that was hardened, or hardening changed its function, or what the attack does to the weights (4 bits, "
        "some adapters) does not get along with scaled ones. Progress counts from the control's start."
    ]
