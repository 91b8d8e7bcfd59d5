"""Models that take two inputs, layers that only look like linears, and weights that are loaded in another dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.model import load_model, opened
from tests.commands import assert_refused, call_cli, snapshot, succeed
from tests.hardening.mutations import config, spoiled
from tests.tiny_kinds import write_kind

FACTORS = ("--method", "factors", "--top-k", "4")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_model_of_two_inputs_is_verified_with_both(name: str, tmp_path: Path) -> None:
    model, out = write_kind(name, tmp_path / "model"), tmp_path / "out"
    result = succeed("harden", model, "--out", out, *FACTORS, "--json")
    assert 0 < json.loads(result.stdout)["manifest"]["verification"]["relative"] < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_model_without_a_batch_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_kind("time series", tmp_path / "model")
    command = ("harden", model, "--out", tmp_path / "out", *FACTORS, "--quiet")
    before = snapshot(tmp_path)
    refused = call_cli(*command)
    assert_refused(refused, "TimeSeriesTransformerModel takes past_values", "--no-verify", "before you publish it")
    assert call_cli(*command, "--dry-run") == refused
    assert snapshot(tmp_path) == before


def test_a_linear_whose_weight_is_read_past_it_is_not_planned(tmp_path: Path) -> None:
    """nn.MultiheadAttention hands its out_proj's weight to a kernel."""
    model = write_kind("siglip vision", tmp_path / "model")
    command = ("harden", model, *FACTORS, "--layers", "*out_proj")
    plan = json.loads(call_cli(*command, "--dry-run", "--json").stdout)
    assert (plan["layers"], plan["changed"]) == (2, {"self_attn.out_proj": 2})
    succeed(*command, "--out", tmp_path / "out")
    assert load_model(tmp_path / "out") is not None
    assert_refused(call_cli(*command[:-1], "head.attention.out_proj", "--dry-run"), "matches no linear layer")


def test_layers_whose_weight_the_model_s_own_code_reads_are_left_out(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj itself; without it, an architecture that nobody described is kept."""
    model = write_kind("mamba", tmp_path / "model")
    command = ("harden", model, "--method", "scale", "--json", "--out", tmp_path / "out")
    result = succeed(*command)
    manifest = json.loads(result.stdout)["manifest"]
    assert manifest["verification"]["equal"]
    scaled = {module["module"].rpartition(".")[2] for module in manifest["scaled"]}
    assert "in_proj" in scaled
    assert "dt_proj" not in scaled


@pytest.mark.parametrize("verify", [(), ("--no-verify",)], ids=["verified", "not verified"])
def test_what_nobody_could_load_is_never_published(
    verify: tuple[str, ...], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the published config.json lists a layer that the files do not hold."""
    checked = opened.load_model

    def spoil_first(directory: Path, **arguments: Any) -> Any:
        path = directory / "config.json"
        data = json.loads(path.read_text())
        layers = data["quantization_config"]["layers"]
        layers["model.layers.0.self_attn.q_proj"] = dict(layers["model.layers.0.self_attn.o_proj"])
        path.write_text(json.dumps(data))
        return checked(directory, **arguments)

    monkeypatch.setattr(opened, "load_model", spoil_first)
    result = call_cli("harden", llama, "--out", tmp_path / "out", *FACTORS, "--quiet", *verify)
    assert_refused(result, "q_proj", empty=tmp_path)


FLOAT16 = config(dtype="float16")


def test_a_fold_of_what_is_loaded_in_float16(llama: Path, tmp_path: Path) -> None:
    model = spoiled(llama, tmp_path, FLOAT16)
    command = ("harden", model, "--method", "fold", "--quiet")
    for more in (("--dry-run",), ("--out", tmp_path / "a"), ("--out", tmp_path / "a", "--no-verify")):
        assert_refused(call_cli(*command, *more), "float16", "--dtype bfloat16 or float32")
    for dtype in ("bfloat16", "float32"):  # as the hint says
        succeed(*command, "--dtype", dtype, "--out", tmp_path / dtype)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto")
        assert str(loaded.dtype) == f"torch.{dtype}"
        assert loaded(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_factors_of_what_is_loaded_in_float16(llama: Path, tmp_path: Path) -> None:
    model = spoiled(llama, tmp_path, config(torch_dtype="float16", dtype="float16"))
    command = ("harden", model, *FACTORS, "--quiet", "--out")
    refused = call_cli(*command, tmp_path / "a")
    assert_refused(refused, "float16, in which config.json has the model loaded", "--alpha 100", "--dtype bfloat16")
    for name, more in (("alpha", ("--alpha", "100")), ("dtype", ("--dtype", "bfloat16"))):  # as the hint says
        succeed(*command, tmp_path / name, *more)


def test_the_symmetric_gauge_of_what_is_loaded_in_bfloat16(llama: Path, tmp_path: Path) -> None:
    model = spoiled(llama, tmp_path, config(dtype="bfloat16"))
    command = ("harden", model, *FACTORS, "--gauge", "symmetric", "--quiet", "--out")
    refused = call_cli(*command, tmp_path / "a")
    assert_refused(refused, "bfloat16, in which config.json has the model loaded", "--dtype float32")
    succeed(*command, tmp_path / "b", "--dtype", "float32")  # as the hint says
    assert read_manifest(tmp_path / "b").dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_alpha_beyond_the_range_is_not_told_to_use_what_it_uses(dtype: str, llama: Path, tmp_path: Path) -> None:
    command = ("harden", llama, *FACTORS, "--dtype", dtype, "--quiet", "--out", tmp_path / "out", "--alpha")
    refused = call_cli(*command, "1e40")
    assert_refused(refused, f"1e+40 would break the function in {dtype}", "--alpha", empty=tmp_path)
    assert "--dtype" not in refused.stderr
    advised = refused.stderr.split("--alpha ")[1].split()[0]
    succeed(*command, advised)


def test_outputs_that_are_not_finite_have_a_message_of_their_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specdef_cli.hardening import verify

    outputs = verify._outputs

    def broken(load: Any, *arguments: Any) -> torch.Tensor:
        found = outputs(load, *arguments)
        return found if load.__self__.directory == llama else found * float("nan")

    monkeypatch.setattr(verify, "_outputs", broken)
    for method, words in (("factors", "smaller --alpha"), ("fold", "--method scale"), ("scale", "--method factors")):
        result = call_cli("harden", llama, "--out", tmp_path / "out", "--method", method, "--quiet",
                          *(FACTORS[2:] if method == "factors" else ()))  # fmt: skip
        assert_refused(result, "NaN or infinity, and the base's do not", words, empty=tmp_path)
