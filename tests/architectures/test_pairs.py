"""Every symmetric pair is held to the strictest oracle there is: the logits of the rescaled checkpoint keep every bit.

The rescaling here is a second implementation, directly on the safetensors file, and the judge is plain transformers.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from specdef_cli.model.body import SymmetricPair, Symmetries
from specdef_cli.model.skeleton import Skeleton
from specdef_cli.model.symmetries import symmetries
from tests.commands import refusal
from tests.hardening.plain_transformers import outputs
from tests.tiny_families import CASES, read_config, read_shapes, skeleton_of, write_case

ATTENTION = ["value_output", "query_key"]
STANDARD = ["value_output", "query_key", "up_down", "norm_readers"]
UNGATED = ["value_output", "query_key", "norm_readers"]

# Case → kinds of pairs that hold there, and how many norms can trade with their readers.
EXPECTED: dict[str, tuple[list[str], int]] = {
    "llama": (STANDARD, 5),
    "llama-tied": (STANDARD, 4),
    "llama-base": (STANDARD, 4),
    "llama-classifier": (STANDARD, 5),
    "mistral": (STANDARD, 5),
    "qwen2": (STANDARD, 5),
    "qwen3": (STANDARD, 5),
    "qwen3-tied": (STANDARD, 4),
    "qwen3-bias": (STANDARD, 5),
    "gemma2": ([*ATTENTION, "up_down"], 0),
    "gemma3": (["value_output", "up_down"], 0),
    "phi3": (STANDARD, 5),
    "olmo": ([*ATTENTION, "up_down"], 0),
    "olmo-clip": (["up_down"], 0),
    "olmo2": (STANDARD, 1),
    "olmo2-bias": ([*ATTENTION, "up_down"], 0),
    "gpt2": (UNGATED, 4),
    "gpt2-untied": (STANDARD, 5),
    "gpt-neox": (UNGATED, 5),
    "gpt-neox-serial": (UNGATED, 4),
    "bert": ([*ATTENTION, "norm_readers"], 1),
    "bert-classifier": (STANDARD, 1),
    "roberta": ([*ATTENTION, "norm_readers"], 1),
    "vit": (UNGATED, 5),
    "t5": (STANDARD, 11),
    "t5-gated": (STANDARD, 11),
    "t5-untied": (STANDARD, 12),
    "t5-encoder": (STANDARD, 4),
    "mixtral": (STANDARD, 5),
    "mixtral-stacked": (STANDARD, 5),
    "qwen2-moe": (STANDARD, 5),
    "qwen3-moe": (STANDARD, 5),
    "gpt-oss": (UNGATED, 5),
}


@cache
def found_in(directory: Path) -> Symmetries:
    return symmetries(skeleton_of(directory))


def pairs_of(directory: Path) -> tuple[SymmetricPair, ...]:
    return found_in(directory).pairs


def rescale(
    source: Path, target: Path, pairs: Iterable[SymmetricPair], seed: int = 0, omit: tuple[str, int] | None = None
) -> None:
    """Write ``source`` with every channel of ``pairs`` scaled by a random power of two.

    The side ``omit`` (name, number) is left as it is.
    """
    generator = random.Random(seed)
    tensors = load_file(source / "model.safetensors")
    for pair in pairs:
        exponents = [generator.choice([-3, -2, -1, 1, 2, 3]) for _ in range(pair.channels)]
        for number, side in enumerate(pair.sides):
            if omit == (pair.name, number):
                continue
            view = tensors[side.tensor] if side.block is None else tensors[side.tensor][side.block]
            axis = side.axis - (side.block is not None)
            for channel, exponent in enumerate(exponents):
                factor = 2.0 ** (exponent * side.power)
                for position in side.indices[channel]:
                    view.select(axis, position).mul_(factor)
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    shutil.copyfile(source / "config.json", target / "config.json")


@pytest.mark.parametrize("case", CASES)
def test_rescaled_checkpoints_keep_every_bit(checkpoints: dict[str, Path], case: str, tmp_path: Path) -> None:
    source = checkpoints[case]
    pairs, (kinds, norms) = pairs_of(source), EXPECTED[case]
    assert {pair.kind for pair in pairs} == set(kinds)
    assert sum(pair.kind == "norm_readers" for pair in pairs) == norms
    rescale(source, tmp_path, pairs)
    for dtype in ("float32", "bfloat16"):
        found = outputs(tmp_path, dtype, generate=False)
        for attention, value in outputs(source, dtype, generate=False).items():
            assert torch.equal(found[attention], value), (dtype, attention)


@pytest.mark.parametrize("case", CASES)
def test_half_a_pair_changes_the_logits(checkpoints: dict[str, Path], case: str, tmp_path: Path) -> None:
    """Negative control: leave out any one side of a pair, and the oracle above notices."""
    source = checkpoints[case]
    expected = outputs(source, "float32", generate=False)["eager"]
    first_of_kind = {pair.kind: pair for pair in reversed(pairs_of(source))}
    generator = random.Random(case)
    for pair in first_of_kind.values():
        for side in generator.sample(range(len(pair.sides)), min(2, len(pair.sides))):
            rescale(source, tmp_path, [pair], omit=(pair.name, side))
            found = outputs(tmp_path, "float32", generate=False)["eager"]
            assert not torch.equal(found, expected), (pair.name, pair.sides[side].tensor)


def test_grouped_query_heads_share_the_channels_of_their_key_head(checkpoints: dict[str, Path]) -> None:
    """4 query heads on 2 key heads of 8 dimensions: the closed form of one channel of each kind."""
    pairs = {pair.name: pair for pair in pairs_of(checkpoints["llama"])}
    value, bias, output = pairs["model.layers.0.self_attn.value_output"].sides
    names = [side.tensor.removeprefix("model.layers.0.self_attn.") for side in (value, bias, output)]
    assert names == ["v_proj.weight", "v_proj.bias", "o_proj.weight"]
    assert value.indices[8 + 3] == (8 + 3,)
    assert output.indices[8 + 3] == (16 + 3, 24 + 3)
    scores = pairs["model.layers.0.self_attn.query_key"]
    assert scores.channels == 2 * 4  # planes of each key head
    assert scores.sides[0].indices[4 + 1] == (16 + 1, 16 + 5, 24 + 1, 24 + 5)
    assert scores.sides[2].indices[4 + 1] == (8 + 1, 8 + 5)


@pytest.mark.parametrize("case", CASES)
def test_a_shape_that_the_config_contradicts_is_refused(checkpoints: dict[str, Path], case: str) -> None:
    config, shapes = read_config(checkpoints[case]), read_shapes(checkpoints[case])
    involved = sorted({side.tensor for pair in pairs_of(checkpoints[case]) for side in pair.sides})
    for tensor in random.Random(case).sample(involved, 3):
        with refusal(tensor):
            symmetries(Skeleton.of(config, {**shapes, tensor: (*shapes[tensor][:-1], shapes[tensor][-1] + 2)}))


def test_what_has_no_pair_is_said(checkpoints: dict[str, Path]) -> None:
    def notes(case: str) -> str:
        return "\n".join(found_in(checkpoints[case]).unpaired)

    assert "1+w" in notes("gemma2")
    assert "clip_qkv" in notes("olmo-clip")
    assert "'gelu_new'" in notes("gpt2")
    assert "lm_head is tied" in notes("llama-tied")
    assert "sinks" in notes("gpt-oss")
    assert "relative_attention_bias" in notes("t5")
    assert "also added to the residual stream" in notes("bert")
    assert "q_proj and k_proj stand before those norms" in notes("olmo2")
    assert notes("mixtral") == ""


def test_a_cross_attention_that_is_not_described_leaves_no_pairs() -> None:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    config.architectures = ["GPT2LMHeadModel"]
    found = symmetries(Skeleton.of(config, {}))
    assert found.pairs == ()
    assert "crossattention" in found.unpaired[0]


def test_quantized_experts_take_part_in_no_pair(checkpoints: dict[str, Path]) -> None:
    """GPT-OSS is published with experts in mxfp4: two tensors where the description expects one."""
    shapes = read_shapes(checkpoints["gpt-oss"])
    packed: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed |= {f"{name}_blocks": (*shape[:-1], 1, 16), f"{name}_scales": (*shape[:-1], 1)}
        else:
            packed[name] = shape
    found = symmetries(Skeleton.of(read_config(checkpoints["gpt-oss"]), packed))
    assert {pair.kind for pair in found.pairs} == {"value_output", "query_key", "norm_readers"}
    assert not [pair for pair in found.pairs if "post_attention_layernorm" in pair.name]
    assert [note for note in found.unpaired if "gate_up_proj is not one plain tensor" in note]


def test_a_checkpoint_that_stores_tied_weights_twice(tmp_path: Path) -> None:
    """Transformers reads both, other engines only the first; both are scaled, so that either reading is right."""
    source = write_case("llama-tied", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    pairs = pairs_of(source)
    assert "model.norm.norm_readers" not in {pair.name for pair in pairs}
    rescale(source, tmp_path / "target", pairs)
    after = load_file(tmp_path / "target" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(outputs(tmp_path / "target", "float32")["eager"], outputs(source, "float32")["eager"])
