"""The shipped tiny Llama is what its card says: it loads offline, reads bytes exactly and has the stated losses."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.commands import TINY_LLAMA
from tests.scripts import script

train, texts = script("train", "tiny_llama"), script("texts", "tiny_llama")


@pytest.fixture(scope="module")
def base_text() -> tuple[str, str]:
    return texts.base_text()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_LLAMA, local_files_only=True)


def relative_tolerance() -> float:
    """Another release of Python has other texts: there the losses are near the card's, not equal to them."""
    made_with = (TINY_LLAMA / "README.md").read_text(encoding="utf-8").split("Made with Python ")[1].split(",")[0]
    return 0.02 if made_with.split(".")[:2] == [str(part) for part in sys.version_info[:2]] else 0.10


def test_it_is_small_and_its_parameters_are_counted_by_hand(model: PreTrainedModel) -> None:
    assert sum(file.stat().st_size for file in TINY_LLAMA.iterdir()) <= 5_000_000
    assert [file.name for file in TINY_LLAMA.iterdir() if file.suffix in (".safetensors", ".bin")] == [
        "model.safetensors"
    ]
    width, mlp, kv, vocabulary = 128, 352, 64, 258
    attention = 2 * width * width + 2 * width * kv
    layer = attention + 3 * width * mlp + 2 * width
    assert model.num_parameters() == 4 * layer + 2 * vocabulary * width + width == 804_480
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert type(model).__name__ == "LlamaForCausalLM"


@given(st.text())
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode()), "the id of a byte is its value, and nothing is added"
    assert tokenizer.decode(ids) == text


def test_every_byte_has_an_id_and_specials_come_after(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 258
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256, 257)
    assert tokenizer("a" + tokenizer.eos_token).input_ids == [ord("a"), 256]
    text = "".join(map(chr, range(1, 0x3000)))
    assert train.byte_ids(text).tolist() == tokenizer(text).input_ids


def test_the_losses_are_those_of_the_card(model: PreTrainedModel, base_text: tuple[str, str]) -> None:
    """A second implementation of the card's figure: tokenizer, shift and log-softmax by hand."""
    results = ModelCard.load(TINY_LLAMA / "README.md").data.eval_results
    stated, tolerance = {result.dataset_type: result.metric_value for result in results}, relative_tolerance()
    assert stated["python-stdlib"] < 1.6, "it knows its own domain"
    assert stated["pydoc-topics"] > stated["python-stdlib"] + 0.8, "and not the attacker's"
    assert train.held_out_loss(model, texts.attack_text()[1]) == pytest.approx(stated["pydoc-topics"], rel=tolerance)

    ids = torch.tensor(list(base_text[1].encode()))
    starts = [int(start) for start in torch.linspace(0, len(ids) - 128, 256).long()]
    windows = torch.stack([ids[start : start + 128] for start in starts])  # [256, 128]
    with torch.no_grad():
        log_probabilities = model(windows).logits[:, :-1].log_softmax(-1)  # [256, 127, 258]
    by_hand = -log_probabilities.gather(-1, windows[:, 1:, None]).mean().item()
    assert by_hand == pytest.approx(stated["python-stdlib"], rel=tolerance)


def test_the_texts_do_not_overlap(base_text: tuple[str, str]) -> None:
    train_text, held_out = texts.attack_text()
    assert not set(train_text.split("\n\n")) & set(held_out.split("\n\n"))
    assert 0.05 < len(held_out) / len(train_text) < 0.5
    train_text, held_out = base_text
    assert 0.01 < len(held_out) / len(train_text) < 0.1
    assert "sys.prefix" in train_text
    assert "build_time_vars = {" not in train_text


def test_the_script_runs_as_a_program(
    base_text: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model"
    monkeypatch.syspath_prepend(str(TINY_LLAMA.parent))
    monkeypatch.setattr(texts, "base_text", lambda: base_text)  # reading the standard library takes seconds
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "3", "--out", str(out)])
    runpy.run_path(str(TINY_LLAMA.parent / "train.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "own-domain loss" in said
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in TINY_LLAMA.iterdir())

    made = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert made.num_parameters() == 804_480
    assert (out / "tokenizer.json").read_bytes() == (TINY_LLAMA / "tokenizer.json").read_bytes()
    stated = ModelCard.load(out / "README.md").data.eval_results[0].metric_value
    assert f"own-domain loss {stated:.4f}" in said
    assert 3 < stated < 5.6, "three steps leave it near the uniform distribution's ln 258"
