"""QLoRA against transformers' own way of loading a model in 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.run import attack
from specdef_cli.attack.trainings import Training
from specdef_cli.hardening.options import Fold, Scale
from specdef_cli.model import load_model
from tests.byte_tokenizer import byte_tokenizer
from tests.hardened import harden_to
from tests.tiny_models import random_llama

bitsandbytes = pytest.importorskip("bitsandbytes")
TOKENS = torch.arange(24)[None] * 7 % 250


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose linears read multiples of 64 features."""
    directory = tmp_path_factory.mktemp("qlora") / "base"
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    random_llama(**sizes, eos_token_id=256, pad_token_id=257).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


@pytest.mark.parametrize(("name", "nested"), [("qlora", True), ("qlora-single", False)])
def test_linears_are_quantized_as_by_transformers(wide: Path, name: str, nested: bool) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, dtype=torch.float32)
    model = Training(name).apply(load_model(wide), "causal-lm")
    quantized = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 2 * 7
    assert {module.weight.quant_state.nested for module in quantized} == {nested}
    assert {module.weight.quant_state.quant_type for module in quantized} == {"nf4"}
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(load_model(wide)), atol=1e-2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}


@pytest.mark.parametrize("scaled", [False, True])
def test_progress_counts_from_the_control_in_the_same_format(wide: Path, tmp_path: Path, scaled: bool) -> None:
    hardened = tmp_path / "hardened"
    harden_to(hardened, wide, Scale() if scaled else Fold())
    report = attack(
        AttackOptions(
            model=hardened, control=wide, trainings=("qlora:4",), learning_rates=(1e-2,), steps=3, batch_size=4,
            sequence_length=32, eval_sequences=8, retained="none", out=tmp_path / "out",
        )
    )  # fmt: skip
    control, attacked = report.attacks[:2]
    plain = attack(
        AttackOptions(
            model=hardened, control=wide, trainings=("lora:4",), learning_rates=(1e-2,), steps=1, batch_size=4,
            sequence_length=32, eval_sequences=8, retained="none", out=tmp_path / "plain",
        )
    ).attacks[0]  # fmt: skip
    start, expected = control.best_run.start, plain.best_run.start
    assert start is not None
    assert start != expected  # the control is in 4 bits, too
    assert attacked.best_run.start is None or attacked.best_run.start > start
    assert (attacked.share() or 0.0) < 0.5


def test_rows_of_half_blocks_are_quantized_too(base: Path) -> None:
    model = Training("qlora").apply(load_model(base), "causal-lm")
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()) == 2 * 7
    assert torch.isfinite(logits(model)).all()
