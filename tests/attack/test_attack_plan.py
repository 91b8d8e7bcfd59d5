"""The plan, the identity of runs, suites as files, and what options refuse: nothing here loads a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from specdef_cli import AttackOptions
from specdef_cli.attack.one_run import RunSpec
from specdef_cli.attack.options import load_suite, require_trackers, suite_names
from specdef_cli.attack.plan import Series, default_learning_rates, make_plan, plan_notes
from specdef_cli.attack.queue import visible_devices
from specdef_cli.attack.target import Target
from specdef_cli.attack.trainings import TRAININGS, Training
from specdef_cli.attack.variants import VARIANTS, Variant, informed_variants
from specdef_cli.checkpoint.changes import FactoredLayer, FoldedPair, ScaledSlice
from specdef_cli.checkpoint.manifest import FORMAT_VERSION, BaseCheckpoint, Manifest
from specdef_cli.checkpoint.resolve import Resolved
from specdef_cli.cli.app import app
from specdef_cli.errors import SpecDefError, WrongUsage
from specdef_cli.hardening.recognise import Recognised
from specdef_cli.model.opened import OpenedModel
from tests.commands import refusal

LAYER = FactoredLayer("a", "a.weight", 4, 4, None, False, 1e4, 1, "rotated", (1.0,), 0.0)
FACTORS = Manifest(FORMAT_VERSION, "0", "factors", BaseCheckpoint("base"), "float32", 0, factored=(LAYER,))
FOLD = Manifest(
    FORMAT_VERSION, "0", "fold", BaseCheckpoint("base"), "float32", 0, "staircase",
    folded=(FoldedPair("p", "up_down", (0,), (-20,), (ScaledSlice("t", 0, None, (0,), (-20,)),)),),
)  # fmt: skip


def control_model(layers: int = 2) -> LlamaForCausalLM:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))


def target(manifest: Manifest | None) -> Target:
    return Target(manifest, "causal-lm", "d", "c", "m", Recognised(), control_model)


def series(manifest: Manifest | None = FACTORS, **options: Any) -> tuple[Series, ...]:
    made = AttackOptions(model="m", out=Path("o"), **options)
    return make_plan(made, target(manifest))


def plan(manifest: Manifest | None = FACTORS, **options: Any) -> tuple[RunSpec, ...]:
    """The runs that are certain from the beginning."""
    return tuple(run for attack in series(manifest, **options) for run in attack.runs(attack.grid, attack.seeds))


@pytest.mark.parametrize(
    ("optimizer", "alpha", "largest", "smallest", "count"),
    [
        ("adamw", 1.0, 1e-2, 1e-5, 4),
        ("adamw", 1e4, 1e-2, 1e-7, 6),  # η₀/α = 1e-6, and one decade below
        ("adamw", 8192.0, 1e-2, 1e-7, 6),
        ("adamw", 1e9, 1e-2, 1e-12, 11),
        ("adamw", 2.0**60, 1e-2, 1e-22, 11),  # every second decade
        ("sgd", 1e4, 1.0, 1e-9, 10),  # η₀/α²
    ],
)
def test_the_sweep_goes_on_below_the_hidden_rate(
    optimizer: str, alpha: float, largest: float, smallest: float, count: int
) -> None:
    rates = default_learning_rates(optimizer, alpha)
    assert (rates[0], rates[-1], len(rates)) == (largest, smallest, count)
    assert list(rates) == sorted(set(rates), reverse=True)


@given(st.floats(1.0, 1e30), st.sampled_from(["adamw", "sgd"]))
def test_every_sweep_is_short_and_reaches_below(alpha: float, optimizer: str) -> None:
    rates = default_learning_rates(optimizer, alpha)
    assert len(rates) <= 13
    assert alpha == 1.0 or rates[-1] <= rates[0] / alpha


def test_default_plan() -> None:
    runs = plan(variants=("width:2",), search=False)
    kinds = [(run.subject, run.variant.kind, run.training.method) for run in runs]
    assert list(dict.fromkeys(kinds)) == [
        ("control", "plain", "full"),
        ("control", "plain", "lora"),
        ("model", "plain", "full"),
        ("model", "plain", "lora"),
        ("model", "collapse", "full"),
        ("model", "width", "full"),
    ]
    assert len(runs) == 4 + 4 + 6 + 6 + 4 + 4
    budgets = {(run.steps, run.batch_size, run.sequence_length, run.data, run.eval_every) for run in runs}
    assert len(budgets) == 1
    assert min(run.learning_rate for run in runs if run.subject == "model") < 1e-2 / LAYER.alpha


@pytest.mark.parametrize(
    "options", [{}, {"trainings": ("lora",)}, {"trainings": ("full@*.norm.*",)}, {"learning_rates": (1e-4,)}]
)
def test_collapse_always_has_its_row(options: dict[str, Any]) -> None:
    assert any(run.variant.kind == "collapse" for run in plan(**options))


def test_rates_given_hold_for_all() -> None:
    runs = plan(learning_rates=(1e-4, 3e-6, 1e-4), seeds=(0, 1), variants=("depth:3", "collapse"))
    assert len(runs) == len(set(runs)), "each once"
    groups: dict[Any, set[Any]] = {}
    for run in runs:
        groups.setdefault((run.subject, run.variant, run.training.method), set()).add((run.learning_rate, run.seed))
    assert len(groups) == 7
    assert all(group == {(1e-4, 0), (1e-4, 1), (3e-6, 0), (3e-6, 1)} for group in groups.values())


def test_a_fold_is_swept_by_its_exponents_and_always_rebalanced() -> None:
    runs = plan(FOLD)
    assert {run.variant.kind for run in runs} == {"plain", "rebalance"}
    assert min(run.learning_rate for run in runs) < 1e-2 / 2**20


def test_every_attack_of_a_suite_has_a_control_on_the_same_budget() -> None:
    assert suite_names() == ("full", "quick", "standard")
    for name in suite_names():
        found = series(suite=load_suite(name), steps=7)
        controls = {attack.first.attack for attack in found if attack.first.subject == "control"}
        attacks = [attack for attack in found if attack.first.subject == "model"]
        assert {attack.first.control("c").attack for attack in attacks} == controls
        assert len({attack.first.attack for attack in found}) == len(found)
        assert all(attack.search and attack.first.steps == 7 for attack in found if not attack.first.is_edit)
        assert {attack.grid for attack in found if attack.first.is_edit} <= {(0.0,)}  # not trained
        assert all(attack.optional for attack in found)
        assert "collapse" in {attack.first.variant.kind for attack in attacks}


def test_keywords_are_spelled_out_for_the_model() -> None:
    found = series(suite=load_suite("full"))
    trained = {attack.first.training for attack in found}
    groups = Training("groups").on(target(FACTORS))
    assert {"q_proj alone", "norms alone"} < {group.label for group in groups}
    assert set(groups) < trained
    folded = {attack.first.training.method for attack in series(FOLD, suite=load_suite("full"))}
    assert folded == {name for name, choice in TRAININGS.items() if choice.function is not None} | {"none"}  # edits
    kinds = {attack.first.variant.kind for attack in series(FOLD, suite=load_suite("full"))}
    assert kinds == {name for name, choice in VARIANTS.items() if choice.needs in ("any", "folded")}


def test_a_training_that_finds_nothing_is_refused() -> None:
    one_block = dataclasses.replace(target(FOLD), control_model=lambda: control_model(layers=1))
    with pytest.raises(WrongUsage, match="last-half"):
        make_plan(AttackOptions(model="m", out=Path("o"), trainings=("last-half",)), one_block)


@pytest.mark.parametrize(("variant", "lacking"), [("unscale", "a scaled module"), ("collapse", "a layer stored")])
def test_what_a_variant_lacks_is_named(variant: str, lacking: str) -> None:
    (note,) = plan_notes(AttackOptions(model="m", out=Path("o"), variants=(variant,)), target(FOLD))
    assert lacking in note


def test_identity() -> None:
    """Files of earlier releases are found again: the identity of the last run is the one that they wrote."""
    first = plan()[0]
    changed = {"learning_rate": 2e-3, "seed": 7, "data": "x", "steps": 31, "variant": Variant("width", 2.0)}
    ids = {first.run_id} | {dataclasses.replace(first, **{key: value}).run_id for key, value in changed.items()}  # type: ignore[arg-type]
    assert len(ids) == len(changed) + 1
    renamed = dataclasses.replace(first, training=dataclasses.replace(first.training, name="everything"))
    assert (renamed, renamed.run_id) == (first, first.run_id)
    written = RunSpec(
        subject="model", checkpoint="c", data="d", task="causal-lm", variant=Variant("width", 2.0),
        training=Training.parse("lora:4@q_proj,v_proj"), optimizer="adamw", learning_rate=3e-22, schedule="cosine",
        warmup_steps=3, max_grad_norm=1.0, weight_decay=0.0, steps=30, batch_size=2, sequence_length=64, eval_every=3,
        seed=1, dtype="mixed", eval_tasks=("a", "b"), stop_at_divergence=False,
    )  # fmt: skip
    assert written.run_id == dataclasses.replace(written, max_grad_norm=1).run_id == "fd880a05a7e6e066"


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    one, same, other = (OpenedModel(Resolved(tmp_path, "model"), None) for _ in range(3))  # type: ignore[arg-type]
    assert one.fingerprint == same.fingerprint
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert one.fingerprint != other.fingerprint


GIVEN = {
    "control": "base", "dataset": "prose.txt", "dataset_config": "en", "dataset_split": "test", "text_column": "body",
    "text_pair_column": "second",
    "label_column": "kind", "image_column": "photo", "prompts": "asked.jsonl",
    "prompts_harmless": "harmless.jsonl", "retained": "none", "eval_task_path": Path("tasks"),
    "task": "masked-lm", "schedule": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5, "weight_decay": 0.1,
    "steps": 7, "batch_size": 6, "gradient_accumulation": 2, "sequence_length": 32, "eval_every": 5,
    "eval_sequences": 9, "dtype": "mixed", "jobs": 2, "runs": Path("runs"), "out": Path("o"), "revision": "r",
    "token": "t",
}  # fmt: skip
GIVEN_OTHERWISE = {
    "--eval-task a --eval-task b": ("eval_tasks", ("a", "b")), "--optimizer sgd": ("optimizers", ("sgd",)),
    "--lr 1e-3 --lr 1e-4": ("learning_rates", (1e-3, 1e-4)), "--report-to wandb": ("report_to", ("wandb",)),
    "--seeds 2": ("seeds", (0, 1)), "--gradient-checkpointing": ("gradient_checkpointing", True),
    "--no-stop-at-divergence": ("stop_at_divergence", False), "--trust-remote-code": ("trust_remote_code", True),
    "--time-limit 2m": ("time_limit", 120.0),
    "--variant collapse --expand width:3": ("variants", (Variant("collapse"), Variant("width", 3))),
    "--refusal-word no --refusal-word never": ("refusal_words", ("no", "never")),
    "--recipe ia3": ("trainings", (Training("ia3"),)),
}  # fmt: skip


def test_what_the_command_is_given_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, each at another value than its default; what is left is the suite's or the search's."""
    taken: list[AttackOptions] = []

    def take(options: AttackOptions) -> None:
        taken.append(options)
        raise typer.Exit

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("specdef_cli.attack.run.plan_attack", take)
    monkeypatch.setattr("specdef_cli.attack.options.require_trackers", lambda _: None)  # need not be installed
    for name in ("base", "hardened/inside", "tasks"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "hardened/config.json").write_text("{}")
    for name in ("prose.txt", "asked.jsonl", "harmless.jsonl"):
        (tmp_path / name).write_text("words")
    given = [part for name, value in GIVEN.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    more = [part for text in GIVEN_OTHERWISE for part in text.split()]
    result = CliRunner().invoke(app, ["attack", "hardened", "--dry-run", *given, *more])
    assert result.exit_code == 0, result.output
    expected = {"model": "hardened", **GIVEN, **dict(GIVEN_OTHERWISE.values())}
    assert {name: getattr(taken[0], name) for name in expected} == expected
    defaults = AttackOptions(model="", out=Path())
    assert all(getattr(defaults, name) != value for name, value in expected.items())
    assert {field.name for field in dataclasses.fields(AttackOptions)} - set(expected) == {
        "suite", "search", "thorough", "free", "manifest", "subfolder", "control_subfolder",
        "dask",  # which excludes --jobs
    }  # fmt: skip
    for model, place in {"org/a": ("org/a", "inside"), "hardened": ("hardened/inside", None)}.items():
        folders = ("--subfolder", "inside", "--control", "org/b", "--control-subfolder", "b/c/")
        assert CliRunner().invoke(app, ["attack", model, *folders, "--dry-run"]).exit_code == 0
        assert (taken[-1].model, taken[-1].subfolder) == place
        assert (taken[-1].control, taken[-1].control_subfolder) == ("org/b", "b/c")


@pytest.mark.parametrize(
    ("constructions", "surely_folded", "undoing"),
    [
        ({"factored"}, False, ["collapse"]), ({"scaled"}, False, ["unscale"]), ({"folded"}, True, ["rebalance"]),
        ({"folded", "scaled"}, True, ["rebalance"]), ({"folded", "factored"}, True, ["rebalance"]),
        # Of a model without a manifest, which may have no pairs at all.
        ({"folded", "scaled"}, False, ["unscale", "rebalance"]),
        ({"folded", "factored"}, False, ["collapse", "rebalance"]),
    ],
)  # fmt: skip
def test_what_belongs_in_a_report_undoes_all_of_the_hardening(
    constructions: set[Any], surely_folded: bool, undoing: list[str]
) -> None:
    """Scales taken out of a fold leave the fold, which trains as slowly as before."""
    found = informed_variants(constructions, surely_folded=surely_folded)
    assert [variant.kind for variant in found] == undoing


@pytest.mark.parametrize(
    ("named", "driver", "devices"),
    [
        ("", 2, ("0", "1")),
        ("2,3", 2, ("2", "3")),
        (" GPU-a1, GPU-b2 ", 2, ("GPU-a1", "GPU-b2")),
        ("1,0,-1,3", 2, ("1", "0")),  # CUDA takes nothing from the first invalid one on
        ("-1", 0, ()),
        ("MIG-a,MIG-b,MIG-c", None, ("MIG-a", "MIG-b", "MIG-c")),  # of which a process sees one: not to be asked
    ],
)
def test_places_are_those_of_the_environment(named: str, driver: int | None, devices: tuple[str, ...]) -> None:
    def count() -> int:
        assert driver is not None
        return driver

    assert visible_devices(named, count) == devices


@pytest.mark.parametrize("name", ["paper", "trackio"])
def test_a_tracker_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    hint = "pip install trackio" if name == "trackio" else "Choose one of: tensorboard, wandb, trackio, mlflow."
    with refusal(name, hint):
        require_trackers((name,))


def test_a_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("""
[budget]
steps = 12
[[attacks]]
trainings = ["lora:4", { training = "full@*norm*", name = "norms" }]
optimizers = ["sgd"]
variants = ["plain", "informed", "width:1.5"]
learning_rates = [1e-3, 1e-5]
""")
    suite = load_suite(str(path))
    assert (suite.name, suite.budget) == ("mine", {"steps": 12})
    (table,) = suite.attacks
    assert table.trainings == (Training("lora", 4), Training(where=("*norm*",)))
    assert table.trainings[1].label == "norms"
    assert table.variants == (Variant(), "informed", Variant("width", 1.5))
    assert (table.optimizers, table.learning_rates) == (("sgd",), (1e-3, 1e-5))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[attacks]]\ntrainings = ['lorra']", "lorra"),
        ("[[attacks]]\noptimizers = ['magic']", "magic"),
        ("[[attacks]]\nlearning_rates = 'everything'", "everything"),
        ("[[attacks]]\nlearning_rates = [-1]", "-1"),
        ("[[attacks]]\nspeed = 3", "speed"),
        ("[[attacks]]\ntrainings = [{ training = 'full', rnak = 3 }]", "rnak"),
        ("[budget]\nsteps = 0\n[[attacks]]", "steps"),
        ("[budget]\npatience = 3\n[[attacks]]", "patience"),
        ("attacks = []", "at least 1 item"),
        ("[budget]\nsteps = 3", "attacks"),
        ("[[attacks]\n", "not a suite"),
        ("[more]\n[[attacks]]", "more"),
        ("[[attacks]]\ntrainings = ['lora', { training = 'full', name = 'LoRA on every linear' }]", "lora:16, full"),
    ],
)
def test_a_suite_s_refusals_name_the_value(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8-sig")  # as some editors save it
    with pytest.raises(SpecDefError) as caught:
        load_suite(str(path))
    assert named in caught.value.problem
    if caught.value.hint.startswith("Write it like "):
        path.write_bytes(Path(caught.value.hint.removeprefix("Write it like ").rstrip(".")).read_bytes())
        load_suite(str(path))
