"""An attack from options to report: resolve, plan, run what is not yet run, report."""

from __future__ import annotations

from specdef_cli.attack.train import TrainRun
from specdef_cli.errors import require_extra

require_extra("attack", "attacks")

# ruff: noqa: E402 (what is imported below needs the extra)
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedTokenizerBase

from specdef_cli.attack.cluster import Cluster, connected, surroundings
from specdef_cli.attack.data import load_data, load_preprocessor, retained_sequences
from specdef_cli.attack.data.forms import AttackData
from specdef_cli.attack.one_run import RunResult, RunSpec, RunStore
from specdef_cli.attack.options import AttackOptions, require_trackers
from specdef_cli.attack.plan import (
    Forecast,
    Series,
    Speed,
    default_budget,
    foresee,
    in_order,
    make_plan,
    measure_speed,
    speed_of,
)
from specdef_cli.attack.prompts import Prompts, load_prompts
from specdef_cli.attack.queue import Deadline, executor, run_all
from specdef_cli.attack.results import (
    AttackReport,
    DataSummary,
    Hardening,
    PromptSummary,
    assumptions,
    outcome_notes,
    plan_notes,
    report_notes,
)
from specdef_cli.attack.target import Target, largest_alpha, task_of
from specdef_cli.attack.train import quiet, require_harness
from specdef_cli.attack.trainer import NOWHERE, Memory, ProgressHook, Tracking
from specdef_cli.checkpoint.manifest import Manifest
from specdef_cli.checkpoint.output import exclusive, require_outside, writable_ancestor
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.recognise import recognise
from specdef_cli.model.inputs import require_in_vocabulary
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import OpenedModel, open_base, open_model, require_sound
from specdef_cli.process import first_completed

RUNS_DIRECTORY, LOGS_DIRECTORY = "runs", "logs"


def attack(
    options: AttackOptions,
    *,
    on_progress: ProgressHook | None = None,
    on_plan: Callable[[Forecast], None] | None = None,
) -> AttackReport:
    """Fine-tune a model and its control by every run of the plan, and report how far each got.

    Finished runs are kept in ``options.out/runs``; a run that is found there is not run again. Under ``accelerate
    launch`` every process calls this and gets the report; only the main one writes and reports progress.

    Args:
        options: What to run.
        on_progress: Called as runs start, step and end.
        on_plan: Called with the plan and what it takes before anything of it is run; measuring that takes two steps.
    """
    _check_processes(options, process_state().num_processes)
    with connected(options.dask) as cluster:
        return _attack(_prepare(options, cluster), on_progress, on_plan)


def _attack(
    prepared: _Prepared, on_progress: ProgressHook | None, on_plan: Callable[[Forecast], None] | None
) -> AttackReport:
    state, cluster = process_state(), prepared.cluster
    options, plan, data = prepared.options, prepared.plan, prepared.data
    forecast = None if on_plan is None else _forecast(prepared)
    # No process may start the first run while another still looks for its result: they would disagree on what is
    # finished.
    state.wait_for_everyone()
    with exclusive(options.out) if state.is_main_process else nullcontext():
        if state.is_main_process and options.runs is None:  # others may write to runs that are shared
            prepared.store.remove_unfinished()
        if on_plan is not None and forecast is not None and state.is_main_process:
            on_plan(forecast)
        outcome = run_all(
            plan,
            prepared.train,
            load=prepared.store.load,
            save=prepared.store.save if state.is_main_process else lambda result: None,
            jobs=options.jobs,
            cluster=cluster,
            order=in_order(plan),
            deadline=None if options.time_limit is None else Deadline(prepared.time_left()),
            on_progress=on_progress if on_progress is not None and state.is_main_process else lambda event: None,
        )
    here = surroundings()
    device = here.pop("device")
    firsts = [series.first for series in plan if series.first.subject == "model"]
    plain = [first.label for first in firsts if first.variant.knowledge == "none"]
    report = AttackReport(
        model=str(options.model),
        control=prepared.control_name,
        hardening=_hardening(prepared.target.manifest),
        data=DataSummary(data.name, len(data.train), len(data.held_out), data.fingerprint),
        runs=outcome.runs,
        assumed=assumptions(options, [run.spec for run in outcome.runs], prepared.control_name, data),
        notes=(),
        versions=here,
        device=device if cluster is None else ", ".join(sorted({*cluster.devices.values()})),
        not_reached=tuple(label for label in outcome.not_reached if label in plain),
        prompts=_prompts(prepared.train.prompts) if any(run.behaviour for run in outcome.runs) else None,
    )
    notes = (*plan_notes(options, prepared.target), *outcome_notes(options, outcome))
    return replace(report, notes=(*notes, *report_notes(options, prepared.target, report)))


def _prompts(prompts: Prompts | None) -> PromptSummary | None:
    if prompts is None:
        return None
    return PromptSummary(prompts.name, prompts.given, len(prompts.asked), prompts.refusals)


def _check_processes(options: AttackOptions, processes: int) -> None:
    flag = f"--jobs {options.jobs}" if options.dask is None else f"--dask {options.dask}"
    if (options.jobs > 1 or options.dask is not None) and processes > 1:
        raise SpecDefError(
            f"{flag} starts runs in other processes, and this is one of {processes} already",
            f"Use either {flag.split()[0]} or `accelerate launch`.",
        )
    if options.time_limit is not None and processes > 1:
        raise SpecDefError(
            f"--time-limit is measured by every process, and {processes} of them would not agree",
            "Leave it out under `accelerate launch`, and give --steps.",
        )


def _check_engine() -> None:
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise SpecDefError(
                f"ACCELERATE_USE_{engine} is set, and attacks train with DDP or FSDP alone",
                f"Run `unset ACCELERATE_USE_{engine}`, or launch with `accelerate launch --use_fsdp`.",
            )


def plan_attack(options: AttackOptions) -> Forecast:
    """The plan of an attack and what it takes on this machine; two steps of the control run, and nothing is kept."""
    with connected(options.dask) as cluster:
        return _forecast(_prepare(options, cluster))


@dataclass(frozen=True)
class _Prepared:
    """An attack that could begin."""

    options: AttackOptions  # the user's, with the budget that was chosen
    control_name: str
    target: Target
    data: AttackData
    plan: tuple[Series, ...]
    train: TrainRun
    store: RunStore
    began: float  # when its time limit began to run, of the monotonic clock
    cluster: Cluster | None = None

    @property
    def held_out(self) -> int:
        """Sequences that every evaluation takes."""
        return len(self.data.held_out) + (len(self.data.retained) if self.data.retained is not None else 0)

    def time_left(self) -> float:
        """Seconds of the time limit."""
        return (self.options.time_limit or 0.0) - (time.monotonic() - self.began)


def _prepare(options: AttackOptions, cluster: Cluster | None) -> _Prepared:
    _check_engine()
    began = time.monotonic()
    writable_ancestor(options.out)
    model = open_model(options)
    control = open_base(model, options.control, "--control", token=options.token, subfolder=options.control_subfolder)
    for each in (model, control):
        require_sound(each)
        require_outside(options.out, each.directory)
    task, head = task_of(control.checkpoint.config, control.directory, options.task)
    _require_comparable(model, control)
    require_trackers(options.report_to)
    if options.eval_tasks:
        require_harness()
    sizes = (math.prod(header.shape) for header in control.checkpoint.tensors.values())
    device = surroundings()["device"] if cluster is None else next(iter(cluster.devices.values()))
    options = default_budget(options, sum(sizes), device)
    prompts: Prompts | None = None
    with quiet():
        preprocessor = load_preprocessor(task, control)
        data = load_data(options, task, preprocessor, head)
        if task == "causal-lm" and isinstance(preprocessor, PreTrainedTokenizerBase):
            data = replace(data, retained=retained_sequences(options, preprocessor))
            prompts = load_prompts(options, preprocessor)
    if task != "image-classification":
        tokens = (half[index]["input_ids"] for half in data.halves for index in range(len(half)))
        require_in_vocabulary(tokens, control.skeleton.config, control.directory)
    target = Target(
        manifest=model.manifest,
        task=task,
        data=data.fingerprint,
        control=control.fingerprint,
        model=model.fingerprint,
        recognised=recognise(model.checkpoint, model.skeleton),
        control_model=lambda: control.skeleton.model,
        prompts=prompts.fingerprint if prompts is not None else "",
        asked=options.prompts is not None,
        chat=bool(getattr(preprocessor, "chat_template", None)),
    )
    train = TrainRun(
        control.here(),
        model.here(),
        data,
        Memory(options.gradient_accumulation, options.gradient_checkpointing),
        options.eval_task_path and options.eval_task_path.absolute(),
        Tracking(options.report_to, (options.out / LOGS_DIRECTORY).absolute()),
        prompts,
    )
    store = RunStore(options.runs or options.out / RUNS_DIRECTORY)
    if cluster is not None:
        directories = [each.directory for each in (train.control, train.model) if each.found.commit is None]
        cluster.require(*directories, *([train.eval_task_path] if train.eval_task_path else []))
    plan = make_plan(options, target)
    return _Prepared(options, control.found.name, target, data, plan, train, store, began, cluster)


def _measured(prepared: _Prepared) -> Speed:
    """From a run of the control that is there already, else from two steps of it."""
    control = next((series for series in prepared.plan if not series.first.is_edit), None)
    if control is None:
        return Speed(0.0, 0.0)
    for spec in control.runs(control.grid, control.seeds):
        finished = prepared.store.load(spec)
        if finished is not None and len(finished.evaluations) > 1:
            return speed_of(finished, prepared.held_out)

    def train(spec: RunSpec, data: AttackData) -> RunResult:
        few = replace(prepared.train, data=data, tracking=NOWHERE)
        with executor(few, 1, lambda *event, **more: None, prepared.cluster) as submit:
            future = submit(spec, None)
            first_completed({future})
            return future.result()

    return measure_speed(control.first, prepared.data, train)


def _forecast(prepared: _Prepared) -> Forecast:
    options, data = prepared.options, prepared.data
    jobs = options.jobs if prepared.cluster is None else prepared.cluster.places()
    attacks = foresee(prepared.plan, jobs, _measured(prepared), prepared.held_out, prepared.store.load)
    grids = [spec for series in prepared.plan for spec in series.runs(series.grid, series.seeds[:1])]
    return Forecast(
        model=str(options.model),
        control=prepared.control_name,
        data=data.name,
        budget=options.in_words,
        attacks=attacks,
        assumed=assumptions(options, grids, prepared.control_name, data),
        notes=plan_notes(options, prepared.target),
        seconds=sum(attack.seconds for attack in attacks),
        time_limit=options.time_limit,
    )


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return bool(process_state().is_main_process)


def _require_comparable(model: OpenedModel, control: OpenedModel) -> None:
    """Refuse a control that is trained for something else, before it is trained: the model would not load as that."""
    first, second = ((each.checkpoint.config.get("architectures") or [""])[0] for each in (model, control))
    try:
        tasks = [task_of(each.checkpoint.config, each.directory, None)[0] for each in (model, control)]
    except SpecDefError:  # one of them says nothing of a task, and --task decides
        return
    if first != second and tasks[0] != tasks[1]:
        raise SpecDefError(
            f"{model.found.name} is a {first} and its control {control.directory.name} a {second}: nothing trains both "
            "alike",
            "Name what it was made from with --control.",
        )


def _hardening(manifest: Manifest | None) -> Hardening | None:
    if manifest is None:
        return None
    first = manifest.factored[0] if manifest.factored else None
    return Hardening(
        method=manifest.method,
        alpha=largest_alpha(manifest),
        top_k=first.top_k if first else None,
        gauge=first.gauge if first else None,
        factored=len(manifest.factored),
        folded=len(manifest.folded),
        scaled=len(manifest.scaled),
    )
