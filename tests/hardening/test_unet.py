"""A UNet of diffusers: harden → load in its pipeline → the same images; loud failure without the package; collapse."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.checkpoint.stream import file_sha256
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import CollapseOptions, Factors, HardenOptions
from specdef_cli.hardening.run import collapse, harden
from specdef_cli.hardening.survey import survey
from specdef_cli.model import load_model
from tests.commands import assert_refused, call_cli, environment, run_program
from tests.tiny_pipeline import denoise, tiny_unet, write_pipeline
from tests.weights import relative, tensors

PROCESS = Path(__file__).with_name("plain_diffusers.py")
SINGLE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
LAYER = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
PAIRS = 12


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and hardened directory."""
    root = tmp_path_factory.mktemp("unets")
    tiny_unet().save_pretrained(root / "unet")
    assert harden(HardenOptions(str(root / "unet"), root / "hardened", Factors(top_k=4))) is not None
    return root / "unet", root / "hardened"


@pytest.fixture
def unet(unets: tuple[Path, Path]) -> Path:
    return unets[0]


@pytest.fixture
def hardened(unets: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(unets[1], tmp_path / "hardened"))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``pipeline`` and ``hardened``."""
    root = tmp_path_factory.mktemp("pipelines")
    base = write_pipeline(root / "pipeline")
    shutil.copytree(base, root / "hardened", ignore=lambda *_: ["unet"])
    harden(HardenOptions(str(base / "unet"), root / "hardened" / "unet", Factors(top_k=4)))
    return root


def in_a_process(name: str, root: Path) -> dict[str, Any]:
    return run_program(PROCESS, name, root, env=environment())


def test_the_pipeline_draws_the_same_after_an_import(pipelines: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(pipelines, tmp_path / "root"))
    result = in_a_process("with_package", root)
    assert result["early"] == []
    assert result["torch.float32"] < 1e-5
    assert result["torch.bfloat16"] < 5e-2
    assert result["class"].startswith("diffusers.")
    assert result["swapped"] == PAIRS
    assert result["again"]
    assert result["dtype"] == "torch.float32"


def test_nothing_loads_without_the_package(pipelines: Path, tmp_path: Path) -> None:
    raised = in_a_process("without_package", Path(shutil.copytree(pipelines, tmp_path / "root")))
    assert raised.pop("imported") == ""
    assert raised.pop("after a late import") == ""
    assert len(raised) == 9
    for name, message in raised.items():
        # The right reason: the unknown name, or a tombstone where a weight belongs.
        reasons = ("shape", "size mismatch") if "stripped" in name or name == "state dict" else ("got specdef",)
        assert any(reason in message for reason in reasons), (name, message)


def test_files_besides_the_weights(unets: tuple[Path, Path]) -> None:
    directory = unets[1]
    assert {path.name for path in directory.iterdir()} == {"config.json", "README.md", "specdef.json", SINGLE}
    assert load_model(directory).training is False
    assert read_manifest(directory).shards == {SINGLE: file_sha256(directory / SINGLE)}
    card = (directory / "README.md").read_text()
    for words in ("import specdef_cli", "does not resist", "convolutions", "No attack was measured"):
        assert words in card
    assert "trust_remote_code" not in card
    assert "KL" not in card
    assert "secure" not in card.lower()


def test_shards_in_and_out_hold_the_same(unets: tuple[Path, Path], tmp_path: Path) -> None:
    base, single = unets
    UNet2DConditionModel.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    harden(HardenOptions(str(tmp_path / "sharded"), tmp_path / "one", Factors(top_k=4)))
    harden(HardenOptions(str(base), tmp_path / "many", Factors(top_k=4), max_shard_size=200_000))
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == [SINGLE]
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    assert set(json.loads((tmp_path / "many" / INDEX).read_text())["weight_map"].values()) == set(shards)
    expected = tensors(single)
    for name in ("one", "many"):
        found = tensors(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert torch.equal(denoise(load_model(tmp_path / name)), denoise(load_model(single)))
    collapse(CollapseOptions(str(tmp_path / "many"), tmp_path / "back", max_shard_size=200_000))
    assert relative(denoise(load_model(tmp_path / "back")), denoise(load_model(base))) < 1e-5


def test_another_dtype_and_other_layers(unet: Path, tmp_path: Path) -> None:
    options = HardenOptions(
        str(unet),
        tmp_path / "out",
        Factors(alpha=1e6, top_k=2),
        layers=("*.to_q", "time_embedding.*"),
        dtype="bfloat16",
    )
    result = harden(options)
    assert result is not None
    assert {layer.module.rsplit(".", 1)[-1] for layer in result.manifest.factored} == {"to_q", "linear_1", "linear_2"}
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
    result = harden(HardenOptions(str(tmp_path / "unet"), tmp_path / "out", Factors(top_k=4)))
    assert result is not None
    assert 0 < result.manifest.verification["relative"] < 1e-5


def test_what_cannot_be_verified_is_refused_before_any_work(tmp_path: Path) -> None:
    tiny_unet(class_embed_type="timestep").save_pretrained(tmp_path / "unet")
    options = HardenOptions(str(tmp_path / "unet"), tmp_path / "out", Factors(top_k=4))
    with pytest.raises(SpecDefError, match="timestep") as caught:
        harden(options)
    assert "--no-verify" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    stored = load_file(directory / SINGLE)
    change(stored)
    save_file(stored, directory / SINGLE, {"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no compensation": (
        lambda at: edit_tensors(at, lambda t: t.pop(f"{LAYER}.compensation.weight")),
        f"{LAYER}.compensation.weight is missing",
    ),
    "no tombstone": (lambda at: edit_tensors(at, lambda t: t.pop(f"{LAYER}.weight")), f"{LAYER}.weight is missing"),
    "no convolution": (
        lambda at: edit_tensors(at, lambda t: t.pop("conv_in.weight")), "conv_in.weight is missing",
    ),
    "wrong shape": (
        lambda at: edit_tensors(at, lambda t: t.update({f"{LAYER}.inflated.weight": torch.ones(2, 2)})),
        f"{LAYER}.inflated.weight expected shape",
    ),
    "truncated list": (
        lambda at: edit_config(at, lambda c: c["quantization_config"]["layers"].pop(LAYER)),
        f"{LAYER}.bias is missing",
    ),
    "misspelt path": (
        lambda at: edit_config(
            at, lambda c: c["quantization_config"]["layers"].update(
                {"mid_block.nothing": {"in_features": 1, "out_features": 1, "bias": False}}
            )
        ),
        "lists mid_block.nothing",
    ),
    "a convolution": (
        lambda at: edit_config(
            at, lambda c: c["quantization_config"]["layers"].update(
                {"conv_in": {"in_features": 4, "out_features": 16, "bias": True}}
            )
        ),
        "conv_in is a Conv2d",
    ),
    "no list": (lambda at: edit_config(at, lambda c: c["quantization_config"].pop("layers")), "layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_directories_name_what_is_wrong(case: str, hardened: Path) -> None:
    damage, message = DAMAGES[case]
    damage(hardened)
    with pytest.raises(SpecDefError) as caught:
        load_model(hardened)
    assert message in caught.value.problem


def harden_command(directory: Path, out: Path, *arguments: str) -> Any:
    return call_cli(
        "harden", directory, "--out", out / "out", "--method", "factors", "--top-k", "4", "--quiet", *arguments
    )


def test_refusals_of_harden(unets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, hardened = unets
    out = tmp_path / "outside"
    out.mkdir()
    fold = call_cli("harden", unet, "--out", out / "out", "--method", "fold", "--quiet")
    assert_refused(fold, "no symmetric pair", "UNet2DConditionModel", "--method scale", empty=out)
    assert_refused(harden_command(hardened, out), "hardened already", "specdef collapse", empty=out)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    assert_refused(harden_command(tmp_path / "vae", out), "AutoencoderKL", "UNet2DConditionModel", empty=out)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert_refused(
        harden_command(tmp_path / "pipeline", out), "no config.json", "pipeline of diffusers", "denoiser", empty=out
    )
    shutil.copytree(unet, tmp_path / "shim")
    edit_config(tmp_path / "shim", lambda c: c.update(quantization_config={"quant_method": "specdef", "layers": {}}))
    assert_refused(harden_command(tmp_path / "shim", out), "hardened already", empty=out)
    shutil.copytree(unet, tmp_path / "wider")
    edit_config(tmp_path / "wider", lambda c: c.update(cross_attention_dim=32))
    assert_refused(harden_command(tmp_path / "wider", out), "attn2.to_k.weight", "[16, 24]", "[16, 32]", empty=out)
    shutil.copytree(unet, tmp_path / "pickled")
    (tmp_path / "pickled" / SINGLE).rename(tmp_path / "pickled" / "diffusion_pytorch_model.bin")
    assert_refused(harden_command(tmp_path / "pickled", out), "pickled", "diffusers", "save_pretrained", empty=out)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert_refused(harden_command(unet, out), "not installed", "specdef-cli[diffusion]", empty=out)


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
