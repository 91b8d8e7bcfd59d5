"""A converted adapter does on the hardened model what it did on the base, attached and merged; the rest is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.adapter import convert_adapter
from specdef_cli.hardening.options import Factors, Fold, Scale
from specdef_cli.model import load_model
from specdef_cli.model.opened import open_model
from tests.commands import assert_refused, call_cli, succeed
from tests.hardened import harden_to
from tests.hardening.mutations import edit_json, edit_tensors, spoiled


def lora(base: Path, out: Path, *, head: bool = False, **settings: Any) -> Path:
    """An adapter of every linear layer whose B is not zero."""
    model = load_model(base)
    torch.manual_seed(0)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and (head or "lm_head" not in name)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": names} | settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(out)
    return out


def logits(directory: Path, adapter: Path | None = None, *, merged: bool = False) -> torch.Tensor:
    model: Any = load_model(directory)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, str(adapter))
        if merged:
            model = model.merge_and_unload()
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


HARDENED: dict[str, Fold | Scale | Factors] = {"fold": Fold(), "scale": Scale(), "factors": Factors(alpha=1e3, top_k=4)}


# Separate and fused tensors, grouped queries, biases; Conv1D, whose weights are transposed; per-head fused; tied heads.
@pytest.mark.parametrize(
    ("case", "way"),
    [("llama", "fold"), ("phi3", "fold"), ("gpt2-untied", "fold"), ("gpt-neox", "fold"), ("llama", "factors"),
     ("gpt2", "factors"), ("llama-tied", "scale"), ("gemma3", "scale"), ("gpt2", "scale")],
)  # fmt: skip
def test_a_converted_adapter_does_the_same(case: str, way: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base, hardened = checkpoints[case], tmp_path / "hardened"
    harden_to(hardened, base, HARDENED[way])
    adapter = lora(base, tmp_path / "lora", head=case in ("llama", "llama-tied"))
    converted = convert_adapter(str(adapter), open_model(hardened), tmp_path / "converted")
    assert converted.rewritten > 0
    plain, expected = logits(base), logits(base, adapter)
    scale = float((expected - plain).abs().max())
    assert scale > 0.01
    # Merged, the adapter of a tied head changes the embedding too, on the base as well.
    for merged in (False,) if case == "llama-tied" else (False, True):
        found = logits(hardened, tmp_path / "converted", merged=merged)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * scale)
    if (case, way) == ("llama", "fold"):  # unconverted it is another function
        assert not torch.allclose(logits(hardened, adapter), expected, rtol=0.1, atol=0.1)


def test_ranks_alphas_and_rslora_are_kept(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base, hardened = checkpoints["llama"], tmp_path / "hardened"
    harden_to(hardened, base, Scale())
    adapter = lora(
        base, tmp_path / "lora", target_modules=["q_proj", "up_proj"], layers_to_transform=[1], use_rslora=True,
        rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 32},
    )  # fmt: skip
    convert_adapter(str(adapter), open_model(hardened), tmp_path / "converted")
    expected = logits(base, adapter)
    torch.testing.assert_close(logits(hardened, tmp_path / "converted"), expected, rtol=0, atol=1e-5)
    assert float((expected - logits(base)).abs().max()) > 0.01


@pytest.fixture(scope="module")
def places(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(adapter, hardened, base)."""
    root, base = tmp_path_factory.mktemp("adapter"), tiny_model("llama")
    harden_to(root / "fold", base)
    return lora(base, root / "lora"), root / "fold", base


DOWN = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], tuple[str, ...]]] = {
    "DoRA": (lambda _: None, {"use_dora": True}, ("use_dora=True", "merge_and_unload")),
    "biases": (lambda _: None, {"bias": "all"}, ("bias='all'", "merge_and_unload")),
    "whole modules": (lambda _: None, {"modules_to_save": ["lm_head"]}, ("modules_to_save", "lm_head")),
    "PiSSA": (lambda _: None, {"init_lora_weights": "pissa"}, ("init_lora_weights='pissa'",)),
    "another kind": (lambda _: None, {"peft_type": "IA3"}, ("IA3", "only LORA")),
    "a layer too many": (
        lambda w: w.update({name.replace("layers.0", "layers.9"): w[name].clone() for name in list(w)}), {},
        ("model.layers.9", "that was hardened"),
    ),
    "another width": (lambda w: w.update({DOWN: w[DOWN][:, :3].clone()}), {}, ("down_proj", "that was hardened")),
    "one half": (lambda w: w.pop(DOWN), {}, ("lora_A and lora_B",)),
    "nothing": (lambda w: w.clear(), {}, ("lora_A and lora_B",)),
    "an embedding": (
        lambda w: w.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 8)}), {},
        ("embed_tokens", "linear"),
    ),
    "what is not finite": (lambda w: w.update({DOWN: w[DOWN] * torch.inf}), {}, ("down_proj.lora_A", "Train")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted(case: str, places: tuple[Path, Path, Path], tmp_path: Path, outside: Path) -> None:
    adapter, fold, _ = places
    change, settings, words = REFUSED[case]
    weights = partial(edit_tensors, change=change, name="adapter_model.safetensors")
    changed = spoiled(adapter, tmp_path, edit_json("adapter_config.json", **settings), weights)
    assert_refused(call_cli("convert-adapter", changed, fold, "--out", outside / "converted"), *words, empty=outside)


def test_places_that_do_not_fit(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    adapter, fold, base = places
    assert_refused(call_cli("convert-adapter", adapter, base, "--out", tmp_path / "new"), "specdef.json")
    assert_refused(call_cli("convert-adapter", adapter, fold, "--out", base), "exists already")
    assert_refused(call_cli("convert-adapter", base, fold, "--out", tmp_path / "new"), "adapter_config.json")
    succeed("convert-adapter", adapter, fold, "--out", tmp_path / "once")
    assert_refused(call_cli("convert-adapter", tmp_path / "once", fold, "--out", tmp_path / "new"), "converted already")
    with pytest.raises(SpecDefError, match="lies in the input"):
        convert_adapter(str(adapter), open_model(fold), fold / "new")
    assert not (tmp_path / "new").exists()
