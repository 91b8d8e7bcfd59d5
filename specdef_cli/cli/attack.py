"""``specdef attack``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from specdef_cli.attack.budget import Budget, Dtype, Schedule
from specdef_cli.attack.target import Task
from specdef_cli.cli.options import Json, Quiet, Revision, Token, TrustRemoteCode
from specdef_cli.cli.output import Output
from specdef_cli.cli.run_progress import RunProgress
from specdef_cli.cli.startup import work_alone_if_stale

DEFAULTS = Budget()


def attack_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or Hub id of the model under attack.")] = (
        "hardened"
    ),
    control: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="The undefended model; trained on the same budget.", show_default="the manifest's base"
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Hub id, file (JSONL, CSV, text, Parquet, …) or directory.",
            show_default="prose that Python ships with",
        ),
    ] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    dataset_split: Annotated[str | None, typer.Option(help="Split of the dataset.", show_default="train")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the text.", show_default="messages, prompt, instruction or text")
    ] = None,
    label_column: Annotated[str, typer.Option(help="Column with the label (classification).")] = "label",
    image_column: Annotated[str, typer.Option(help="Column with the image.")] = "image",
    retained: Annotated[
        str | None,
        typer.Option(
            help="Text on which the model's ability is watched, as --dataset; none leaves it out.",
            show_default="Python's standard library",
        ),
    ] = None,
    eval_task: Annotated[
        list[str] | None,
        typer.Option(help="Task of lm-eval to measure accuracy on after every run (repeatable; needs the extra eval)."),
    ] = None,
    eval_task_path: Annotated[Path | None, typer.Option(help="Directory with lm-eval tasks of your own.")] = None,
    task: Annotated[
        Task | None,
        typer.Option(help="What to train for.", show_default="what the control's architecture says"),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="A set of attacks: quick, standard, full, or a TOML file like theirs.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="What is done to the model first, e.g. width:2 or freeze-compensation (repeatable)."),
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option(
            "--training",
            "--recipe",
            help="What is trained, e.g. full@*norm* or lora:16@q_proj,v_proj (repeatable).",
            show_default="full and lora",
        ),
    ] = None,
    lora_targets: Annotated[
        list[str] | None, typer.Option(help="Modules that get adapters (repeatable).", show_default="all linears")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters.", show_default="16")] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help="Optimizer, e.g. adamw or sgd (repeatable).", show_default="adamw")
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option("--lr", help="Learning rate (repeatable).", show_default="decades down to below η₀/α"),
    ] = None,
    lr_sweep: Annotated[
        bool, typer.Option("--lr-sweep", help="Search every attack's best learning rate until it is bracketed.")
    ] = False,
    schedule: Annotated[Schedule, typer.Option(help="Course of the rate.")] = DEFAULTS.schedule,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = DEFAULTS.warmup_steps,
    max_grad_norm: Annotated[float, typer.Option(help="Gradient clipping; 0 turns it off.")] = DEFAULTS.max_grad_norm,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = DEFAULTS.weight_decay,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of every run.", show_default=f"{DEFAULTS.steps}, fewer for a large model"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences a step.", show_default=f"{DEFAULTS.batch_size}")
    ] = None,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Passes that a step's sequences are split into, to save memory.")
    ] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice, to save memory.")
    ] = False,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a sequence.", show_default=f"{DEFAULTS.sequence_length}")
    ] = None,
    stop_at_divergence: Annotated[
        bool,
        typer.Option(
            "--stop-at-divergence/--no-stop-at-divergence",
            help="End a run where its held-out loss passes twice the start; some come back after thousands of steps.",
        ),
    ] = DEFAULTS.stop_at_divergence,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations.", show_default="a tenth of the steps")
    ] = None,
    eval_sequences: Annotated[int | None, typer.Option(help="Held-out sequences.", show_default="64")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each attack, with seeds 0, 1, …", show_default="1")] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="45m",
            help="Choose a budget with which a verdict stands within this time, run the most telling attacks first, "
            "and stop then.",
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="Report runs to tensorboard (files in OUT/logs), wandb, trackio or mlflow (repeatable)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and how long it takes on this machine, and stop.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time, each on a GPU of its own.")] = 1,
    expand: Annotated[
        str | None, typer.Option(metavar="2x", help="Attack also a model whose hardened layers grew this much.")
    ] = None,
    expansion: Annotated[
        list[str] | None,
        typer.Option(
            help="width: a parallel path. depth: the paper's Theorem 8. inject: an identity layer (repeatable).",
            show_default="width, with --expand",
        ),
    ] = None,
    freeze_compensation: Annotated[
        bool, typer.Option("--freeze-compensation", help="Attack also with the compensation frozen.")
    ] = False,
    channel_rates: Annotated[
        bool, typer.Option("--channel-rates", help="Attack also with a learning rate for every row and column.")
    ] = False,
    collapse: Annotated[
        bool, typer.Option("--collapse", help="Attack the collapsed model with every recipe, not only the first.")
    ] = False,
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="The same for the rebalanced model: what undoes a fold.")
    ] = False,
    train: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Train only these parameters (repeatable).")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype of training.")] = DEFAULTS.dtype,
    out: Annotated[Path, typer.Option("--out", "-o", help="Runs and report; finished runs found there are kept.")] = (
        Path("attack")
    ),
    runs: Annotated[
        Path | None,
        typer.Option(help="Keep finished runs here, to share the control's between reports.", show_default="OUT/runs"),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with 1 if any attack on the model meets this, e.g. 'steps_to_control<500' (repeatable).",
        ),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every run, and not one line an attack.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a hardened model and its base on one budget, and report how far each attack got.

    Attacks that know the construction are always among them. Runs that are found finished in --out are not repeated.

    Examples:

      specdef attack --expand 2x

      specdef attack hardened --dry-run

      specdef attack hardened --time-limit 45m

      specdef attack hardened --suite standard --jobs 4

      specdef attack hardened --control ./base --dataset notes.jsonl --recipe lora --lr 1e-4 --lr 1e-5 --steps 200
    """
    arguments = locals()
    from specdef_cli.extras import require_extra

    require_extra("attack", "attacks")
    from specdef_cli.attack.presence import require_data, require_models
    from specdef_cli.durations import parse_duration

    # Before torch is imported, which takes longer than everything that can be wrong here.
    limit = parse_duration(time_limit, "--time-limit") if time_limit is not None else None
    require_models(model, control, "--control")
    require_data(dataset)
    from rich.console import Group

    from specdef_cli.attack import AttackOptions, Forecast, attack, is_main_process, plan_attack
    from specdef_cli.attack.spellings import trainings_of, variants_of
    from specdef_cli.attack.suite import BUDGET, load_suite, suite_names
    from specdef_cli.cli.plan import plan_screen
    from specdef_cli.report import attacks_table, report_dict, runs_table, summary, write_report
    from specdef_cli.report.conditions import Condition

    output = Output(as_json, quiet)
    work_alone_if_stale(output)
    conditions = [Condition.parse(text) for text in fail_if or []]
    flags = {
        "collapse": collapse, "rebalance": rebalance, "channel-rates": channel_rates,
        "freeze-compensation": freeze_compensation,
    }  # fmt: skip
    named = [name for name, wanted in flags.items() if wanted]
    if limit is not None and not any(
        (suite, variant, training, optimizer, lr, lr_sweep, named, expand, expansion, train)
    ):
        suite = "quick"  # what walks through where anything does, and what everybody tries
    chosen = load_suite(suite) if suite is not None else None
    given = {name: arguments[name] for name in BUDGET}
    budget: dict[str, Any] = {**(chosen.budget if chosen else {}), **{k: v for k, v in given.items() if v is not None}}
    if "seeds" in budget:
        budget["seeds"] = tuple(range(budget["seeds"]))
    # What the user gave stays: by a flag, or in a suite of the user's own.
    kept = given if chosen is None or suite in suite_names() or limit is not None else budget
    free = tuple(name for name in BUDGET if name != "seeds" and kept.get(name) is None)
    lr_sweep = lr_sweep or (limit is not None and chosen is None and not lr)
    fields = {field.name for field in dataclasses.fields(AttackOptions)}
    alike = {name: value for name, value in arguments.items() if name in fields and value is not None}
    called_otherwise = {
        "suite": chosen,
        "variants": variants_of(variant or (), expand=expand, expansions=expansion or (), flags=named),
        "trainings": trainings_of(training or (), globs=train or (), targets=lora_targets or (), rank=lora_rank),
        "optimizers": tuple(optimizer or ()),
        "learning_rates": tuple(lr or ()),
        "search": lr_sweep,
        "eval_tasks": tuple(eval_task or ()),
        "report_to": tuple(report_to or ()),
        "free": free,
        "time_limit": limit,
    }
    options = AttackOptions(**alike | called_otherwise | budget)
    if dry_run:
        forecast = plan_attack(options)
        output.data(forecast, plan_screen(forecast))
        return
    planned: set[str] = set()

    def show_plan(forecast: Forecast) -> None:
        planned.update((*forecast.assumed, *forecast.notes))
        output.show(plan_screen(forecast))

    with output.progress("attacking") as bar:
        report = attack(options, on_progress=RunProgress(bar).show, on_plan=None if quiet else show_plan)
    written = write_report(report, out)
    if not is_main_process():
        return
    for text in report.assumed:
        if text not in planned:
            output.note(f"assumed: {text}")
    for text in report.notes:
        if text not in planned:
            output.note(f"note: {text}")
    verdict, *sentences = summary(report)
    table = runs_table(report) if verbose else attacks_table(report)
    output.data(report_dict(report), Group(verdict, table, *sentences), written=written[0])
    output.note(f"report: {written[0]}")
    met = [(condition, finding) for condition in conditions for finding in condition.met_by(report)]
    for condition, finding in met:
        output.note(f"failed: {finding.attack.label} meets {condition.text}")
    if met:
        raise typer.Exit(1)
