"""What is special about single trainings; what holds for all is in test_tables.py."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.run import attack
from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.trainings import Training
from specdef_cli.attack.trainings.own import train_only
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import Construction, Fold, Scale
from specdef_cli.model import load_model
from tests.attack.conftest import logits, target_of, trained_names, training_curve
from tests.byte_tokenizer import byte_tokenizer
from tests.hardened import harden_to
from tests.tiny_families import CASES
from tests.tiny_models import random_llama


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return random_llama(vocab_size=90, num_hidden_layers=4, num_key_value_heads=4)


def test_adapters_stand_after_every_attention_and_mlp(llama: LlamaForCausalLM) -> None:
    Training("adapter", 8).apply(llama, "causal-lm")
    places = {name.partition(".bottleneck.")[0] for name in trained_names(llama)}
    assert places == {f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn.o_proj", "mlp.down_proj")}
    assert sum(p.numel() for p in llama.parameters() if p.requires_grad) == 8 * (2 * 32 * 8 + 8 + 32)


@pytest.mark.parametrize("method", ["adapter", "adapter-parallel"])
def test_an_adapter_adds_what_it_reads(method: str, llama: LlamaForCausalLM) -> None:
    """By hand, in the first block: its output is the plain block's, with the adapters' in the right places."""
    llama.double()  # weights as large as these leave no room for float32's rounding
    hidden = torch.randn(1, 5, 32, dtype=torch.float64)
    positions = llama.model.rotary_emb(hidden, torch.arange(5)[None])
    block = llama.model.layers[0]
    plain = copy.deepcopy(block)

    def attention(entering: torch.Tensor) -> torch.Tensor:
        return plain.self_attn(entering, position_embeddings=positions, attention_mask=None)[0]

    with torch.no_grad():
        Training(method, 8).apply(llama, "causal-lm")
        for name in trained_names(llama):
            llama.get_parameter(name).normal_()
        if method == "adapter":
            found = attention(block.input_layernorm(hidden))
            middle = hidden + found + block.self_attn.o_proj.bottleneck(found)
            found = plain.mlp(block.post_attention_layernorm(middle))
            expected = middle + found + block.mlp.down_proj.bottleneck(found)
        else:
            middle = hidden + attention(block.input_layernorm(hidden))
            expected = middle + plain.mlp(block.post_attention_layernorm(middle)) + block.bottleneck(hidden)
        torch.testing.assert_close(block(hidden, position_embeddings=positions), expected)


@pytest.mark.parametrize("method", ["adapter", "adapter-parallel"])
@pytest.mark.parametrize("case", list(CASES)[::4])
def test_adapters_go_on_families_of_every_kind(case: str, method: str, checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints[case])
    before = logits(model)
    Training(method).apply(model, "causal-lm")
    assert torch.equal(logits(model), before)
    for name in trained_names(model):
        torch.nn.init.normal_(model.get_parameter(name))
    assert not torch.allclose(logits(model), before)


def test_pissa_holds_the_largest_singular_directions_and_freezes_the_rest(llama: LlamaForCausalLM) -> None:
    weight = llama.model.layers[1].mlp.up_proj.weight.detach().clone()
    before = logits(llama)
    adapted: Any = Training.parse("pissa:4").apply(llama, "causal-lm")
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-4)
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    values = torch.linalg.svdvals(weight)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(torch.linalg.svdvals(product)[:4], values[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(layer.base_layer.weight)[0], values[4], rtol=1e-4, atol=1e-5)
    trained = trained_names(adapted)
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * 4 * 7


def test_globs_with_an_exclamation_mark_take_away(llama: LlamaForCausalLM) -> None:
    every = trained_names(llama)
    train_only(llama, ("!*.q_proj.*", "!*.k_proj.*"))
    assert trained_names(llama) == {name for name in every if ".q_proj." not in name and ".k_proj." not in name}
    train_only(llama, ("*.self_attn.*", "!*.layers.0.*"))
    assert trained_names(llama) == {
        f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (1, 2, 3) for part in "vo"
    }
    with pytest.raises(NotApplicable, match="names no parameter"):
        train_only(llama, ("!*.nothing.*",))


@pytest.mark.parametrize(("method", "first"), [("all-but-first", 1), ("last-half", 2)])
def test_the_first_layers_are_left_alone(method: str, first: int, llama: LlamaForCausalLM) -> None:
    (training,) = Training(method).on(target_of(llama))
    training.apply(llama, "causal-lm")
    expected = {name for name, _ in llama.named_parameters() if name.startswith(("model.norm", "lm_head"))}
    expected |= {
        name
        for name, _ in llama.named_parameters()
        if name.startswith(tuple(f"model.layers.{i}." for i in range(first, 4)))
    }
    assert trained_names(llama) == expected


def test_single_groups_by_name(llama: LlamaForCausalLM) -> None:
    found = Training.parse("groups@embeddings,q_proj").on(target_of(llama))
    assert [str(training) for training in found] == [
        "full@model.embed_tokens.weight",
        "full@model.layers.*.self_attn.q_proj.weight",
    ]
    with pytest.raises(SpecDefError, match="'gates'"):
        Training.parse("groups@gates").on(target_of(llama))


@pytest.mark.parametrize(
    ("method", "same"),
    [
        ("hira", True), ("ia3", True), ("adapter", True), ("adapter-parallel", True), ("prompt", True),
        ("full@model.embed_tokens.weight", True), ("lora", False), ("oft", False), ("ln-tuning", False),
        ("prefix", False),
    ],
)  # fmt: skip
def test_which_trainings_see_a_diagonal_scale(method: str, same: bool, base: Path, fold: Path) -> None:
    """Those that do not are trained as if nothing had happened: every loss is the control's, bit for bit."""
    curves = [curve_of(directory, method) for directory in (base, fold)]
    assert curves[0][-1] < curves[0][0]
    assert torch.equal(*curves) == same


@pytest.mark.parametrize("method", ["hira", "lora"])
def test_a_scaled_head_is_left_out_of_every_linear_as_a_head_is(method: str, base: Path, scaled: Path) -> None:
    """With the head, HiRA on a scaled SmolLM2 went at twice the pace that its rate is best for, and seemed slowed."""
    models = [Training.parse(method).apply(load_model(directory), "causal-lm") for directory in (base, scaled)]
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
    assert counts[0] == counts[1]
    control, hardened = (curve_of(directory, method) for directory in (base, scaled))
    assert torch.allclose(control, hardened, rtol=1e-4) == (method == "hira")


def curve_of(directory: Path, method: str) -> torch.Tensor:
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    return training_curve(Training.parse(method).apply(load_model(directory), "causal-lm"), tokens, 5)


# --- QLoRA, against transformers' own way of loading a model in 4 bits -----------------------------------------------


def quantized(model: torch.nn.Module) -> list[Any]:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose linears read multiples of 64 features."""
    directory = tmp_path_factory.mktemp("qlora") / "base"
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    random_llama(**sizes, eos_token_id=256, pad_token_id=257).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("name", "nested"), [("qlora", True), ("qlora-single", False)])
def test_linears_are_quantized_as_by_transformers(wide: Path, name: str, nested: bool) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, dtype=torch.float32)
    model = Training(name).apply(load_model(wide), "causal-lm")
    states = [module.weight.quant_state for module in quantized(model)]
    assert len(states) == 2 * 7
    assert {(state.nested, state.quant_type) for state in states} == {(nested, "nf4")}
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), logits(load_model(wide)), atol=1e-2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}


@pytest.mark.parametrize("construction", [Fold(), Scale()], ids=["fold", "scale"])
def test_progress_counts_from_the_control_in_the_same_format(
    wide: Path, tmp_path: Path, construction: Construction
) -> None:
    harden_to(tmp_path / "hardened", wide, construction)
    options = AttackOptions(
        model=tmp_path / "hardened", control=wide, trainings=("qlora:4",), learning_rates=(1e-2,), steps=3,
        batch_size=4, sequence_length=32, eval_sequences=8, retained="none", out=tmp_path / "out",
    )  # fmt: skip
    control, attacked = attack(options).attacks[:2]
    plain = attack(replace(options, trainings=("lora:4",), steps=1)).attacks[0]
    start = control.best_run.start
    assert start is not None
    assert start != plain.best_run.start  # the control is in 4 bits, too
    assert attacked.best_run.start is None or attacked.best_run.start > start
    assert (attacked.share() or 0.0) < 0.5


def test_rows_of_half_blocks_are_quantized_too(base: Path) -> None:
    model = Training("qlora").apply(load_model(base), "causal-lm")
    assert len(quantized(model)) == 2 * 7
    assert torch.isfinite(logits(model)).all()
