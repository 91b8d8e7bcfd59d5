"""The tables of variants, trainings and optimizers: what holds for every row, those of other packages included."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import PreTrainedModel

from specdef_cli.attack import table as table_module
from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.table import Factor, Table
from specdef_cli.attack.trainings import PEFT_METHODS, TRAININGS, Training
from specdef_cli.attack.variants import VARIANTS, Variant, VariantChoice
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.hardening.options import Factors, Scale
from specdef_cli.model import load_model
from tests.attack.conftest import TOKENS, logits, target_of, trained_names
from tests.commands import refusal
from tests.hardened import harden_to
from tests.tiny_models import random_llama

TABLES: dict[str, Table[Any]] = {"variant": VARIANTS, "training": TRAININGS, "optimizer": OPTIMIZERS}
IN_FRONT = {method.name for method in PEFT_METHODS if method.on == "prompt"}
"""Trainings whose tokens are there from the first step on."""
TRAINING = [name for name in TRAININGS if name != "none"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases, so that every training finds something."""
    directory = tmp_path_factory.mktemp("tables") / "base"
    model = random_llama(
        vocab_size=258, hidden_size=64, intermediate_size=64, attention_bias=True, initializer_range=0.1
    )
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def hardened(base: Path) -> Path:
    """Hardened by factors."""
    directory, chosen = base.parent / "hardened", ("*.up_proj", "*.down_proj")
    harden_to(directory, base, Factors(alpha=1e3, top_k=4), layers=chosen)
    return directory


@pytest.fixture(scope="module")
def scaled(base: Path) -> Path:
    """Hardened by scale vectors."""
    directory = base.parent / "scaled"
    harden_to(directory, base, Scale())
    return directory


@pytest.mark.parametrize("kind", TABLES)
def test_every_row_says_what_it_is(kind: str) -> None:
    table = TABLES[kind]
    assert len(table) == len(set(table)) > 3
    for name, row in table.items():
        assert row.name == name
        assert name == name.lower()
        assert not set(name) & set(":@, ")
        assert row.help.endswith(".")
        assert len(row.help) < 100
        if kind == "optimizer":
            assert list(row.learning_rates) == sorted(set(row.learning_rates), reverse=True)
            assert len(row.learning_rates) >= 3
        else:
            assert [other.label for other in table.values()].count(row.label) == 1


TRAINED = [name for name in VARIANTS if not VARIANTS[name].edits]
"""Variants that something is trained after; edits have tests of their own."""


@pytest.mark.parametrize("name", TRAINED)
def test_every_variant_keeps_the_function_and_changes_what_is_trained(name: str, hardened: Path, scaled: Path) -> None:
    """Otherwise it would be the plain attack by another name."""
    directory = scaled if VARIANTS[name].needs == "scaled" else hardened
    plain, model = load_model(directory), load_model(directory)
    Variant(name).apply(model, 0)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)
    assert trained_names(model)
    assert (model.num_parameters() > plain.num_parameters()) == (VARIANTS[name].knowledge == "growth")
    before = dict(plain.named_parameters())
    same = trained_names(plain) == trained_names(model) and all(
        torch.equal(parameter, before[key]) for key, parameter in model.named_parameters()
    )
    assert same == (name == "plain")


@pytest.mark.parametrize("name", TRAINING)
def test_every_training_trains_something_and_only_what_it_says(name: str, base: Path, hardened: Path) -> None:
    found = Training(name).on(target_of(load_model(base), read_manifest(hardened)))
    assert found
    for directory in (base, hardened):
        for training in found:
            original = load_model(directory)
            before = logits(original)
            every = {key for key, _ in original.named_parameters()}
            model = training.apply(load_model(directory), "causal-lm")
            names = trained_names(model)
            assert names
            if training.method == "full":
                assert names == every if not training.where else names < every
                assert torch.equal(logits(model), before)
                continue
            prefix = "base_model.model." if isinstance(model, PeftModel) else ""
            assert not names & {f"{prefix}{key}" for key in every} or name == "ln-tuning"  # a copy of each norm
            if name not in IN_FRONT and not name.startswith("qlora"):  # which rounds the weights
                torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TRAINING)
def test_a_step_moves_what_trains_and_nothing_else(name: str, base: Path, hardened: Path) -> None:
    training = Training(name).on(target_of(load_model(base), read_manifest(hardened)))[0]
    model = training.apply(load_model(hardened), "causal-lm")
    names = trained_names(model)
    model(input_ids=TOKENS)  # bitsandbytes packs its weights for the CPU now
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    for _ in range(2):  # adapters that start at zero pass no gradient on in the first
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.sign_()
        optimizer.step()
    # bitsandbytes lays the bytes of 4-bit weights out anew for AVX-512 at their first pass: no number moves.
    numbers = {key: value for key, value in model.named_parameters() if value.is_floating_point()}
    moved = {key for key, value in numbers.items() if not torch.equal(value, before[key])}
    assert moved
    assert moved <= names


FACTORS = st.one_of(st.integers(2, 10**6), st.floats(1.01, 1e9))


@given(st.sampled_from(list(VARIANTS)), FACTORS)
def test_a_variant_is_read_as_it_is_written(name: str, factor: float) -> None:
    takes = VARIANTS[name].factor
    given_factor = None if takes is None else max(2, int(factor)) if takes.whole else factor
    variant = Variant(name, given_factor)
    assert Variant.parse(str(variant)) == variant
    assert str(Variant.parse(str(variant))) == str(variant)
    assert Variant.parse(name) == Variant(name)
    assert "{" not in variant.label


@given(
    st.sampled_from(list(TRAININGS)),
    st.integers(1, 10**6),
    st.lists(st.text(st.characters(exclude_characters=",", categories=["L", "N", "P", "S"]), min_size=1), max_size=3),
)
def test_a_training_is_read_as_it_is_written(name: str, size: int, where: list[str]) -> None:
    choice = TRAININGS[name]
    training = Training(name, None if choice.size is None else size, tuple(where) if choice.where else ())
    assert Training.parse(str(training)) == training
    assert str(Training.parse(str(training))) == str(training)
    assert Training.parse(name) == Training(name)
    assert "{" not in Training(name).label


@pytest.mark.parametrize(
    ("read", "text", "named"),
    [
        (Variant.parse, "widht:2", "'widht'"),
        (Variant.parse, "width:0.5", "0.5"),
        (Variant.parse, "width:nan", "nan"),
        (Variant.parse, "width:", "''"),
        (Variant.parse, "depth:2.5", "2.5"),
        (Variant.parse, "collapse:2", "collapse"),
        (Training.parse, "lorra", "'lorra'"),
        (Training.parse, "lora:0", "0"),
        (Training.parse, "lora:many", "'many'"),
        (Training.parse, "full:3", "full"),
        (Training.parse, "last-half@x", "last-half"),
        (Training.parse, "lora@", "lora"),
        (Training.parse, "lora@q_proj,,v_proj", "q_proj,,v_proj"),
        (OPTIMIZERS.choose, "adamm", "'adamm'"),
    ],
)
def test_refusals_name_the_value(read: Callable[[str], Any], text: str, named: str) -> None:
    with refusal(named):
        read(text)


def other_package(monkeypatch: pytest.MonkeyPatch, **objects: Any) -> Table[VariantChoice]:
    """A table of one row, as it is where another package adds ``objects`` by entry points."""
    module = types.ModuleType("another_package")
    vars(module).update(objects)
    monkeypatch.setitem(sys.modules, "another_package", module)
    points = [EntryPoint(name, f"another_package:{name}", "group") for name in (*objects, "missing")]
    monkeypatch.setattr(table_module, "entry_points", lambda group: points if group == "group" else [])
    return Table("variant", "group", VariantChoice, [VARIANTS["plain"]])


def halve(model: PreTrainedModel) -> None: ...


def test_rows_of_other_packages_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    row = VariantChoice("added", "another_package:halve", "construction", "halved", "Halve it.", factor=Factor("n", 2))
    table = other_package(monkeypatch, added=row, halve=halve)
    assert list(table) == ["plain", "added", "halve", "missing"]
    assert table.choose("added") is row
    assert row.load() is halve


@pytest.mark.parametrize("name", ["halve", "missing"])
def test_a_package_that_is_broken_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    table = other_package(monkeypatch, halve=halve)
    assert table.choose("plain").name == "plain"
    with refusal(name, "another_package"):
        table.choose(name)
