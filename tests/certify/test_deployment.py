"""Deployment figures: a copy keeps everything, a fold loses what it must, and adapters carry over exactly."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from specdef_cli.certify.deployment import (
    DEFAULT_FORMATS,
    FORMATS,
    DeploymentFigure,
    Outcome,
    Trial,
    compare,
    formats,
    judge,
    measure_deployment,
    measure_format,
    stand_ins,
    token_batch,
)
from specdef_cli.certify.deployment.adapters import attach_adapter, block_linears
from specdef_cli.certify.deployment.subject import Subject
from specdef_cli.certify.deployment.tools import missing
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import Factors, Fold, HardenOptions, Scale
from specdef_cli.hardening.run import harden
from specdef_cli.runtime import SpecDefLinear, load_model
from tests.tiny_families import write_case

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny_llama" / "model"


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    return token_batch(TINY_LLAMA, text, sequences=2, length=128)


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fold") / "hardened"
    harden(HardenOptions(str(TINY_LLAMA), out, verify=False))
    return out


@pytest.fixture(scope="module")
def insert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("factors") / "hardened"
    harden(HardenOptions(str(TINY_LLAMA), out, Factors(alpha=1e4, top_k=25), verify=False))
    return out


def one(base: Path, hardened: Path, tokens: torch.Tensor | None, name: str) -> DeploymentFigure:
    return measure_deployment(base, hardened, tokens, [name])[0]


def damaged(out: Path) -> Path:
    """The tiny Llama with the signs of one layer's outputs turned: it loads everywhere, and says nothing sensible."""
    shutil.copytree(TINY_LLAMA, out)
    path = next(out.glob("*.safetensors"))
    weights = load_file(path)
    for name in weights:
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            weights[name] = -3 * weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    return out


def copied(directory: Path, out: Path) -> Path:
    shutil.copytree(directory, out)
    return out


@pytest.mark.slow
def test_an_unhardened_copy_keeps_everything_to_the_last_bit(tmp_path: Path, tokens: torch.Tensor) -> None:
    seen: list[DeploymentFigure] = []
    figures = measure_deployment(TINY_LLAMA, copied(TINY_LLAMA, tmp_path / "copy"), tokens, on_figure=seen.append)
    assert [figure.format for figure in figures] == list(DEFAULT_FORMATS)
    assert list(figures) == seen
    for figure in figures:
        if figure.status == "skipped":  # a tool that is not here, or that fails on the base itself
            assert figure.note, figure
            continue
        assert figure.status == "kept", figure
        assert figure.base == figure.hardened, figure
    by_name = {figure.format: figure.base for figure in figures if figure.status == "kept"}
    assert len(by_name) >= 12
    # No format left the model as it was.
    for name in set(by_name) - {"float32"}:
        assert by_name[name] != by_name["float32"], name


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.stand_in is not None])
def test_a_stand_in_says_that_it_is_one_and_does_something(
    name: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr("specdef_cli.certify.deployment.measure.missing", lambda tool: "" if tool == "PEFT" else "away")
    figure = one(TINY_LLAMA, TINY_LLAMA, tokens[:1], name)
    assert (figure.status, figure.simulated, figure.verdict) == ("kept", True, "kept (simulated)")
    plain = measure_format(Trial(TINY_LLAMA, TINY_LLAMA, Path(), tokens[:1]), "lora").value
    assert figure.base != plain


def test_only_the_tool_itself_earns_plain_words() -> None:
    measured = Outcome("measured", 2.0)
    assert compare("x", "t", "loss", measured, measured).verdict == "kept"
    simulated = Outcome("measured", 2.0, simulated=True)
    assert compare("x", "t", "loss", simulated, simulated).verdict == "kept (simulated)"
    garbage = compare("x", "t", "loss", measured, Outcome("measured", None))
    assert (garbage.status, garbage.verdict) == ("broken", "broken, silently")
    loud = compare("x", "t", "loss", measured, Outcome("refused", note="unknown architecture"))
    assert (loud.status, loud.note) == ("refused", "unknown architecture")
    absent = compare("x", "t", "loss", Outcome("refused", note="no kernel"), measured)
    assert (absent.status, absent.note) == ("skipped", "the base fails: no kernel")


CONSUMERS = ["static-cache", "long-input", "left-padded", "lora-round-trip", "sft", "lm-eval"]


@pytest.mark.parametrize("name", CONSUMERS)
def test_consumers_keep_a_copy_and_see_a_broken_one(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    if missing(FORMATS[name].tool):
        pytest.skip(missing(FORMATS[name].tool))
    kept = one(TINY_LLAMA, copied(TINY_LLAMA, tmp_path / "copy"), tokens, name)
    assert kept.status == "kept", kept
    assert kept.hardened == pytest.approx(kept.base, abs=1e-3)
    broken = one(TINY_LLAMA, damaged(tmp_path / "broken"), tokens, name)
    assert broken.status == "broken", broken


def test_a_left_padded_batch_costs_nothing(tokens: torch.Tensor) -> None:
    # The first of four sequences is not padded: alone in its batch it has the plain loss.
    figure = one(TINY_LLAMA, TINY_LLAMA, tokens[:1], "left-padded")
    assert figure.base == pytest.approx(one(TINY_LLAMA, TINY_LLAMA, tokens[:1], "float32").base, abs=1e-6)


REAL_ENGINES = [name for name, row in FORMATS.items() if row.tool in {"bitsandbytes", "torchao", "llama.cpp"}]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_ENGINES)
def test_engines_keep_a_copy_and_see_a_broken_one(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    tool = FORMATS[name].tool
    if missing(tool):
        pytest.skip(missing(tool))
    kept = one(TINY_LLAMA, copied(TINY_LLAMA, tmp_path / "copy"), tokens, name)
    if kept.status == "skipped":
        pytest.skip(kept.note)  # what the engine does not take at this size
    assert (kept.status, kept.simulated) == ("kept", False), kept
    broken = one(TINY_LLAMA, damaged(tmp_path / "broken"), tokens, name)
    assert broken.status in {"broken", "refused"}, broken
    assert not broken.simulated


def test_the_loss_is_that_of_transformers(tokens: torch.Tensor) -> None:
    figure = one(TINY_LLAMA, TINY_LLAMA, tokens, "float32")
    with torch.inference_mode():
        expected = load_model(TINY_LLAMA)(input_ids=tokens, labels=tokens).loss
    assert figure.measure == "loss"
    assert figure.base == pytest.approx(float(expected), rel=1e-5)


def test_a_fold_is_exact_until_its_exponents_leave_the_format(fold: Path, tokens: torch.Tensor) -> None:
    names = ["float32", "bfloat16", "float16", "kv-float8", "float8-tensor", "lora-merged"]
    figures = {figure.format: figure for figure in measure_deployment(TINY_LLAMA, fold, tokens, names)}
    assert figures["float32"].base == figures["float32"].hardened
    assert figures["bfloat16"].base == figures["bfloat16"].hardened
    assert figures["float16"].base is not None
    assert (figures["float16"].hardened, figures["float16"].status) == (None, "broken")
    for name in ("float8-tensor", "kv-float8"):
        assert figures[name].verdict in {"broken, silently (simulated)", "degraded (simulated)"}
    assert figures["lora-merged"].status == "kept"


def test_an_adapter_of_the_base_is_lost(fold: Path, insert: Path, tokens: torch.Tensor) -> None:
    assert one(TINY_LLAMA, fold, tokens, "lora-of-base").status == "broken"
    refused = one(TINY_LLAMA, insert, tokens, "lora-of-base")
    assert (refused.hardened, refused.status) == (None, "refused")
    assert "SpecDefLinear" in refused.note


def test_a_merged_adapter_leaves_the_scales_where_they_are(tmp_path: Path, tokens: torch.Tensor) -> None:
    out = tmp_path / "scaled"
    harden(HardenOptions(str(TINY_LLAMA), out, Scale(), verify=False))
    for name in ("lora", "lora-merged"):
        assert one(TINY_LLAMA, out, tokens, name).status == "kept", name


def test_inserted_layers_keep_their_function_but_not_in_int8(insert: Path, tokens: torch.Tensor) -> None:
    for name, expected in {"kv-float8": "kept", "lora-merged": "kept", "torchao-int8": "broken"}.items():
        assert one(TINY_LLAMA, insert, tokens, name).status == expected, name


def test_a_refusal_is_in_the_tools_words_and_names_no_directory(
    insert: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    if missing("bitsandbytes"):
        pytest.skip(missing("bitsandbytes"))
    refused = measure_format(Trial(insert, TINY_LLAMA, tmp_path, tokens), "nf4")
    assert (refused.kind, refused.value, refused.simulated) == ("refused", None, False)
    assert "BitsAndBytesConfig" in refused.note
    assert str(insert) not in refused.note


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids).logits


# Separate and fused tensors, grouped queries, biases; Conv1D, whose weights are transposed; per-head fused.
@pytest.mark.parametrize(
    ("case", "method"),
    [("llama", "fold"), ("phi3", "fold"), ("gpt2-untied", "fold"), ("gpt-neox", "fold"), ("llama", "factors"),
     ("gpt2", "factors")],
)  # fmt: skip
def test_a_carried_adapter_is_the_same_function(case: str, method: Literal["fold", "factors"], tmp_path: Path) -> None:
    base = write_case(case, tmp_path / "base")
    construction = Factors(alpha=1e3, top_k=4) if method == "factors" else Fold()
    harden(HardenOptions(str(base), tmp_path / "hardened", construction, verify=False))
    plain = logits(load_model(base))
    expected = logits(attach_adapter(load_model(base), base, carried=False))
    hardened = tmp_path / "hardened"
    adapted: Any = attach_adapter(load_model(hardened), hardened, carried=True)
    scale = float((expected - plain).abs().max())
    assert scale > 0.05
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=2e-3 * scale)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=0, atol=2e-3 * scale)


def test_the_adapter_of_the_base_is_another_function_on_a_fold(tmp_path: Path) -> None:
    base = write_case("llama", tmp_path / "base")
    harden(HardenOptions(str(base), tmp_path / "fold", verify=False))
    expected = logits(attach_adapter(load_model(base), base, carried=False))
    unchanged = logits(attach_adapter(load_model(tmp_path / "fold"), tmp_path / "fold", carried=False))
    assert not torch.allclose(unchanged, expected, rtol=0.1, atol=0.1)


def test_quantization_reaches_both_factors_and_spares_the_head(insert: Path) -> None:
    model = load_model(insert)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    stand_ins.quantize_linears(Subject(insert, model), lambda weight: weight + 1)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    layers = dict(block_linears(model))
    expected = set()
    for path, layer in layers.items():
        parts = (".inflated", ".compensation") if isinstance(layer, SpecDefLinear) else ("",)
        expected |= {f"{path}{part}.weight" for part in parts}
    assert changed == expected
    assert len(layers) == 28  # q, k, v, o, gate, up, down in four blocks
    assert any(isinstance(layer, SpecDefLinear) for layer in layers.values())


def test_a_conv1d_is_quantized_along_its_inputs(tmp_path: Path) -> None:
    base = write_case("gpt2", tmp_path / "base")
    model = load_model(base)
    shapes: list[tuple[int, ...]] = []

    def record(weight: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return weight

    before = logits(model)
    stand_ins.quantize_linears(Subject(base, model), record)
    assert shapes[:4] == [(96, 32), (32, 32), (128, 32), (32, 128)]  # [m, n] of qkv, out, fc, proj
    assert torch.equal(logits(model), before)


def cached_logits(model: PreTrainedModel, ids: torch.Tensor, round_states: Callable) -> torch.Tensor:
    cache = stand_ins.RoundingCache(round_states, model.config)
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=True, past_key_values=cache).logits


def test_attention_reads_what_the_cache_holds() -> None:
    model = load_model(TINY_LLAMA)
    ids = torch.arange(40).reshape(1, 40)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
    torch.testing.assert_close(cached_logits(model, ids, lambda states: states), plain, rtol=0, atol=1e-4)
    # Without values attention adds nothing: what follows a position hangs on its own token alone.
    silent = cached_logits(model, ids, torch.zeros_like)
    assert (silent - plain).abs().max() > 1
    changed = ids.clone()
    changed[0, 0] = 200
    torch.testing.assert_close(cached_logits(model, changed, torch.zeros_like)[:, 1:], silent[:, 1:])


def test_what_is_no_language_model_is_measured_by_its_outputs(tmp_path: Path) -> None:
    base = write_case("vit", tmp_path / "base")
    harden(HardenOptions(str(base), tmp_path / "factors", Factors(alpha=1e3, top_k=4), verify=False))
    names = ["float32", "bfloat16", "float8-row", "kv-float8", "lora-merged"]
    figures = {figure.format: figure for figure in measure_deployment(base, tmp_path / "factors", None, names)}
    assert {figure.measure for figure in figures.values()} == {"relative error"}
    assert figures["float32"].base == 0
    assert figures["float32"].hardened == pytest.approx(0, abs=1e-3)
    assert figures["float32"].status == figures["lora-merged"].status == "kept"
    rounded = figures["bfloat16"].base
    assert rounded is not None
    assert 1e-4 < rounded < 0.05
    assert figures["kv-float8"].status == "skipped"
    assert "cache" in figures["kv-float8"].note


def test_a_lost_adapter_would_be_seen(tmp_path: Path) -> None:
    base = write_case("llama", tmp_path / "base")
    plain = logits(load_model(base))
    adapted = logits(attach_adapter(load_model(base), base, carried=False))
    assert float((adapted - plain).norm() / adapted.norm()) > 0.05


def test_what_cannot_be_measured_is_skipped_with_a_reason(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = write_case("mixtral", tmp_path / "experts")
    stacked = one(experts, experts, None, "float8-row")
    assert (stacked.status, stacked.base, stacked.hardened) == ("skipped", None, None)
    assert "stacks experts" in stacked.note
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    absent = one(TINY_LLAMA, TINY_LLAMA, tokens, "q8_0")
    assert (absent.status, absent.note) == ("skipped", "install specdef-cli[deploy]")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert "of memory are free" in one(TINY_LLAMA, TINY_LLAMA, tokens, "float32").note
    monkeypatch.setattr(formats.shutil, "which", lambda _: None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    assert "compiler" in one(TINY_LLAMA, TINY_LLAMA, tokens, "compile").note


def test_a_base_that_breaks_by_itself_says_nothing_of_the_hardening(
    fold: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    # The fold stands for a base with such outliers.
    figure = one(fold, copied(fold, tmp_path / "copy"), tokens, "float16")
    assert (figure.status, figure.base, figure.hardened) == ("skipped", None, None)
    assert "base itself" in figure.note


@pytest.mark.parametrize(
    ("difference", "expected"),
    [(0.0, "kept"), (0.009, "kept"), (-0.009, "kept"), (0.02, "degraded"), (-0.02, "degraded"), (0.68, "degraded"),
     (0.70, "broken"), (None, "broken")],
)  # fmt: skip
def test_the_limits_of_a_loss(difference: float | None, expected: str) -> None:
    assert judge("loss", 2.0, None if difference is None else 2.0 + difference) == expected


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecDefError, match="'int7'"):
        measure_deployment(TINY_LLAMA, TINY_LLAMA, None, ["int7"])
    with pytest.raises(SpecDefError, match="5 tokens"):
        token_batch(TINY_LLAMA, "short", length=128)
    bare = write_case("llama", tmp_path / "bare")
    with pytest.raises(SpecDefError, match="no tokenizer"):
        token_batch(bare, "text")


@pytest.mark.slow
def test_a_compiled_fold_keeps_its_loss(fold: Path, tokens: torch.Tensor) -> None:
    figure = one(TINY_LLAMA, fold, tokens, "compile")
    if figure.status == "skipped":
        pytest.skip(figure.note)
    assert figure.status == "kept"
    assert figure.hardened == pytest.approx(one(TINY_LLAMA, fold, tokens, "float32").base, abs=1e-4)
