"""Statistics of activations against a plain forward pass, and what they say of channels against taking these out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.hardening import calibration
from specdef_cli.hardening.calibration import LENGTH, SEQUENCES, Activations, calibrate, default_text, drowned_energy
from specdef_cli.hardening.expendable import LARGEST, energies, largest, raise_pair
from specdef_cli.hardening.fold import channel_norms
from specdef_cli.model import load_model
from specdef_cli.model.body import SymmetricPair
from specdef_cli.model.inputs import token_batch
from specdef_cli.model.opened import OpenedModel, open_model
from specdef_cli.model.symmetries import symmetries
from tests.commands import TINY_LLAMA, assert_refused, call_cli, refusal, succeed
from tests.hardening.mutations import edit_tensors
from tests.tiny_families import write_case
from tests.tiny_models import write_model

TEXT = " ".join(f"w{(7 * number) % 96}" for number in range(900))


def opened(directory: Path) -> tuple[OpenedModel, tuple[SymmetricPair, ...]]:
    base = open_model(directory)
    return base, symmetries(base.skeleton).pairs


def with_tokenizer(case: str, directory: Path) -> Path:
    """A family's checkpoint beside the tokenizer of the tiny models."""
    write_model("llama", directory.parent / "words")
    write_case(case, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((directory.parent / "words" / name).read_bytes())
    return directory


def run_whole(
    directory: Path, text: str, hook: Callable[[str, nn.Module, torch.Tensor, Any], None], length: int = LENGTH
) -> None:
    """The model in memory, its hooks told of every module's first input and its output."""
    model = load_model(directory, dtype=torch.float32)
    for path, module in model.named_modules():

        def record(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            if inputs and torch.is_tensor(output):
                hook(f"{path}.weight", module, inputs[0], output)

        module.register_forward_hook(record)
    tokens = token_batch(directory, text, sequences=SEQUENCES, length=length)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("case", ["llama", "llama-tied", "gpt2", "bert", "gemma3", "t5", "mixtral", "tiny"])
def test_streamed_statistics_are_those_of_the_whole_model(case: str, tmp_path: Path) -> None:
    """Mixtral stacks its experts as it loads, so it is not streamed; GPT-2 stores its weights transposed."""
    if case == "tiny":
        directory, text = TINY_LLAMA, default_text()
    else:
        own = case in {"gpt2", "bert", "llama"}
        directory = write_model(case, tmp_path / "m") if own else with_tokenizer(case, tmp_path / "m")
        text = TEXT
    base, pairs = opened(directory)
    found, skeleton = calibrate(base, pairs, text), base.skeleton
    seen = 0
    tensors = {parameter: tensor for tensor, parameter in skeleton.names.parameters.items()}
    positions = getattr(skeleton.config.get_text_config(), "max_position_embeddings", LENGTH + 2)

    def compare(parameter: str, module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> None:
        nonlocal seen
        name = tensors.get(parameter, "")
        pairs_of = [(found.outputs, output)] if name in found.outputs else []
        pairs_of += [(found.inputs, given)] if name in found.inputs else []
        for kept, values in pairs_of:
            rows = values.flatten(0, -2)
            squares = rows.square()
            if kept is found.inputs:  # of what each token reads, the part that a channel has
                squares = squares / (squares @ found.column_norms[name])[:, None]
            torch.testing.assert_close(kept[name].mean_square, squares.mean(0), rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(kept[name].largest, rows.abs().amax(0), rtol=1e-5, atol=1e-6)
            seen += 1

    run_whole(directory, text, compare, min(LENGTH, positions - 2))
    of_modules = [name for name in (*found.outputs, *found.inputs) if ".experts." not in name]
    assert seen == len(of_modules)
    # Of the body's linears, all that read: a head stands behind it, and experts are no linears.
    readers = {side.tensor for pair in pairs for side in pair.sides if side.power < 0 and pair.kind != "query_key"}
    inside = f"{skeleton.model.base_model_prefix}."
    linears = {name for name in readers if skeleton.names.parameters[name].startswith(inside) and "moe" not in name}
    assert linears <= found.inputs.keys()


def test_layers_are_read_one_after_the_other_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    base, pairs = opened(TINY_LLAMA)
    models = []
    streamed = calibration._streamed_model
    monkeypatch.setattr(
        calibration, "_streamed_model", lambda *arguments: models.append(streamed(*arguments)) or models[0]
    )
    read: list[str] = []
    alive: list[int] = []
    reading = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        alive.append(sum(not parameter.is_meta for parameter in models[0].parameters()) if models else 0)
        return reading(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    calibrate(base, pairs, default_text())
    body = [name for name in base.checkpoint.tensors if name != "lm_head.weight"]
    assert sorted(read) == sorted(body)
    layers = [int(name.split(".")[2]) for name in read if ".layers." in name]
    assert layers == sorted(layers)
    assert max(alive) <= 1
    assert all(parameter.is_meta for parameter in models[0].parameters())


@pytest.mark.parametrize(("channels", "block"), [(70, 32), (512, 256)])
def test_drowned_energy_is_the_sum_over_neighbours(channels: int, block: int) -> None:
    """Blocks of 32 where the width is no multiple of 256, as llama.cpp takes them; 70: two blocks and one of 6."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, channels, generator=generator)
    norms = torch.rand(channels, generator=generator)
    found = drowned_energy(inputs, norms, (2, 5, 9))
    for index, exponent in enumerate((2, 5, 9)):
        for channel in (0, 31, 32, channels - 1):
            start = channel // block * block
            expected = 0.0
            for row in inputs.double():
                noise = (float(row[channel].abs()) * 2**exponent / 127) ** 2 / 12
                neighbours = [j for j in range(start, min(channels, start + block)) if j != channel]
                expected += sum(min(float(row[j]) ** 2, noise) * float(norms[j]) for j in neighbours)
            assert float(found[index, channel]) == pytest.approx(expected / 5, rel=1e-4)


def test_one_massive_token_hides_no_channel() -> None:
    """Channel 1 is all that 99 tokens have; the first is 10⁴ times as large in channel 0, and would be all of a sum."""
    inputs = torch.tensor([[1e4, 0.0], *[[0.0, 1.0]] * 99])
    found = Activations(column_norms={"w": torch.tensor([4.0, 0.25])})
    found.see("w", inputs, inputs, ())
    shares = found.inputs["w"].mean_square * found.column_norms["w"]
    assert shares.tolist() == pytest.approx([0.01, 0.99])
    assert found.inputs["w"].largest.tolist() == [1e4, 1.0]


@pytest.fixture(scope="module")
def tiny() -> tuple[Checkpoint, tuple[SymmetricPair, ...], Activations]:
    base, pairs = opened(TINY_LLAMA)
    return base.checkpoint, pairs, calibrate(base, pairs, default_text())


def no_norms(side: Any) -> torch.Tensor:
    raise AssertionError("the activations say it all")


@pytest.mark.parametrize("kind", ["up_down", "value_output", "norm_readers"])
def test_the_energy_given_up_is_what_taking_the_channel_out_changes(
    kind: str, tiny: tuple[Checkpoint, tuple[SymmetricPair, ...], Activations]
) -> None:
    """‖W x − W x without the channel‖² / Σ_j x_j²·‖column_j‖², a mean over tokens, from weights and a forward pass."""
    _, pairs, activations = tiny
    pair = next(pair for pair in pairs if pair.kind == kind and ".2." in pair.name)
    costs = energies(pair, activations, no_norms)
    channel = int(costs.argsort()[len(costs) // 2])
    raised: Any = raise_pair(pair, activations, 12, no_norms)
    (raised_channel,) = raised.channels
    changes = {channel: 0.0, raised_channel: 0.0}
    readers = {side.tensor: side for side in pair.sides if side.power < 0}

    def take_out(name: str, module: nn.Module, given: torch.Tensor, output: torch.Tensor) -> None:
        if name in readers:
            weight = module.get_parameter("weight")
            for which in changes:
                without = given.clone()
                without[..., list(readers[name].indices[which])] = 0
                lost = (without @ weight.T - output).square().sum(-1)
                changes[which] += float((lost / (given.square() @ weight.square().sum(0))).mean())

    run_whole(TINY_LLAMA, default_text(), take_out)
    assert changes[channel] == pytest.approx(float(costs[channel]), rel=2e-2 if kind != "value_output" else 0.5)
    assert raised.given_up == pytest.approx(float(costs[raised_channel] / costs.sum()))
    assert costs[raised_channel] < costs[channel]


def test_what_passes_through_a_raised_channel_stays_far_below_float16s_largest(
    tiny: tuple[Checkpoint, tuple[SymmetricPair, ...], Activations],
) -> None:
    checkpoint, pairs, activations = tiny
    for pair in pairs:
        for exponent in (4, 12, 20):
            raised: Any = raise_pair(pair, activations, exponent, partial(channel_norms, checkpoint))
            for channel, own in zip(raised.channels, raised.exponents, strict=True):
                passed = largest(pair, activations) * 2.0**own
                assert passed[channel] <= LARGEST
                # Fewer steps only where this channel needs it, and of columns only where every one does.
                full = 2 * passed > LARGEST
                assert own == exponent or bool(full[channel] if pair.kind == "query_key" else full.all())


@pytest.mark.parametrize("case", ["mixtral", "mixtral-stacked", "qwen2-moe"])
def test_experts_are_seen_one_by_one(case: str, tmp_path: Path) -> None:
    """Stored one by one or stacked; of an expert that no token reaches nothing is known, and it is not raised."""
    directory = with_tokenizer(case, tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if "experts" in name and name.endswith(("w3.weight", "up_proj.weight")):
            tensors[name] *= 64  # float16 cannot take 2^12 of that
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    base, pairs = opened(directory)
    found = calibrate(base, pairs, TEXT)
    seen = 0

    def record(path: str, module: Any, arguments: Any) -> None:
        nonlocal seen
        hidden, chosen = arguments[:2]
        for expert in chosen.unique().tolist():
            given = hidden[(chosen == expert).any(-1)]
            gate, up = (given @ module.gate_up_proj[expert].T).chunk(2, -1)
            (pair,) = [pair for pair in pairs if pair.name == f"{path}.{expert}.up_down"]
            making, reading = pair.sides
            rows, columns = (torch.tensor(side.indices)[:, 0] for side in pair.sides)
            between = module.act_fn(gate) * up
            norms = module.down_proj[expert].square().sum(0)
            parts = between.square() / (between.square() @ norms)[:, None]
            expected = (
                (found.outputs[making.weight], rows, up, up.square()),
                (found.inputs[reading.weight], columns, between, parts),
            )
            for kept, indices, values, squares in expected:
                torch.testing.assert_close(kept.mean_square[indices], squares.mean(0), rtol=1e-4, atol=1e-7)
                torch.testing.assert_close(kept.largest[indices], values.abs().amax(0), rtol=1e-4, atol=1e-6)
            raised: Any = raise_pair(pair, found, 12, no_norms)
            assert float(up.abs().amax(0)[raised.channels[0]]) * 2.0 ** raised.exponents[0] <= LARGEST
            del found.outputs[making.weight]
            assert raise_pair(pair, found, 12, no_norms) is None
            seen += 1

    model = load_model(directory, dtype=torch.float32)
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(partial(record, path))
    tokens = token_batch(directory, TEXT, sequences=SEQUENCES, length=62)
    with torch.no_grad():
        model(input_ids=tokens)
    assert seen >= 4


def test_queries_may_be_more_than_the_width_that_they_read(tmp_path: Path) -> None:
    """Queries are rows too, and go down: of a pair with keys, the keys alone say how far it can be raised."""
    base, pairs = opened(with_tokenizer("mistral", tmp_path / "m"))
    activations = calibrate(base, pairs, TEXT)
    for pair in (pair for pair in pairs if pair.kind == "query_key"):
        (keys,) = [side for side in pair.sides if side.power > 0]
        passed = activations.outputs[keys.tensor].largest.maximum(activations.row_largest[keys.tensor])
        expected = passed[torch.tensor(keys.indices)].amax(-1)
        assert torch.equal(largest(pair, activations), expected)


def test_a_channel_of_zeros_is_never_raised(tmp_path: Path) -> None:
    directory = write_model("llama", tmp_path / "m")
    edit_tensors(directory, lambda t: t["model.layers.0.mlp.up_proj.weight"][3].zero_())
    edit_tensors(directory, lambda t: t["model.layers.1.mlp.down_proj.weight"].zero_())
    base, pairs = opened(directory)
    activations = calibrate(base, pairs, TEXT)
    first, second = [raise_pair(pair, activations, 12, no_norms) for pair in pairs if pair.kind == "up_down"]
    assert first is not None
    assert first.channels != (3,)
    assert second is None


@pytest.mark.parametrize("profile", ["quantizable", "gguf"])
@pytest.mark.parametrize(
    ("family", "text", "problem"),
    [
        ("vit", TEXT, "takes no text"),
        ("llama", "w1 w2", "the text has 2 tokens"),
        ("llama", f"{TEXT} beyond", "is outside the model's vocabulary of 96"),
    ],
)
def test_without_a_text_a_way_out_is_named(family: str, text: str, problem: str, profile: str, tmp_path: Path) -> None:
    base = write_model(family, tmp_path / "m")
    if "beyond" in text:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["beyond"])
        tokenizer.save_pretrained(base)
        text = f"beyond {text}"
    (tmp_path / "text").write_text(text)
    command = ("harden", base, "--out", tmp_path / "out", "--dry-run", "--no-verify")
    result = call_cli(*command, "--profile", profile, "--calibration", tmp_path / "text")
    assert_refused(result, problem, "--profile quantizable --calibration none")
    succeed(*command, "--profile", "quantizable", "--calibration", "none")


def test_a_model_that_does_not_fit_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, pairs = opened(with_tokenizer("mixtral", tmp_path / "m"))
    monkeypatch.setattr(calibration.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10_000}))
    with refusal("do not fit", "--calibration none"):
        calibrate(base, pairs, TEXT)
