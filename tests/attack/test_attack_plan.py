"""The plan, the identity of runs, and the options' refusals: nothing here loads a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdef_cli.attack import AttackOptions, Expansion
from specdef_cli.attack.plan import Series, Target, default_learning_rates, make_plan
from specdef_cli.attack.spec import RunSpec, Variant, checkpoint_fingerprint
from specdef_cli.attack.suite import load_suite, suite_names
from specdef_cli.attack.training import Training
from specdef_cli.checkpoint.manifest import BaseModel, FoldedPair, InsertedLayer, Manifest, ScaledSlice
from specdef_cli.errors import SpecDefError

LAYER = InsertedLayer("a", "a.weight", 4, 4, None, False, 1e4, 1, "rotated", (1.0,), 0.0)
INSERT = Manifest("0", "insert", BaseModel("base"), "float32", 0, "constant", inserted=(LAYER,))
FOLD = Manifest(
    "0", "fold", BaseModel("base"), "float32", 0, "staircase",
    folded=(FoldedPair("p", "up_down", (0,), (-20,), (ScaledSlice("t", 0, None, (0,), (-20,)),)),),
)  # fmt: skip


GROUPS = (
    Training(parameters=("*.q_proj.*",), name="q_proj alone"),
    Training(parameters=("*norm*",), name="norms alone"),
)


def series(manifest: Manifest | None = INSERT, **options: Any) -> tuple[Series, ...]:
    made = AttackOptions(model="m", out=Path("o"), **options)
    return make_plan(made, Target(manifest, "causal-lm", "d", "c", "m", GROUPS))


def plan(manifest: Manifest | None = INSERT, **options: Any) -> tuple[RunSpec, ...]:
    """The runs that are certain from the beginning."""
    return tuple(run for each in series(manifest, **options) for run in each.runs(each.grid, each.seeds))


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
    runs = plan(expansions=(Expansion.parse("2x"),))
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


@pytest.mark.parametrize("options", [{}, {"recipes": ("lora",)}, {"train": ("*.norm.*",)}, {"learning_rates": (1e-4,)}])
def test_collapse_always_has_its_row(options: dict[str, Any]) -> None:
    assert any(run.variant.kind == "collapse" for run in plan(**options))


def test_rates_given_hold_for_all() -> None:
    runs = plan(learning_rates=(1e-4, 3e-6), seeds=(0, 1), expansions=(Expansion("depth", 3),), collapse=True)
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
    for name in suite_names():
        found = series(suite=load_suite(name), steps=7)
        controls = {each.first.attack for each in found if each.first.subject == "control"}
        attacks = [each for each in found if each.first.subject == "model"]
        assert {each.first.control("c").attack for each in attacks} == controls
        assert len({each.first.attack for each in found}) == len(found)
        assert all(each.search and each.optional and each.first.steps == 7 for each in found)
        assert "collapse" in {each.first.variant.kind for each in attacks}


def test_keywords_are_spelled_out_for_the_model() -> None:
    found = series(suite=load_suite("full"))
    trained = {each.first.training for each in found}
    assert set(GROUPS) < trained
    (inflated,) = {training for training in trained if training.placement == "inflated"}
    assert inflated.targets == ("a",)
    folded = {each.first.training.placement for each in series(FOLD, suite=load_suite("full"))}
    assert folded == {"linears"}
    kinds = {each.first.variant.kind for each in series(FOLD, suite=load_suite("full"))}
    assert kinds == {"plain", "rebalance", "channel-rates"}


def test_a_name_does_not_make_another_run() -> None:
    first = plan()[0]
    renamed = dataclasses.replace(first, training=dataclasses.replace(first.training, name="everything"))
    assert (renamed, renamed.run_id) == (first, first.run_id)


def test_identity() -> None:
    first = plan()[0]
    assert RunSpec.from_dict(first.to_dict()) == first
    changed = {"learning_rate": 2e-3, "seed": 7, "data": "x", "steps": 31, "variant": Variant("width", 2.0)}
    ids = {first.run_id} | {dataclasses.replace(first, **{key: value}).run_id for key, value in changed.items()}  # type: ignore[arg-type]
    assert len(ids) == len(changed) + 1
    assert len({run.run_id for run in plan()}) == len(plan())


def test_lora_settings_do_not_tell_full_runs_apart() -> None:
    full = [run.run_id for run in plan(recipes=("full",))]
    assert full == [run.run_id for run in plan(recipes=("full",), lora_rank=4)]


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = checkpoint_fingerprint(tmp_path)
    assert checkpoint_fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert checkpoint_fingerprint(tmp_path) != before


@pytest.mark.parametrize(("text", "factor"), [("2x", 2.0), ("1.5X", 1.5), ("3", 3.0), (" 2.5× ", 2.5)])
def test_expand_is_read(text: str, factor: float) -> None:
    assert Expansion.parse(text) == Expansion("width", factor)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"learning_rates": (-1e-3,)}, "-0.001"),
        ({"learning_rates": (float("nan"),)}, "nan"),
        ({"steps": 0}, "--steps 0"),
        ({"sequence_length": 1}, "--sequence-length 1"),
        ({"optimizers": ("magic",)}, "'magic'"),
        ({"learning_rates": (1e-3,), "search": True}, "--lr-sweep"),
        ({"suite": load_suite("quick"), "train": ("*.norm.*",)}, "quick"),
        ({"recipes": ("qlora",)}, "'qlora'"),
        ({"schedule": "step"}, "'step'"),
        ({"task": "vision"}, "'vision'"),
        ({"seeds": ()}, "seed"),
        ({"train": ("*.norm.*",), "recipes": ("lora",)}, "*.norm.*"),
        ({"jobs": 0}, "--jobs 0"),
    ],
)
def test_refusals_name_the_value(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecDefError) as caught:
        AttackOptions(model="m", out=Path("o"), **arguments)
    assert named in caught.value.problem


@pytest.mark.parametrize(("text", "kind"), [("0.5x", "width"), ("1x", "width"), ("big", "width"), ("2.5x", "depth")])
def test_expand_refusals(text: str, kind: Any) -> None:
    with pytest.raises(SpecDefError):
        Expansion.parse(text, kind)
