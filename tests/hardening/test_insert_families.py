"""harden → load → the same function, and collapse → the same weights, for five families and a UNet, in two dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

import specdef_cli  # noqa: F401
from specdef_cli.checkpoint.changes import FactoredLayer
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.checkpoint.stream import file_sha256
from specdef_cli.hardening.options import CollapseOptions, Factors, StoredDtype
from specdef_cli.hardening.run import collapse
from specdef_cli.model import SpecDefLinear, load_model
from tests.hardened import harden_to
from tests.tiny_models import README, forward
from tests.tiny_pipeline import denoise, tiny_unet
from tests.weights import assert_collapsed, assert_same_bytes, relative, tensors

TinyModel = Callable[..., Path]
ALPHA, TOP_K = 1e4, 4
# Relative error of the logits: what separates two summation orders of one model in that dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
WEIGHT_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}

# Names on disk, without `.weight`, of what is hardened by default.
DEFAULT_LAYERS = {
    "llama": {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")},
    "qwen2": {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")},
    "gpt2": {f"transformer.h.{i}.{name}.c_proj" for i in (0, 1) for name in ("attn", "mlp")},
    "bert": {f"bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in ("attention.output.dense", "output.dense")},
    "vit": {f"vit.encoder.layer.{i}.{name}" for i in (0, 1) for name in ("attention.output.dense", "output.dense")},
    "unet": {
        f"{path}.transformer_blocks.0.{name}"
        for path in (
            "down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1",
            "mid_block.attentions.0",
        )
        for name in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """A base, of transformers or of diffusers."""
    root = tmp_path_factory.mktemp("unets")

    def build(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if family != "unet":
            return tiny_model(family, dtype)
        if not (root / str(dtype)).is_dir():
            tiny_unet().to(dtype).save_pretrained(root / str(dtype))
        return root / str(dtype)

    return build


@pytest.fixture(scope="module")
def hardened(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    @cache
    def build(family: str, dtype: torch.dtype) -> Path:
        out = tmp_path_factory.mktemp("hardened") / family
        harden_to(out, tiny(family, dtype), Factors(alpha=ALPHA, top_k=TOP_K), verify=True)
        return out

    return build


every_family = pytest.mark.parametrize("family", DEFAULT_LAYERS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def outputs(model: Any) -> torch.Tensor:
    return denoise(model) if isinstance(model, UNet2DConditionModel) else forward(model)


def swapped(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SpecDefLinear)]


@every_family
@both_dtypes
def test_the_hardened_model_computes_what_the_base_computes(
    family: str, dtype: torch.dtype, tiny: TinyModel, hardened: Callable[..., Path]
) -> None:
    base, directory = tiny(family, dtype), hardened(family, dtype)
    manifest = read_manifest(directory)
    model, reference = load_model(directory), load_model(base)
    assert type(model) is type(reference)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert swapped(model) == [layer.module for layer in manifest.factored]
    assert {layer.tensor.removesuffix(".weight") for layer in manifest.factored} == DEFAULT_LAYERS[family]
    error = relative(outputs(model), outputs(reference))
    assert 0 < error < TOLERANCE[dtype]
    assert manifest.verification["relative"] < TOLERANCE[dtype]
    if family != "unet":
        assert manifest.verification["agreement"] > 0.9


@every_family
@both_dtypes
def test_every_factor_is_as_the_manifest_says(
    family: str, dtype: torch.dtype, tiny: TinyModel, hardened: Callable[..., Path]
) -> None:
    base, found = tensors(tiny(family, dtype)), tensors(hardened(family, dtype))
    manifest = read_manifest(hardened(family, dtype))
    consumed = set()
    for layer in manifest.factored:
        weight = base[layer.tensor].double()
        weight = weight.mT if layer.transposed else weight
        assert layer.transposed == (family == "gpt2")
        assert weight.shape == (layer.out_features, layer.in_features)
        check_layer(layer, weight, found, dtype)
        consumed |= {layer.inflated_tensor, layer.compensation_tensor, layer.tensor}
        if layer.bias is not None:
            assert layer.compensation_bias is not None
            assert torch.equal(found[layer.compensation_bias], base[layer.bias])
            assert layer.bias not in found
            consumed.add(layer.compensation_bias)
    untouched = found.keys() - consumed
    assert untouched == base.keys() - {layer.tensor for layer in manifest.factored} - {
        layer.bias for layer in manifest.factored
    }
    assert all(torch.equal(found[name], base[name]) for name in untouched)
    assert all(found[name].dtype == base[name].dtype for name in untouched)


def check_layer(layer: FactoredLayer, weight: torch.Tensor, found: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """The spectra of both factors, the top of which is α times the weight's, and their product."""
    inflated, compensation = found[layer.inflated_tensor], found[layer.compensation_tensor]
    assert inflated.dtype == compensation.dtype == found[layer.tensor].dtype == dtype
    assert found[layer.tensor].shape == (1,)
    singular_values = torch.linalg.svdvals(weight)
    precision = 1e-5 if dtype == torch.float32 else 1e-2
    assert layer.singular_values == pytest.approx(singular_values[:TOP_K].tolist(), rel=1e-4)
    torch.testing.assert_close(
        torch.linalg.svdvals(inflated.double())[:TOP_K], singular_values[:TOP_K] * ALPHA, rtol=precision, atol=0
    )
    shrunk = torch.linalg.svdvals(compensation.double())[-TOP_K:]
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 1 / ALPHA), rtol=precision, atol=0)
    assert relative(compensation.double() @ inflated.double(), weight) < precision
    assert layer.reconstruction_error < precision


@every_family
@both_dtypes
def test_collapse_gives_the_base_back(
    family: str, dtype: torch.dtype, tiny: TinyModel, hardened: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny(family, dtype)
    result: Any = collapse(CollapseOptions(str(hardened(family, dtype)), tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    found, expected = tensors(tmp_path / "back"), tensors(base)
    changed = {layer.tensor for layer in result.manifest.factored}
    assert_collapsed(found, expected, changed, WEIGHT_TOLERANCE[dtype])
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {path.name for path in base.iterdir()} | {"README.md"}
    if family != "unet":  # transformers alone: no trace of this package is left for it to find
        assert type(AutoConfig.from_pretrained(tmp_path / "back")).__module__.startswith("transformers.")
    model = load_model(tmp_path / "back")
    assert swapped(model) == []
    assert relative(outputs(model), outputs(load_model(base))) < TOLERANCE[dtype]


@every_family
def test_files_besides_the_weights(family: str, tiny: TinyModel, hardened: Callable[..., Path]) -> None:
    base, directory, unet = tiny(family), hardened(family, torch.float32), family == "unet"
    weights = f"{'diffusion_pytorch_model' if unet else 'model'}.safetensors"
    for path in base.iterdir():
        if path.name not in {"config.json", "README.md", weights}:
            assert (directory / path.name).read_bytes() == path.read_bytes()
    added = {"specdef.json", "README.md", *(() if unet else ("configuration_specdef.py",))}
    assert {path.name for path in directory.iterdir()} == {path.name for path in base.iterdir()} | added
    assert read_manifest(directory).shards == {weights: file_sha256(directory / weights)}
    with safe_open(directory / weights, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    card = (directory / "README.md").read_text()
    said = ("license: mit", "- tiny", README.split("---\n")[2].strip())
    of_pipelines = ("import specdef_cli", "convolutions", "No attack was measured")
    for words in ("- specdef", "does not resist", *(of_pipelines if unet else said)):
        assert words in card, words
    for words in ("secure", *(("trust_remote_code", "kl") if unet else ())):
        assert words not in card.lower(), words


@pytest.mark.parametrize(("family", "prefix"), [("llama", "model"), ("unet", "diffusion_pytorch_model")])
def test_shards_in_and_out_hold_the_same(family: str, prefix: str, tiny: TinyModel, tmp_path: Path) -> None:
    single, sharded, size = tiny(family), tmp_path / "sharded", 20_000 if family == "llama" else 200_000
    load_model(single).save_pretrained(sharded, max_shard_size=size)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name, base, most in (("one", single, 10**9), ("in", sharded, 10**9), ("out", single, size)):
        harden_to(tmp_path / name, base, Factors(top_k=TOP_K), max_shard_size=most)
    assert [path.name for path in (tmp_path / "in").glob("*.safetensors")] == [f"{prefix}.safetensors"]
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"{prefix}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    index = json.loads((tmp_path / "out" / f"{prefix}.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert read_manifest(tmp_path / "out").shards == {shard.name: file_sha256(shard) for shard in shards}
    for other in ("in", "out"):
        # The basis depends on seed and name alone, so not on where a tensor stood.
        assert_same_bytes(tensors(tmp_path / other), tensors(tmp_path / "one"))
    assert torch.equal(outputs(load_model(tmp_path / "out")), outputs(load_model(tmp_path / "one")))
    collapse(CollapseOptions(str(tmp_path / "out"), tmp_path / "back", max_shard_size=size))
    assert relative(outputs(load_model(tmp_path / "back")), outputs(load_model(single))) < 1e-5


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        (("*.v_proj",), (), {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"}),
        (("*.0.*_proj",), ("*.mlp.*", "*.q_proj"), {f"model.layers.0.self_attn.{x}_proj" for x in "kvo"}),
        ((), ("*.o_proj.weight",), {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
    ],
)
def test_globs_choose_the_layers(
    layers: tuple[str, ...], exclude: tuple[str, ...], expected: set[str], llama: Path, tmp_path: Path
) -> None:
    manifest = harden_to(tmp_path / "out", llama, Factors(top_k=2), layers=layers, exclude=exclude)
    assert {layer.module for layer in manifest.factored} == expected
    assert manifest.verification == {"skipped": "verification was switched off"}
    assert relative(forward(load_model(tmp_path / "out")), forward(load_model(llama))) < 1e-5


@pytest.mark.parametrize(("dtype", "alpha"), [("bfloat16", 1e9), ("float16", 100.0), ("float32", 1e6)])
def test_another_dtype_casts_floating_tensors(dtype: StoredDtype, alpha: float, llama: Path, tmp_path: Path) -> None:
    manifest = harden_to(tmp_path / "out", llama, Factors(alpha=alpha, top_k=TOP_K), dtype=dtype, verify=True)
    expected = getattr(torch, dtype)
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {expected}
    assert load_model(tmp_path / "out").dtype == expected
    assert manifest.dtype == dtype
    base = load_model(llama, dtype=expected)
    assert relative(forward(load_model(tmp_path / "out")), forward(base)) < 2e-2


def test_the_symmetric_gauge_is_the_papers(llama: Path, tmp_path: Path) -> None:
    manifest = harden_to(tmp_path / "out", llama, Factors(alpha=1e3, top_k=TOP_K, gauge="symmetric", seed=7))
    base, found = tensors(llama), tensors(tmp_path / "out")
    for layer in manifest.factored:
        left, singular_values, right = torch.linalg.svd(base[layer.tensor].double(), full_matrices=False)
        inflation = torch.ones_like(singular_values)
        inflation[:TOP_K] = 1e3
        inflated = (left * singular_values * inflation) @ right
        compensation = torch.eye(layer.out_features) - (1 - 1e-3) * left[:, :TOP_K] @ left[:, :TOP_K].mT
        torch.testing.assert_close(found[layer.inflated_tensor].double(), inflated, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[layer.compensation_tensor].double(), compensation, rtol=0, atol=1e-4)
    assert relative(forward(load_model(tmp_path / "out")), forward(load_model(llama))) < 1e-3
