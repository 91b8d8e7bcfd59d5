"""Edits without training against closed forms, and what hardening makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.prompts import COOKING, Prompts, load_prompts, reference_of, try_edits
from specdef_cli.attack.run import attack
from specdef_cli.attack.variants import Variant
from specdef_cli.attack.variants.edits import RANK
from specdef_cli.errors import SpecDefError
from specdef_cli.model import load_model, load_tokenizer
from specdef_cli.model.opened import open_model
from specdef_cli.report import findings
from specdef_cli.report.text import summary
from tests.byte_tokenizer import byte_tokenizer
from tests.commands import call_cli

WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def prompts(base: Path) -> Prompts:
    return load_prompts(AttackOptions(model=base), load_tokenizer(base))


@pytest.fixture
def direction() -> torch.Tensor:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    return vector / vector.norm()


def weights(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    return {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
def test_the_direction_is_taken_out_of_all_that_writes(base: Path, direction: torch.Tensor, strength: float) -> None:
    model = load_model(base)
    before = weights(model)
    Variant("abliterate").edit(model, direction, strength)
    v = direction.double().numpy()
    projection = np.eye(32) - strength * np.outer(v, v)
    for name, after in weights(model).items():
        expected = before[name]
        if name.removesuffix(".weight").endswith(WRITERS):
            expected = projection @ expected
        elif "embed_tokens" in name:
            expected = expected @ projection
        np.testing.assert_allclose(after, expected, atol=1e-6)


def test_rows_keep_their_norms_up_to_the_rank_of_the_difference(base: Path, direction: torch.Tensor) -> None:
    model = load_model(base)
    before = weights(model)
    Variant("abliterate-rows").edit(model, direction, 0.8)
    v = direction.double().numpy()
    for name, after in weights(model).items():
        expected = w = before[name]
        if name.removesuffix(".weight").endswith(WRITERS):
            norms = np.linalg.norm(w, axis=1, keepdims=True)
            unit = w / norms
            edited = unit - 0.8 * np.outer(v, v @ unit)
            difference = norms * edited / np.linalg.norm(edited, axis=1, keepdims=True) - w
            left, values, right = np.linalg.svd(difference)
            assert values[RANK] < values[RANK - 1]
            expected = w + (left[:, :RANK] * values[:RANK]) @ right[:RANK]
        np.testing.assert_allclose(after, expected, atol=2e-3 * np.abs(expected).max())


def figures(directory: Path, prompts: Prompts, variant: str) -> list[tuple[float, float]]:
    edits, _, _ = try_edits(Variant.parse(variant), open_model(directory), prompts, dtype="float32", device="cpu")
    return [(edit.left or 0.0, edit.kl or 0.0) for edit in edits]


def test_no_hardening_holds_up_the_plain_edit(
    base: Path, fold: Path, scaled: Path, hardened: Path, prompts: Prompts
) -> None:
    expected = figures(base, prompts, "abliterate")
    assert [left for left, _ in expected] == pytest.approx([0.5, 0.25, 0.0, 0.25, 0.5], abs=0.3)
    assert expected[2][0] < 1e-3
    assert all(kl > 1e-3 for _, kl in expected)
    for directory in (fold, scaled, hardened):
        for found, wanted in zip(figures(directory, prompts, "abliterate"), expected, strict=True):
            assert found == pytest.approx(wanted, rel=2e-2, abs=1e-3)


def test_a_fold_is_another_model_to_an_edit_of_normalized_rows(base: Path, fold: Path, prompts: Prompts) -> None:
    (control,), (folded,) = (figures(each, prompts, "abliterate-rows:1") for each in (base, fold))
    assert folded[1] > 3 * control[1]


def test_divergence_is_that_of_torch(base: Path, prompts: Prompts) -> None:
    before = reference_of(open_model(base), prompts, "float32", "cpu")
    edits, behaviour, _ = try_edits(
        Variant("abliterate", 0.7), open_model(base), prompts, dtype="float32", device="cpu"
    )
    models = load_model(base), load_model(base)
    Variant("abliterate").edit(models[1], before.direction, 0.7)
    with torch.no_grad():
        plain, edited = (
            torch.stack([model(torch.tensor([each])).logits[0, -1].log_softmax(-1) for each in prompts.compared])
            for model in models
        )
    wanted = torch.nn.functional.kl_div(edited, plain, log_target=True, reduction="batchmean").item()
    assert edits[0].kl == pytest.approx(wanted, rel=1e-3)
    assert behaviour.refusals is None  # no prompts were given
    assert len(behaviour.answers) == 3


def test_prompts_are_lines_or_rows(base: Path, tmp_path: Path) -> None:
    lines, table = tmp_path / "unwanted.txt", tmp_path / "harmless.jsonl"
    lines.write_text("One?\n\nTwo?\nThree?\n")
    rows = [{"prompt": "A?"}, {"messages": [{"role": "user", "content": "B?"}]}]
    table.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"prompt": "C?"}) + "\n")
    tokenizer = byte_tokenizer()
    found = load_prompts(
        AttackOptions(model=base, prompts=str(lines), prompts_harmless=str(table), refusal_words=("Nope",)), tokenizer
    )
    assert [tokenizer.decode(each) for each in found.unwanted] == ["One?", "Three?"]
    assert found.texts == ("Two?",)
    assert [tokenizer.decode(each) for each in found.compared] == ["C?"]
    assert found.is_refusal("Well, NOPE.")
    assert not found.is_refusal("I’m sorry")
    standard = load_prompts(AttackOptions(model=base, prompts=str(lines)), tokenizer)
    assert standard.is_refusal("I’m sorry")
    assert standard.fingerprint != found.fingerprint


def test_a_chat_template_is_used(base: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    found = load_prompts(AttackOptions(model=base), tokenizer)
    assert tokenizer.decode(found.asked[0]) == f"<{found.texts[0]}>!"


def test_too_few_prompts_are_refused(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("\ufeffOnly this?\nOnly this?\n", encoding="utf-8")
    with pytest.raises(SpecDefError, match="too few different prompts: 1"):
        load_prompts(AttackOptions(model=base, prompts=str(path)), byte_tokenizer())
    path.write_text(f"Only this?\n{COOKING[0]}\n")
    with pytest.raises(SpecDefError, match=r"1 of the unwanted prompts .* 'How do I cook rice\?'"):
        load_prompts(AttackOptions(model=base, prompts=str(path)), byte_tokenizer())
    with pytest.raises(SpecDefError, match="needs --prompts"):
        AttackOptions(model=base, prompts_harmless=str(path))


def test_an_attack_by_edits_alone(base: Path, fold: Path, tmp_path: Path) -> None:
    options = AttackOptions(model=fold, control=base, trainings=("none",), out=tmp_path / "out")
    report = attack(options)
    names = ("abliterated", "abliterated by rows")
    assert [each.spec.label for each in report.runs] == [f"{who}{name}" for name in names for who in ("base: ", "")]
    plain = next(each for each in findings(report) if each.attack.label == "abliterated")
    assert plain.verdict == "not slowed"
    assert plain.share == pytest.approx(1.0, abs=1e-3)
    assert summary(report)[0].startswith("Edits: abliterated not slowed")
    again = attack(options)
    assert [run.seconds for run in again.runs] == [run.seconds for run in report.runs]  # found finished


def test_refusals_are_counted_after_every_run(base: Path, fold: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.txt"
    asked.write_text("".join(f"Question {number}?\n" for number in range(6)))
    common = ["--control", str(base), "--prompts", str(asked), "--lr", "1e-4", "--steps", "2", "--batch-size", "2"]
    common += ["--sequence-length", "16", "--eval-sequences", "2", "--retained", "none", "--training", "full"]
    ended = call_cli("attack", str(fold), *common, "--variant", "abliterate:1", "--fail-if", "refusals<0.5",
                "--out", str(tmp_path / "out"))  # fmt: skip
    assert ended.code == 1
    assert "abliterated at 1 meets refusals<0.5" in ended.stderr
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    by_label = {each["label"]: each for each in document["attacks"]}
    assert by_label["undone first (rebalanced), full fine-tuning"]["refusals"] == 0.0  # random bytes refuse nothing
    assert by_label["abliterated at 1"]["refusals_before"] == 0.0
    assert by_label["abliterated at 1"]["edit"]["strength"] == 1.0
    assert document["prompts"]["held_out"] == 3
    assert "i cannot" in document["prompts"]["refusal_words"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Refusals after every attack" in page
    assert "Edits without training" in page
