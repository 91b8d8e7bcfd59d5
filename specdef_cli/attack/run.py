"""An attack from options to report: resolve, plan, run what is not yet run, report."""

from __future__ import annotations

from specdef_cli.errors import require_extra

require_extra("attack", "attacks")

# ruff: noqa: E402 (what is imported below needs the extra)
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch.utils.data import Subset

from specdef_cli.attack.cluster import Cluster, connected, surroundings
from specdef_cli.attack.data import load_data, load_preprocessor
from specdef_cli.attack.one_run import RunStore
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.plan import (
    SHORTENED,
    Forecast,
    PlannedAttack,
    Series,
    Speed,
    assumptions,
    expected_runs,
    in_order,
    make_plan,
    plan_notes,
    speed_of,
)  # fmt: skip
from specdef_cli.attack.prompts import load_prompts
from specdef_cli.attack.queue import Deadline, executor, run_all
from specdef_cli.attack.results import AttackReport, DataSummary, Hardening, PromptSummary, outcome_notes, report_notes
from specdef_cli.attack.target import Target
from specdef_cli.attack.tasks import task_of_both
from specdef_cli.attack.train import TrainRun, quiet
from specdef_cli.attack.trainer import ProgressHook
from specdef_cli.checkpoint.files import remove_unfinished
from specdef_cli.checkpoint.output import exclusive, require_outside
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.recognise import recognise
from specdef_cli.model.inputs import require_in_vocabulary
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import open_base, open_model, require_sound
from specdef_cli.process import first_completed

RUNS_DIRECTORY = "runs"


@dataclass(frozen=True)
class Prepared:
    """An attack that could begin."""

    options: AttackOptions  # the user's, with the budget that was chosen
    target: Target
    plan: tuple[Series, ...]
    notes: tuple[str, ...]  # what is known before anything is run
    train: TrainRun
    store: RunStore
    began: float  # when its time limit began to run, of the monotonic clock
    cluster: Cluster | None


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
        on_progress: Called as runs start, step and end.
        on_plan: Called with the plan and what it takes before anything of it is run; measuring that takes two steps.
    """
    state = process_state()
    _check_processes(options, state.num_processes)
    with connected(options.dask) as cluster:
        prepared = _prepare(options, cluster)
        expected = None if on_plan is None else _forecast(prepared)
        options, train = prepared.options, prepared.train
        # No process may start the first run while another still looks for its result: they would disagree on what is
        # finished.
        state.wait_for_everyone()
        with exclusive(options.out) if state.is_main_process else nullcontext():
            if state.is_main_process and options.runs is None:  # others may write to runs that are shared
                remove_unfinished(prepared.store.directory)
            if on_plan is not None and expected is not None and state.is_main_process:
                on_plan(expected)
            limit = options.time_limit
            deadline = None if limit is None else Deadline(limit - (time.monotonic() - prepared.began))
            outcome = run_all(
                prepared.plan,
                train,
                load=prepared.store.load,
                save=prepared.store.save if state.is_main_process else lambda result: None,
                jobs=options.jobs,
                cluster=cluster,
                deadline=deadline,
                on_progress=on_progress if on_progress is not None and state.is_main_process else lambda event: None,
            )
    here = surroundings()
    device = here.pop("device")
    manifest, control = prepared.target.manifest, train.control.found.name
    data, prompts = train.data, train.prompts if any(run.behaviour for run in outcome.runs) else None
    firsts = (series.first for series in prepared.plan if series.first.subject == "model")
    plain = {first.label for first in firsts if first.variant.knowledge == "none"}
    report = AttackReport(
        model=str(options.model),
        control=control,
        hardening=None if manifest is None else Hardening.of(manifest),
        data=DataSummary(data.name, len(data.train), len(data.held_out), data.fingerprint),
        runs=outcome.runs,
        assumed=assumptions(options, [run.spec for run in outcome.runs], control, data),
        notes=(),
        versions=here,
        device=device if cluster is None else ", ".join(sorted({*cluster.devices.values()})),
        not_reached=tuple(label for label in outcome.not_reached if label in plain),
        prompts=None
        if prompts is None
        else PromptSummary(prompts.name, prompts.given, len(prompts.asked), prompts.refusals),
    )
    notes = (*prepared.notes, *outcome_notes(options, outcome))
    return replace(report, notes=(*notes, *report_notes(options, prepared.target, report)))


def plan_attack(options: AttackOptions) -> Forecast:
    """The plan of an attack and what it takes on this machine; two steps of the control run, and nothing is kept."""
    with connected(options.dask) as cluster:
        return _forecast(_prepare(options, cluster))


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return bool(process_state().is_main_process)


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


def _prepare(options: AttackOptions, cluster: Cluster | None) -> Prepared:
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise SpecDefError(
                f"ACCELERATE_USE_{engine} is set, and attacks train with DDP or FSDP alone",
                f"Run `unset ACCELERATE_USE_{engine}`, or launch with `accelerate launch --use_fsdp`.",
            )
    began = time.monotonic()
    model = open_model(options)
    control = open_base(model, options.control, "--control", token=options.token, subfolder=options.control_subfolder)
    for each in (model, control):
        require_sound(each)
    task, head = task_of_both(model, control, options.task)
    parameters = sum(math.prod(header.shape) for header in control.checkpoint.tensors.values())
    device = surroundings()["device"] if cluster is None else next(iter(cluster.devices.values()))
    options = options.lowered_for(parameters, device)
    options.require_present()
    for each in (model, control):
        require_outside(options.out, each.directory)
    with quiet():
        preprocessor = load_preprocessor(task, control)
        data = load_data(options, task, preprocessor, head)
        prompts = load_prompts(options, preprocessor) if task == "causal-lm" else None
    config = control.skeleton.config
    if task != "image-classification":
        tokens = (half[index]["input_ids"] for half in data.halves for index in range(len(half)))
        require_in_vocabulary(tokens, config, control.directory)
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
    plan = make_plan(options, target)
    if options.suite is None and task.endswith("-lm"):  # a suite leaves out what does not apply; classes get a head
        for training in dict.fromkeys(series.first.training for series in plan if not series.first.is_edit):
            with quiet():
                training.rehearse(target)
    if prompts is not None and any(series.first.prompts for series in plan):
        require_in_vocabulary(prompts.tokens, config, control.directory)
        prompts.require_within(getattr(config.get_text_config(), "max_position_embeddings", None))
    tasks = options.eval_task_path and options.eval_task_path.absolute()
    # Workers may be in another directory, and the token is no business of theirs.
    sent = replace(options, out=options.out.absolute(), eval_task_path=tasks, token=None)
    train = TrainRun(control.here(), model.here(), data, sent, prompts)
    if cluster is not None:
        directories = [each.directory for each in (train.control, train.model) if each.found.commit is None]
        cluster.require(*directories, *([tasks] if tasks else []))
    store = RunStore(options.runs or options.out / RUNS_DIRECTORY)
    return Prepared(options, target, plan, plan_notes(options, target), train, store, began, cluster)


TWO_STEPS: Any = {"steps": 2, "eval_every": 1, "warmup_steps": 0, "eval_tasks": ()}


def _speed(prepared: Prepared) -> Speed:
    """From a run of the control that is there already, else from two steps of it, each followed by an evaluation; the
    first pair warms caches up.
    """
    train = prepared.train
    control = next((series for series in prepared.plan if not series.first.is_edit), None)
    if control is None:
        return Speed(0.0, 0.0)
    for spec in control.runs(control.grid, control.seeds):
        finished = prepared.store.load(spec)
        if finished is not None and len(finished.evaluations) > 1:
            return speed_of(finished, train.data.evaluated)
    count = min(control.first.batch_size, len(train.data.held_out))
    few = replace(train.data, held_out=Subset(train.data.held_out, range(count)), retained=None)  # type: ignore[arg-type]
    began = time.perf_counter()
    two_steps = replace(train, data=few, options=replace(train.options, report_to=()))
    with executor(two_steps, 1, lambda *event, **more: None, prepared.cluster) as submit:  # where the others will be
        future = submit(replace(control.first, **TWO_STEPS), None)
        first_completed({future})
        result = future.result()
    load = time.perf_counter() - began - result.seconds
    return Speed(max(load, 0.0), speed_of(result, count).token)


def _forecast(prepared: Prepared) -> Forecast:
    """Estimate the time of each series."""
    options, data, speed = prepared.options, prepared.train.data, _speed(prepared)
    jobs = options.jobs if prepared.cluster is None else prepared.cluster.places()
    attacks = []
    for series in in_order(prepared.plan):
        grid = series.runs(series.grid, series.seeds[:1] if series.search else series.seeds)
        finished = sum(prepared.store.load(spec) is not None for spec in grid)
        missing = max(expected_runs(series) - finished, 0) * (SHORTENED if series.hurried else 1.0)
        seconds = missing * speed.run(series.first, data.evaluated) / jobs
        attacks.append(
            PlannedAttack(series.first.label, series.grid, expected_runs(series), finished, series.search, seconds)
        )
    grids = [spec for series in prepared.plan for spec in series.runs(series.grid, series.seeds[:1])]
    control = prepared.train.control.found.name
    return Forecast(
        model=str(options.model),
        control=control,
        data=data.name,
        budget=options.in_words,
        attacks=tuple(attacks),
        assumed=assumptions(options, grids, control, data),
        notes=prepared.notes,
        seconds=sum(attack.seconds for attack in attacks),
        time_limit=options.time_limit,
    )
