"""Linear sites against what transformers itself loads: the oracle is the loaded model's own parameters."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from specdef_cli.checkpoint.changes import FactoredLayer
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import Factors
from specdef_cli.model.loading import meta_model
from specdef_cli.model.sites import LinearSite, linear_sites, require_findable
from tests.hardened import harden_to
from tests.tiny_families import CASES, build_config, skeleton_of, write_case


@cache
def sites_of(directory: Path) -> tuple[LinearSite, ...]:
    return linear_sites(skeleton_of(directory))


@pytest.mark.parametrize("case", CASES)
def test_sites_are_the_tensors_that_transformers_loads_there(checkpoints: dict[str, Path], case: str) -> None:
    directory = checkpoints[case]
    disk = load_file(directory / "model.safetensors")
    model = getattr(transformers, CASES[case][0]).from_pretrained(directory)
    sites = sites_of(directory)
    assert sites
    for site in sites:
        # Heads, embeddings and tied weights are no sites.
        assert not any(word in site.module for word in ("lm_head", "embed", "cls.", "score", "classifier"))
        module = model.get_submodule(site.module)
        assert torch.equal(module.weight, disk[site.tensor])
        assert isinstance(module, Conv1D) == site.transposed
        shape = tuple(disk[site.tensor].shape)
        assert (site.out_features, site.in_features) == (shape[::-1] if site.transposed else shape)
        assert (module.bias is None) == (site.bias is None)
        if site.bias is not None:
            assert torch.equal(module.bias, disk[site.bias])


@pytest.mark.parametrize("case", CASES)
def test_every_block_has_one_writer_a_sublayer(checkpoints: dict[str, Path], case: str) -> None:
    sites = sites_of(checkpoints[case])
    outputs = [site for site in sites if site.role == "attention_output"]
    downs = [site for site in sites if site.role == "mlp_down"]
    attentions, dense_mlps = {
        **dict.fromkeys(("t5", "t5-gated", "t5-untied"), (6, 4)),
        **dict.fromkeys(("mixtral", "mixtral-stacked", "gpt-oss"), (2, 0)),
    }.get(case, (2, 2))
    if case == "qwen3-moe":  # one of its two blocks has a dense MLP, the other one stacked experts
        dense_mlps = 1
    assert (len(outputs), len(downs)) == (attentions, dense_mlps)
    assert {site.out_features for site in outputs + downs} == {32}


def test_structural_roles_agree_with_the_table(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    by_table = {case: sites_of(checkpoints[case]) for case in CASES}
    monkeypatch.setattr("specdef_cli.model.body.FAMILIES", {})
    for case in CASES:
        assert linear_sites(skeleton_of(checkpoints[case])) == by_table[case], case


def factored(sites: Iterable[LinearSite]) -> list[FactoredLayer]:
    return [
        FactoredLayer(
            site.module, site.tensor, site.out_features, site.in_features, site.bias, site.transposed,
            alpha=2.0, top_k=1, gauge="rotated", singular_values=(), reconstruction_error=0.0,
        )
        for site in sites
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_factors_of_every_linear_reach_their_modules(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """``harden`` loads what it wrote, and compares it with the base."""
    manifest = harden_to(tmp_path / "out", checkpoints[case], Factors(alpha=16.0, top_k=1), layers=("*",), verify=True)
    assert {layer.module for layer in manifest.factored} == {site.module for site in sites_of(checkpoints[case])}
    assert manifest.verification["relative"] < 1e-5


def test_a_renaming_that_leads_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    directory = write_case("vit", tmp_path)
    sites = sites_of(directory)
    from transformers.core_model_loading import WeightRenaming

    monkeypatch.setattr(
        "specdef_cli.model.skeleton.get_model_conversion_mapping",
        lambda model: [WeightRenaming(r"encoder\.layer\.(\d+)\.output\.dense\.weight", r"layers.\1.mlp.fc2.weight")],
    )
    with pytest.raises(SpecDefError, match="inflated"):
        require_findable(skeleton_of(directory), factored(sites))


def test_meta_model_needs_no_memory_and_no_architectures() -> None:
    config = build_config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 28672, 3
    config.architectures = None
    model = meta_model(config)
    assert type(model).__name__ == "LlamaModel"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert config.architectures is None
