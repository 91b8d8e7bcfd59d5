"""A UNet of diffusers: harden → load in its pipeline → the same images; loud failure without the package; collapse."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from specdef_cli.hardening.options import Factors
from specdef_cli.hardening.survey import survey
from specdef_cli.model import load_model
from tests.commands import assert_refused, call_cli, environment, refusal, run_program
from tests.hardened import harden_to
from tests.hardening.mutations import edit_config, edit_tensors, spoiled
from tests.tiny_pipeline import denoise, tiny_unet, write_pipeline
from tests.weights import relative

SINGLE = "diffusion_pytorch_model.safetensors"
LAYER = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
PAIRS = 12


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``pipeline`` and ``hardened``."""
    root = tmp_path_factory.mktemp("pipelines")
    base = write_pipeline(root / "pipeline")
    shutil.copytree(base, root / "hardened", ignore=lambda *_: ["unet"])
    harden_to(root / "hardened" / "unet", base / "unet", Factors(top_k=4))
    return root


@pytest.fixture(scope="module")
def unets(pipelines: Path) -> tuple[Path, Path]:
    """Base and hardened directory."""
    return pipelines / "pipeline" / "unet", pipelines / "hardened" / "unet"


@pytest.mark.parametrize("scenario", ["with_package", "without_package"])
def test_in_a_process_of_its_own(scenario: str, pipelines: Path, tmp_path: Path) -> None:
    root = shutil.copytree(pipelines, tmp_path / "root")
    run_program(Path(__file__).with_name("plain_diffusers.py"), scenario, root, env=environment())


def test_another_dtype_and_other_layers(unets: tuple[Path, Path], tmp_path: Path) -> None:
    unet, chosen = unets[0], ("*.to_q", "time_embedding.*")
    manifest = harden_to(
        tmp_path / "out", unet, Factors(alpha=1e6, top_k=2), layers=chosen, dtype="bfloat16", verify=True
    )
    assert {layer.module.rsplit(".", 1)[-1] for layer in manifest.factored} == {"to_q", "linear_1", "linear_2"}
    assert "dtype" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model = load_model(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert relative(denoise(model), denoise(load_model(unet, dtype=torch.bfloat16))) < 2e-2


def test_survey_knows_base_and_hardened(unets: tuple[Path, Path]) -> None:
    base, directory = (survey(str(place)) for place in unets)
    assert base.architecture == directory.architecture == "UNet2DConditionModel"
    assert [layer.module for layer in base.layers] == [layer.module for layer in directory.layers]
    default = {layer.module for layer in base.layers if layer.default}
    assert len(default) == PAIRS
    assert {layer.module for layer in directory.layers if layer.alpha == 1e4} == default


def test_a_conditioning_of_stable_diffusion_xl_is_verified(tmp_path: Path) -> None:
    changes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 10,
        "use_linear_projection": True,
    }
    tiny_unet(**changes).save_pretrained(tmp_path / "unet")
    manifest = harden_to(tmp_path / "out", tmp_path / "unet", Factors(top_k=4), verify=True)
    assert 0 < manifest.verification["relative"] < 1e-5


def test_what_cannot_be_verified_is_refused_before_any_work(tmp_path: Path) -> None:
    tiny_unet(class_embed_type="timestep").save_pretrained(tmp_path / "unet")
    with refusal("timestep", "--no-verify"):
        harden_to(tmp_path / "out", tmp_path / "unet", Factors(top_k=4), verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no compensation": (
        lambda at: edit_tensors(at, lambda t: t.pop(f"{LAYER}.compensation.weight"), SINGLE),
        f"{LAYER}.compensation.weight is missing",
    ),
    "no convolution": (
        lambda at: edit_tensors(at, lambda t: t.pop("conv_in.weight"), SINGLE), "conv_in.weight is missing",
    ),
    "wrong shape": (
        lambda at: edit_tensors(at, lambda t: t.update({f"{LAYER}.inflated.weight": torch.ones(2, 2)}), SINGLE),
        f"{LAYER}.inflated.weight expected shape",
    ),
    "truncated list": (
        lambda at: edit_config(at, lambda c: c["quantization_config"]["layers"].pop(LAYER)),
        f"{LAYER}.bias is missing",
    ),
    "a convolution": (
        lambda at: edit_config(
            at, lambda c: c["quantization_config"]["layers"].update(
                {"conv_in": {"in_features": 4, "out_features": 16, "bias": True}}
            )
        ),
        "conv_in is a Conv2d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_directories_name_what_is_wrong(case: str, unets: tuple[Path, Path], tmp_path: Path) -> None:
    damage, message = DAMAGES[case]
    with refusal(message):
        load_model(spoiled(unets[1], tmp_path, damage))


def test_refusals(unets: tuple[Path, Path], tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(directory: Path, *words: str, method: str = "factors") -> None:
        result = call_cli("harden", directory, "--out", outside / "out", "--method", method, "--quiet")
        assert_refused(result, *words, empty=outside)

    unet, hardened = unets
    shim, wider, pickled = (shutil.copytree(unet, tmp_path / name) for name in ("shim", "wider", "pickled"))
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    edit_config(shim, lambda c: c.update(quantization_config={"quant_method": "specdef", "layers": {}}))
    edit_config(wider, lambda c: c.update(cross_attention_dim=32))
    (pickled / SINGLE).rename(pickled / "diffusion_pytorch_model.bin")
    refused(unet, "no symmetric pair", "UNet2DConditionModel", "--method scale", method="fold")
    refused(hardened, "hardened already", "specdef collapse")
    refused(tmp_path / "vae", "AutoencoderKL", "UNet2DConditionModel")
    refused(shim, "hardened already")
    refused(wider, "attn2.to_k.weight", "[16, 24]", "[16, 32]")
    refused(pickled, "pickled", "diffusers", "save_pretrained")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(unet, "not installed", "specdef-cli[diffusion]")


def test_attack_and_certify_refuse(unets: tuple[Path, Path], tmp_path: Path) -> None:
    base, directory = unets
    data = tmp_path / "data.txt"
    data.write_text("some text\n" * 50)
    for arguments in (
        ("attack", directory, "--control", base, "--dataset", data, "--out", tmp_path / "attack"),
        ("attack", base, "--control", base, "--dataset", data, "--task", "causal-lm", "--out", tmp_path / "attack"),
        ("certify", directory, "--base", base, "--out", tmp_path / "certificate"),
    ):
        assert_refused(call_cli(*arguments), "diffusers", "examples/reproduce/unet.py")
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]
