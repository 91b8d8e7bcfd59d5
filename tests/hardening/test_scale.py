"""harden --method scale: weights scaled by channel, with vectors that undo it.

Of every family, test_families has the function and the bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specdef_cli.attack.variants.scales import unscale as collapse_in_memory
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, read_manifest
from specdef_cli.hardening.card import SCALED_LOADERS
from specdef_cli.hardening.fold import HIGHEST_EXPONENT, LOWEST_EXPONENT
from specdef_cli.hardening.options import CollapseOptions, Construction, Fold, HardenOptions, Scale
from specdef_cli.hardening.plan import make_plan
from specdef_cli.hardening.run import collapse, harden
from specdef_cli.model import load_model
from specdef_cli.model.opened import open_model
from tests.commands import refusal
from tests.hardened import harden_to
from tests.hardening.conftest import Made
from tests.hardening.mutations import spoiled, tensor
from tests.tiny_kinds import TEXT
from tests.weights import assert_same_bytes, tensors


def test_a_linear_is_scaled_on_both_sides_and_a_vocabulary_in_steps(made: Made) -> None:
    manifest = read_manifest(made("llama", "scale"))
    linears = [module for module in manifest.scaled if module.kind == "linear"]
    assert len(linears) == 14
    for module in linears:
        for side in (module.output, module.input):
            assert side is not None
            inflated, deflated = side.exponents
            assert inflated > 0 > deflated
            assert max(inflated, -deflated) <= HIGHEST_EXPONENT
    files = tensors(made("llama", "scale"))
    for stem, scale, period in (("model.embed_tokens", "input_scale", 8), ("lm_head", "output_scale", 128)):
        steps = files[f"{stem}.{scale}.weight"].log2()
        assert steps.tolist() == [4.0 * (token % period) * (token % period < 8) for token in range(len(steps))]


def test_tokens_are_few_where_every_token_has_a_gradient(made: Made) -> None:
    """An embedding that is also the head gets one from every position; one that is only looked up does not."""
    periods = {}
    for case in ("llama", "llama-tied"):
        modules: dict[str, Any] = {module.kind: module for module in read_manifest(made(case, "scale")).scaled}
        periods[case] = modules["embedding"].input.period, modules["head"].output.period
    assert periods == {"llama": (8, 128), "llama-tied": (128, 128)}


@pytest.mark.parametrize("vocabulary", [2, 7, 8])
def test_a_vocabulary_of_fewer_tokens_than_steps_takes_the_first_steps(vocabulary: int, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**TEXT, "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    manifest = harden_to(tmp_path / "out", tmp_path / "base", Scale(), verify=True)
    assert manifest.verification["equal"]
    embedding = next(module for module in manifest.scaled if module.kind == "embedding")
    assert (embedding.input.indices if embedding.input else ()) == tuple(range(1, min(vocabulary, 8)))


def test_one_norm_is_far_above_all_others(made: Made) -> None:
    """Neighbours that share a rate train together, and a gain has one side."""
    norms = {
        module.module: module.output.exponents[0]
        for module in read_manifest(made("llama", "scale")).scaled
        if module.kind == "norm" and module.output is not None
    }
    assert norms.pop("model.layers.0.post_attention_layernorm") == 40
    assert norms["model.layers.0.input_layernorm"] == max(norms.values()) == 18
    assert min(norms.values()) == LOWEST_EXPONENT
    assert len(norms) == 4


def test_the_norm_far_above_does_not_write_to_the_residual_stream(made: Made) -> None:
    """An entry of the residual stream, which Gemma's last norm of a block writes, is worth more."""
    highest = [
        module.module
        for module in read_manifest(made("gemma3", "scale")).scaled
        if module.kind == "norm" and module.output is not None and module.output.exponents[0] > HIGHEST_EXPONENT
    ]
    assert highest == ["model.layers.0.pre_feedforward_layernorm"]


def test_a_mixed_directory_of_format_1_collapses(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Early versions folded pairs and scaled the rest: here the same is put together from a fold and scales of it."""
    folded, mixed = tmp_path / "folded", tmp_path / "mixed"
    harden(HardenOptions(str(checkpoints["llama"]), folded, layers=("*.o_proj",), verify=False))
    first = json.loads((folded / MANIFEST_NAME).read_text())
    (folded / MANIFEST_NAME).unlink()
    harden(HardenOptions(str(folded), mixed, Scale(), layers=("*norm*", "*embed_tokens"), verify=False))
    made = json.loads((mixed / MANIFEST_NAME).read_text())
    made |= {"format": 1, "method": "mixed", "schedule": "staircase", "profile": "coverage", "inserted": []}
    made["folded"] = first["folded"]
    del made["factored"]
    (mixed / MANIFEST_NAME).write_text(json.dumps(made))
    manifest = read_manifest(mixed)
    assert (manifest.method, len(manifest.folded)) == ("scale", 2)
    collapse(CollapseOptions(str(mixed), tmp_path / "back"))
    assert_same_bytes(tensors(tmp_path / "back"), tensors(checkpoints["llama"]))


@pytest.mark.parametrize(("construction", "told"), [(Scale(), True), (Fold(), False)])
def test_what_does_not_run_the_code_is_told_before_the_work(
    construction: Construction, told: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    plan = make_plan(open_model(checkpoints["llama"]), HardenOptions("llama", tmp_path / "out", construction))
    assert (SCALED_LOADERS in plan.notes) == told


@pytest.mark.parametrize("case", ["llama", "llama-tied", "gemma3", "gpt2", "bert"])
def test_an_attacker_who_knows_has_the_base_in_memory(case: str, checkpoints: dict[str, Path], made: Made) -> None:
    model, plain = load_model(made(case, "scale")), load_model(checkpoints[case])
    collapse_in_memory(model)
    assert_same_bytes(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("case", ["llama-tied", "gemma3", "gpt2"])
def test_what_is_saved_again_is_still_scaled(
    case: str, checkpoints: dict[str, Path], made: Made, tmp_path: Path
) -> None:
    model = load_model(made(case, "scale"))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.inflated.weight is embedding.inflated.weight
    model.save_pretrained(tmp_path / "saved")
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = load_model(checkpoints[case])(input_ids=ids).logits
    assert torch.equal(load_model(tmp_path / "saved")(input_ids=ids).logits, expected)
    # Weights stay shared when they are trained, moved and tied anew.
    model.tie_weights()
    with torch.no_grad():
        embedding.inflated.weight.zero_()
    assert model.get_output_embeddings().inflated.weight.abs().sum() == 0


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.input_scale.weight",
        "model.layers.1.input_layernorm.output_scale.weight",
        "model.embed_tokens.inflated.weight",
        "lm_head.input_scale.weight",
    ],
)
def test_a_directory_that_lacks_a_vector_does_not_load(name: str, made: Made, tmp_path: Path) -> None:
    with refusal(name):
        load_model(spoiled(made("llama-tied", "scale"), tmp_path, tensor(name, None)))


def test_globs_choose_and_a_tied_head_goes_with_its_embedding(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def modules(**options: Any) -> set[str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        return {module.module for module in harden_to(out, checkpoints["llama-tied"], Scale(), **options).scaled}

    assert modules(layers=("*.0.mlp.up_proj",)) == {"model.layers.0.mlp.up_proj"}
    assert modules(layers=("lm_head",)) == {"lm_head", "model.embed_tokens"}
    assert not modules(exclude=("model.embed_tokens.weight",)) & {"lm_head", "model.embed_tokens"}
