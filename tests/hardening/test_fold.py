"""What a fold does to weights and gradients, which channels it takes, and which requests it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from specdef_cli.checkpoint.changes import ScaledSlice
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.checkpoint.reader import open_checkpoint
from specdef_cli.checkpoint.shards import scale_slice
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening import fold
from specdef_cli.hardening.fold import HIGHEST_EXPONENT, SAMPLE_ROWS, constant, fold_pairs, spread
from specdef_cli.hardening.options import Construction, Factors, Fold, HardenOptions, Scale
from specdef_cli.hardening.plan import make_plan
from specdef_cli.model.body import Side, SymmetricPair
from specdef_cli.model.opened import open_model
from tests.commands import assert_refused, call_cli, succeed
from tests.hardened import harden_to
from tests.tiny_families import write_case
from tests.tiny_kinds import write_kind


@pytest.mark.parametrize(("construction", "matches"), [(Fold(), 1), (Factors(), 2), (Scale(), 2)])
def test_names_are_matched_once(
    construction: Construction, matches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one model, too. The names that factors and scales add are matched beside the base's."""
    base = write_case("llama", tmp_path / "base")
    models = []

    def counted(model: transformers.PreTrainedModel) -> list[object]:
        models.append(model)
        return get_model_conversion_mapping(model)

    monkeypatch.setattr("specdef_cli.model.skeleton.get_model_conversion_mapping", counted)
    make_plan(open_model(base), HardenOptions(str(base), tmp_path / "x", construction))
    assert len(models) == matches
    assert len({id(model) for model in models}) == 1


def gradients(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    tokens = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    assert torch.isfinite(norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-30)
    optimizer.step()
    for state in optimizer.state.values():
        assert torch.isfinite(state["exp_avg_sq"]).all()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("steps", [None, partial(constant, alpha=2.0**HIGHEST_EXPONENT)], ids=["profile", "highest"])
def test_gradients_are_those_of_the_base_by_the_inverse_factors(
    dtype: torch.dtype, steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """∂L/∂(2^e·θ) = 2^-e·∂L/∂θ, bit for bit: nothing over- or underflows, not even where every exponent is the highest.

    Adam's squares and the norm that clipping computes stay finite too, so that what keeps an attacker from training is
    the factors and not an overflow that one line repairs.
    """
    base = write_case("llama", tmp_path / "base")
    if steps is not None:
        monkeypatch.setattr(fold, "exponents_of", lambda pairs, profile: spread(pairs, 2, steps))
    manifest = harden_to(tmp_path / "out", base)
    expected, found = gradients(base, dtype), gradients(tmp_path / "out", dtype)
    assert expected.keys() == found.keys()
    for pair in manifest.folded:
        for part in pair.slices:
            scale_slice(found[part.tensor], part)  # the fold's own factors take the inverse ones out
    for name, gradient in expected.items():
        assert gradient.any()
        assert torch.equal(found[name], gradient), name


def checkpoint_of(directory: Path, **tensors: torch.Tensor) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return directory


def folded_channels(directory: Path, pair: SymmetricPair) -> tuple[int, ...]:
    (found,) = fold_pairs(open_checkpoint(directory), [pair], "float16-cache")
    return found.channels


def singles(count: int) -> tuple[tuple[int, ...], ...]:
    return tuple((channel,) for channel in range(count))


MLP = SymmetricPair("mlp", "up_down", 6, (Side("up", 0, singles(6), 1), Side("down", 1, singles(6), -1)))
SCORES = SymmetricPair("a", "query_key", 6, (Side("query", 0, singles(6), 1), Side("key", 0, singles(6), -1)))
VALUES = SymmetricPair(
    "a", "value_output", 2, (Side("value", 0, singles(2), 1), Side("output", 1, ((0, 2), (1, 3)), -1))
)
NORMS = torch.tensor([3.0, 0.0, 5.0, 1.0, 4.0, 2.0])


@pytest.mark.parametrize(
    ("pair", "tensors", "expected"),
    [
        (MLP, {"up": torch.ones(6, 5), "down": torch.ones(4, 6) * NORMS}, (2, 4)),
        (SCORES, {"query": torch.ones(6, 9), "key": torch.ones(6, 4) * NORMS[:, None]}, (4, 0)),
        (VALUES, {"value": torch.ones(2, 9), "output": torch.ones(4, 4) * torch.tensor([1.0, 9.0, 8.0, 4.0])}, (1,)),
    ],
    ids=["the largest of the smaller side", "of middling norm where a cache holds them", "a group of heads together"],
)
def test_which_channels_are_taken(
    pair: SymmetricPair, tensors: dict[str, torch.Tensor], expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert folded_channels(checkpoint_of(tmp_path / "m", **tensors), pair) == expected


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("axis", [1, 2])
def test_stacked_experts_are_measured_in_their_own_block(block: int, axis: int, tmp_path: Path) -> None:
    stacked = torch.ones(3, 5, 5)
    for expert in range(3):
        stacked[expert].select(axis - 1, expert + 1).mul_(7)
    # The other side is larger, so that this one is measured.
    directory = checkpoint_of(tmp_path / "m", stacked=stacked, other=torch.ones(5, 50))
    sides = (Side("stacked", axis, singles(5), 1, block), Side("other", 0, singles(5), -1))
    assert folded_channels(directory, SymmetricPair("e", "up_down", 5, sides))[0] == block + 1


def test_planning_reads_a_sample_of_a_large_matrix(tmp_path: Path) -> None:
    """Columns: the first rows tell. What comes after them is never read, however large the matrix is."""
    down = torch.ones(5 * SAMPLE_ROWS, 6)
    down[:, 4] = 2
    down[SAMPLE_ROWS:, 1] = 1000
    directory = checkpoint_of(tmp_path / "m", up=torch.ones(6, 5 * SAMPLE_ROWS), down=down)
    assert folded_channels(directory, MLP)[0] == 4


def test_a_pair_of_zeros_is_left_out(tmp_path: Path) -> None:
    directory = checkpoint_of(tmp_path / "m", up=torch.zeros(6, 4), down=torch.zeros(4, 6))
    assert fold_pairs(open_checkpoint(directory), [MLP], "float16-cache") == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_would_be_rounded_or_flushed_is_refused_and_left_as_it_was(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    for value, exponent in ((1.0, 128), (tiny, -1), (2 * tiny, -2), (torch.finfo(dtype).max, 1)):
        tensor = torch.tensor([[1.0, value]], dtype=dtype)
        before = tensor.clone()
        with pytest.raises(SpecDefError, match="range of"):
            scale_slice(tensor, ScaledSlice("w", 1, None, (1,), (exponent,)))
        assert torch.equal(tensor, before)
    fits = torch.tensor([[1.0, tiny]], dtype=dtype)
    scale_slice(fits, ScaledSlice("w", 1, None, (1,), (3,)))
    assert fits[0, 1] == 8 * tiny


LOST = "float16 weights, 8- and 4-bit quantization (bitsandbytes, torchao, GGUF), float8, merging "
ONE_SIDED = "lm_head, mlp.down_proj, mlp.gate_proj, self_attn.o_proj"
# Options → what stands in the card and is said before the work, in the card alone, and not in the card.
SAID: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "fold": (
        (),
        (LOST,),
        (
            "bit for bit", "rebalancing", "merging with models", "float16-cache profile", "model.embed_tokens",
            f"as one side is scaled: {ONE_SIDED}. ",
        ),
        ("compensation", "These weights compute", "secure"),
    ),
    "bfloat16 profile": (("--profile", "bfloat16"), ("float16 key/value cache",), ("bit for bit",), ("secure",)),
    "factors": (
        ("--method", "factors", "--top-k", "4"),
        (LOST,),
        ("freezing the compensation", "embed_tokens"),
        ("These weights compute", "secure"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_the_card_and_the_notes_say_what_holds_and_what_is_lost(case: str, llama: Path, tmp_path: Path) -> None:
    options, both, in_card, absent = SAID[case]
    told = " ".join(succeed("harden", llama, "--out", tmp_path / "out", *options).stderr.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert [words for words in both if words not in told or words not in card] == []
    assert [words for words in in_card if words not in card] == []
    assert [words for words in absent if words in card.lower() or words in card] == []
    manifest = read_manifest(tmp_path / "out")
    if case == "fold":
        free = card.partition("as fast as before when nothing else trains: ")[2].partition(".  ")[0]
        assert "model.embed_tokens" in free
        assert "self_attn.q_proj" not in free
        assert f"Scaled on one side only: {ONE_SIDED}." in told
    if case == "bfloat16 profile":  # one staircase over all pairs, beyond what a float16 cache holds
        assert manifest.verification["equal"]
        cached = [pair for pair in manifest.folded if pair.kind in ("value_output", "query_key")]
        assert min(abs(exponent) for pair in cached for exponent in pair.exponents) >= 13
        assert max(abs(exponent) for pair in manifest.folded for exponent in pair.exponents) == 28
    if case == "factors":
        first = card.split("## SpecDef")[1].strip().splitlines()[0]
        assert first.startswith("On a fixed batch the outputs of these weights are within ")
        assert f"{manifest.verification['relative']:.1e} (relative)" in first


def test_the_last_mlp_and_the_first_attention_stand_apart(llama: Path, tmp_path: Path) -> None:
    """Elsewhere no side of a pair reaches what two sides that cross have together; a cache holds 2**9."""
    out = tmp_path / "out"
    succeed("harden", llama, "--out", out, "--method", "fold")
    steps = {pair.name: {abs(exponent) for exponent in pair.exponents} for pair in read_manifest(out).folded}
    last = max(int(name.split(".")[2]) for name in steps if ".layers." in name)
    assert steps.pop("model.layers.0.input_layernorm.norm_readers") == {40}
    assert steps.pop(f"model.layers.{last}.mlp.up_down") == {28}
    assert steps.pop(f"model.layers.{last}.post_attention_layernorm.norm_readers") == {28}
    assert steps.pop("model.norm.norm_readers") == {28}
    for name, exponents in steps.items():
        cached = name.endswith(("value_output", "query_key"))
        assert exponents == {9} if cached else exponents <= set(range(13, 19)), name


@pytest.mark.parametrize(
    ("method", "option"),
    [
        *(("fold", option) for option in (("--alpha", "9"), ("--top-k", "4"), ("--gauge", "rotated"), ("--seed", "0"))),
        *(("scale", option) for option in (("--profile", "bfloat16"), ("--alpha", "100"), ("--top-k", "25"))),
        ("factors", ("--profile", "float16-cache")),
    ],
)
def test_an_option_of_another_method_is_wrong(
    method: str, option: tuple[str, str], llama: Path, tmp_path: Path
) -> None:
    """Even where it gives the default; the message names the method that has it, which takes it."""
    result = call_cli("harden", llama, "--out", tmp_path / "out", "--method", method, *option)
    owner = "fold" if option[0] == "--profile" else "factors"
    assert result.code == 2
    assert f"{option[0]} is an option of --method {owner}, not of {method}" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []
    succeed("harden", llama, "--method", owner, *option, "--dry-run")


def test_globs_choose_pairs(llama: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def kinds(base: Path = llama, **globs: tuple[str, ...]) -> set[str]:
        plan = make_plan(open_model(base), HardenOptions(str(base), tmp_path / "x", **globs))  # type: ignore[arg-type]
        return {pair.kind for pair in plan.folded}

    assert kinds(layers=("*.o_proj",)) == {"value_output"}
    assert kinds(layers=("*.down_proj.weight",)) == {"up_down"}
    assert kinds(exclude=("*norm*",)) == {"value_output", "query_key", "up_down"}
    # v_proj is in two pairs: with its output, and with the norm that it reads.
    assert kinds(layers=("*.v_proj",)) == {"value_output", "norm_readers"}
    # A ViT's files call vit.encoder.layer.0.layernorm_before what the model calls layers.0.layernorm_before.
    assert kinds(tiny_model("vit"), layers=("*layers.0.layernorm_before",)) == {"norm_readers"}


def test_a_family_that_is_not_described_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_kind("opt", tmp_path / "opt")
    for profile in ((), ("--profile", "quantizable", "--calibration", "none")):
        result = call_cli("harden", tmp_path / "opt", "--out", tmp_path / "out", *profile, "--quiet")
        assert_refused(result, "no symmetric pair to fold", "OPTForCausalLM", "not described", "--method scale")
    succeed("harden", tmp_path / "opt", "--out", tmp_path / "out", "--method", "scale", "--quiet")
