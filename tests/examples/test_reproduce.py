"""The scripts of `examples/reproduce`: their objectives against closed forms, their tables on a small budget."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from specdef_cli import AttackOptions
from specdef_cli.attack.train import quiet
from specdef_cli.checkpoint.manifest import read_manifest
from tests.scripts import script
from tests.tiny_models import random_llama
from tests.weights import assert_same_bytes, tensors

prior, utility, staircase, unet = map(script, ("prior", "utility", "staircase", "unet"))


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    return random_llama(**sizes, bos_token_id=0, eos_token_id=1, initializer_range=0.5).double()


@pytest.fixture
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Prose and code, [3, 6] each."""
    prose, code = torch.randint(0, 16, (2, 3, 6), generator=torch.Generator().manual_seed(1))
    return prose, code


def cells(table: str) -> dict[str, list[str]]:
    """The rows of the first Markdown table, by their first cell."""
    lines = table.split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if row[0] != "---"}


def gradients(loss: torch.Tensor, model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


def test_log_probabilities_are_those_of_the_models_own_loss(
    model: LlamaForCausalLM, texts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    prose, code = texts
    expected = model(input_ids=prose, labels=prose).loss + model(input_ids=code, labels=code).loss
    assert prior.learning(model, prose, code).item() == pytest.approx(expected.item())


def test_unlearning_begins_as_ascent_and_ends_where_the_prose_is_gone(
    model: LlamaForCausalLM, texts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """At π = π₀ the loss is (2/β) log 2, and its gradient that of the sequences' log-probability itself."""
    prose, code = texts
    retained = -prior.token_log_probabilities(model, code).mean()
    loss = prior.unlearning(model, beta=0.2)(model, prose, code) - retained
    assert loss.item() == pytest.approx(10 * math.log(2))
    ascent = prior.token_log_probabilities(model, prose).sum(-1).mean()
    torch.testing.assert_close(gradients(loss, model), gradients(ascent, model))

    certain = LlamaForCausalLM(model.config).double()  # one that gives the prose far more than the model does
    certain.forward = lambda input_ids: _Logits(100 * torch.nn.functional.one_hot(input_ids.roll(-1, 1), 16).double())
    assert (prior.unlearning(certain, beta=4.0)(model, prose, code) - retained).item() == pytest.approx(0, abs=1e-6)


class _Logits:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def test_discrepancy_is_the_definition_and_nothing_between_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, others = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    both = [*samples, *others]
    squared = [[float((a - b) @ (a - b)) for b in both] for a in both]
    bandwidth = sum(map(sum, squared)) / (14 * 13)

    def kernel(i: int, j: int) -> float:
        return sum(math.exp(-squared[i][j] / (bandwidth * factor)) for factor in (0.25, 0.5, 1, 2, 4))

    def mean(rows: range, columns: range) -> float:
        return sum(kernel(i, j) for i in rows for j in columns) / 49

    first, second = range(7), range(7, 14)
    expected = mean(first, first) + mean(second, second) - 2 * mean(first, second)
    assert prior.discrepancy(samples, others).item() == pytest.approx(expected)
    assert prior.discrepancy(samples, samples).item() == pytest.approx(0, abs=1e-12)


def test_noising_adds_noise_and_ascent_to_the_retained_loss(
    model: LlamaForCausalLM, texts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    prose, code = texts
    retained = -prior.token_log_probabilities(model, code).mean()
    ascent = -(-prior.token_log_probabilities(model, prose).mean()).log()
    assert prior.noising(0, 0)(model, prose, code).item() == pytest.approx(retained.item())
    rounding = 1e-6 * (abs(retained) + 3 * abs(ascent)).item()  # of the terms, which nearly cancel
    expected = pytest.approx((retained + 3 * ascent).item(), rel=0, abs=rounding)
    assert prior.noising(0, 3)(model, prose, code).item() == expected
    assert prior.noising(1, 0)(model, prose, code).item() > retained.item()


def test_a_share_of_the_capability_is_read_between_both_models() -> None:
    scale = prior.Capability(absent=3.0, present=1.0)
    assert [scale.share(loss) for loss in (9.0, 3.0, 2.5, 1.0)] == [0, 0, 0.25, 1]
    assert scale.cell(2.5) == "2.500 (25%)"
    assert scale.cell(None) == "–"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list:
    out = tmp_path_factory.mktemp("prior")
    code = "def add(first, second):\n    return first + second\n" * 300
    budget = prior.Budget(learning=40, defending=10, attacking=5, rates=(1e-3,))
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior, "base_text", lambda: (code, code))  # reading the standard library takes seconds
        return prior.measure(prior.build(out, budget), out / "attacks", budget)


@pytest.mark.slow
def test_every_defence_has_its_row(rows: list) -> None:
    scale = prior.Capability(rows[0].before, rows[1].before)
    table = cells(prior.table(rows, scale))
    names = [
        "none, prose never learned", "none", "noised", "unlearned", "unlearned, factors",
        "unlearned, factors, collapsed", "unlearned, folded", "unlearned, folded, rebalanced",
    ]  # fmt: skip
    assert list(table)[1:] == names
    code, before, *reached, best, of_control = table["unlearned, factors, collapsed"]
    assert [cell == "–" for cell in reached] == [True, False, True, True], "one rate was tried"
    assert best == f"{reached[1]} at 1e-03"
    assert of_control == "100%"
    assert all(row[-1] == "–" for name, row in table.items() if name in names[:4])
    assert (code, before) == tuple(table["unlearned"][:2])


@pytest.mark.slow
def test_what_each_step_is_for(rows: list) -> None:
    never, capable, noised, unlearned, factors, collapsed, folded, rebalanced = rows
    assert capable.before < never.before - 0.1, "the prose was learned"
    assert min(noised.before, unlearned.before) > capable.before + 0.05, "and removed"
    assert factors.before == pytest.approx(unlearned.before, abs=1e-4), "hardening removes nothing"
    assert folded.before == unlearned.before
    assert folded.attack.best > unlearned.attack.best + 0.05, "but slows"
    for informed in (collapsed, rebalanced):
        assert informed.attack.best == pytest.approx(unlearned.attack.best, abs=1e-3)


@pytest.fixture(scope="module")
def columns() -> list:
    tokens = utility.token_batch(utility.BASE, "for index in range(length):\n    yield index\n" * 20, sequences=4)
    with quiet():
        return [utility.measure(dtype, tokens, (1e1, 1e4)) for dtype in (torch.float32, torch.bfloat16)]


def test_utility_has_a_row_for_each_gauge_and_alpha(columns: list) -> None:
    table = cells(utility.table(columns))
    assert list(table)[1:] == [
        "base", "base, against float32", "factors, rotated, α = 1e+01", "factors, rotated, α = 1e+04",
        "factors, symmetric, α = 1e+01", "factors, symmetric, α = 1e+04", "fold",
    ]  # fmt: skip
    assert table["fold"] == ["identical", "identical"]
    assert table["base, against float32"][0] == "identical"
    assert table["factors, symmetric, α = 1e+04"][1].startswith("refused: +")
    assert "- bfloat16, symmetric, smallest α refused: alpha 10 would" in utility.table(columns)


def test_rounding_grows_with_alpha_in_the_symmetric_gauge_alone(columns: list) -> None:
    single, half = columns
    error = {key: cost.outputs.relative for key, cost in single.factored.items()}
    assert error["symmetric", 1e4] > 100 * error["symmetric", 1e1]
    assert error["rotated", 1e4] < 3 * error["rotated", 1e1]
    assert half.factored["rotated", 1e4].outputs.relative < 5 * half.cast.outputs.relative, "no more than bfloat16 does"
    assert half.factored["symmetric", 1e4].loss > 1, "why it is refused"
    assert not any(cost.refusal for (gauge, _), cost in half.factored.items() if gauge == "rotated")


def test_a_refused_one_in_memory_is_what_hardening_would_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is refused, both ways give the same model within rounding."""
    tokens = utility.token_batch(utility.BASE, "while True:\n    pass\n" * 20, sequences=2)
    published = utility.measure(torch.float32, tokens, (1e3,)).factored["symmetric", 1e3]

    def refuse(*arguments: object, **options: object) -> None:
        raise utility.SpecDefError("no", "Never.")

    monkeypatch.setattr(utility, "hardened", refuse)
    column = utility.measure(torch.float32, tokens, (1e3,))
    in_memory = column.factored["symmetric", 1e3]
    assert not published.refusal
    assert in_memory.refusal == "no. Never."
    assert in_memory.outputs.relative == pytest.approx(published.outputs.relative, rel=0.5)
    assert column.folded is None
    assert cells(utility.table([column]))["fold"] == ["refused"]


def test_cells_tell_what_is_not_a_number() -> None:
    outputs = utility.compare_outputs(torch.zeros(1, 2, 3), torch.full((1, 2, 3), math.nan))
    assert utility.Cost(math.nan, outputs, "too large").cell == "refused: not finite"
    outputs = utility.compare_outputs(torch.eye(4), torch.eye(4).roll(1, 0))
    assert utility.Cost(-1e-6, outputs).cell == "+0.0000 · 0.00% · 1"


@pytest.fixture
def experiment(tmp_path: Path) -> Any:
    options = AttackOptions(
        model="", control=staircase.BASE, out=tmp_path / "attacks", runs=tmp_path / "runs", steps=2, batch_size=2,
        sequence_length=16, eval_every=2, eval_sequences=2,
    )  # fmt: skip
    return staircase.Experiment.of_tiny_llama(tmp_path, options)


def test_a_fold_by_hand_is_hardens_own_fold(experiment: Any, tmp_path: Path) -> None:
    exponents = {
        experiment.pairs[pair.name]: dict(zip(pair.channels, pair.exponents, strict=True))
        for pair in read_manifest(tmp_path / "harden").folded
    }
    assert experiment.exponents(list(staircase.LAYOUTS.values())[-1]) == exponents
    found = tensors(staircase.fold(experiment.tensors, exponents, tmp_path / "by-hand"))
    assert_same_bytes(found, tensors(tmp_path / "harden"))


def test_layouts_use_the_exponents_of_harden_in_another_order() -> None:
    assert staircase.upwards(2, 2) == ((13, 18), (23, 28))
    assert staircase.downwards(2, 2) == ((28, 23), (18, 13))
    assert staircase.first_apart(3, 2) == ((28, 21), (13, 13), (13, 13))
    assert staircase.attention_above(3, 2) == ((21, 28), (17, 18), (13, 15))
    for layout in staircase.LAYOUTS.values():
        steps = layout(4, 6)
        assert [len(layer) for layer in steps] == [6] * 4
        assert all(13 <= exponent <= 28 for layer in steps for exponent in layer)


@pytest.mark.slow
def test_layouts_and_single_channels_are_attacked(experiment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staircase, "LAYOUTS", {"downwards": staircase.downwards})
    monkeypatch.setattr(staircase, "ALONE", {name: staircase.ALONE[name] for name in ("lm_head", "up_proj")})
    layouts = cells(experiment.layouts())
    assert layouts.pop("trained") == ["downwards"]
    assert list(layouts) == [training.label for training in staircase.TRAINED]
    channels = cells(experiment.channels(1))
    assert channels["trained"] == ["left", "harden's channels", "mean of 1 draws", "least", "most"]
    assert [channels[weight][0] for weight in ("lm_head", "up_proj")] == ["one vector", "one number"]
    for _, _, mean, least, most in (channels["lm_head"], channels["up_proj"]):
        assert mean == least == most


def test_every_format_is_one_that_the_tools_table_measures() -> None:
    assert set(script("serving").FORMATS) <= script("consumer_rows", "real").ROWS.keys()


def test_same_images_and_a_row_for_every_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unet, "RATES", (1e-2, 1e-9))
    monkeypatch.setattr(unet, "HELD_OUT", 4)
    monkeypatch.setattr(unet, "BATCH", 4)
    arguments = ("unet.py", "--out", str(tmp_path), "--steps", "1", "--base-steps", "2", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", list(arguments))
    unet.main()
    lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    images, attacks = table[2:6], table[8:]
    assert [row[:2] for row in images] == [
        ["original", "0"],
        ["residual writers", "12"],
        ["every linear of the blocks", "40"],
        ["every linear of the blocks, collapsed", "0"],
    ]
    assert float(images[0][3]) == 0
    assert all(0 < float(row[3]) < 1e-4 for row in images[1:])
    assert len(attacks) == 8
    # The adapters on q, k and v touch no inflated layer of the default hardening: they train as on the original.
    assert attacks[0][2:] == attacks[1][2:]
    assert attacks[0][2] == attacks[4][2] == "100%"
    control, defended = float(attacks[4][4]), float(attacks[6][4])
    assert control < defended  # at η = 1e-2 the covered model diverges, or stays where it is
    assert float(attacks[7][4]) == pytest.approx(control, abs=1e-3)  # collapsed, it trains as the original
