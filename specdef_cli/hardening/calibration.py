"""What passes through a model's channels on a little text: how much on average, and how large at most.

The model runs once, on all of the text. Every layer's weights are read as it is reached and dropped behind it
(accelerate's hooks around transformers' own modules), so that a model needs no more memory than its largest layer.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.execute import compute_devices
from specdef_cli.model.body import SymmetricPair, in_stack
from specdef_cli.model.inputs import require_in_vocabulary, token_batch
from specdef_cli.model.loading import process_state, without_progress_bars
from specdef_cli.model.opened import OpenedModel
from specdef_cli.model.skeleton import Skeleton, TensorNames

SEQUENCES, LENGTH = 8, 128

TURN = 200
"""Characters of a turn of a chat."""

WITHOUT = "Choose the channels by the weights alone: --profile quantizable --calibration none."

BLOCK, WIDE_BLOCK = 32, 256
"""Neighbours that llama.cpp gives one scale when it rounds activations to 8 bits; K-quants take the second, where the
width is a multiple of it. What is little of a wide block is little of its parts."""

LEVELS = 127

DROWNED_TOKENS = 256
"""On which blocks are looked at; the first of every sequence are among them."""


@dataclass(frozen=True)
class Channels:
    """Statistics of a module's inputs or outputs; every tensor has shape [channels]."""

    mean_square: Tensor
    largest: Tensor


@dataclass(frozen=True)
class Activations:
    """What a text makes of the modules that symmetric pairs belong to, by the names of their weights on disk.

    An expert of a stack has the name of :attr:`~specdef_cli.model.body.Side.weight`.

    Attributes:
        inputs: Of linears. The mean square is that of :func:`relative_inputs`, the largest that of what is read.
        column_norms: Of linears: ‖column‖², shape [inputs].
        row_largest: Of linears and norms: the largest weight in each row, shape [outputs].
        drowned: :func:`drowned_energy`, by the exponents that were asked for; shape [exponents, inputs].
    """

    inputs: dict[str, Channels] = field(default_factory=dict)
    outputs: dict[str, Channels] = field(default_factory=dict)
    column_norms: dict[str, Tensor] = field(default_factory=dict)
    row_largest: dict[str, Tensor] = field(default_factory=dict)
    drowned: dict[str, Tensor] = field(default_factory=dict)

    def hook(self, weight: str, exponents: Sequence[int]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """A forward hook that takes the statistics of the module with this weight."""

        def record(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if torch.is_tensor(output):
                self.see(weight, arguments[0] if arguments else None, output, exponents)

        return record

    def see(self, name: str, inputs: Tensor | None, output: Tensor, exponents: Sequence[int]) -> None:
        """Take the statistics of what a weight reads and puts out."""
        self.outputs[name] = _channels(output)
        if name in self.column_norms and inputs is not None:
            norms = self.column_norms[name].to(inputs.device)
            relative = relative_inputs(inputs, norms)
            self.inputs[name] = replace(_channels(inputs), mean_square=relative.square().mean(0).cpu())
            if exponents:
                self.drowned[name] = drowned_energy(relative, norms, exponents)

    def weigh(self, name: str, weight: Tensor, module: nn.Module | None = None) -> None:
        """Keep statistics of a module's weight, by row and by column; without a module, of a matrix of rows."""
        values = weight.detach().float()
        if module is None or isinstance(module, nn.Linear | Conv1D):
            values = values.T if isinstance(module, Conv1D) else values
            self.column_norms[name] = values.square().sum(0).cpu()
            self.row_largest[name] = values.abs().amax(1).cpu()
        elif values.dim() == 1:
            self.row_largest[name] = values.abs().cpu()


class _Experts(TorchFunctionMode):
    """Takes the statistics of experts, which are no modules: linears whose weight is a slice of a stack."""

    def __init__(self, found: Activations, names: TensorNames, exponents: Sequence[int]) -> None:
        super().__init__()
        self._found, self._names, self._exponents = found, names, exponents
        self._running = ("", nn.Module())

    def enter(self, path: str, module: nn.Module, _: Any) -> None:
        """Be told, as a forward pre-hook, which module runs."""
        self._running = (path, module)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and len(args) > 1:
            path, module = self._running
            for leaf, stack in module.named_parameters(recurse=False):
                offset = args[1].data_ptr() - stack.data_ptr()
                if stack.dim() == 3 and 0 <= offset < stack.nbytes:
                    self._see(f"{path}.{leaf}", offset // stack[0].nbytes, args[0], args[1], output)
        return output

    def _see(self, parameter: str, expert: int, inputs: Tensor, weight: Tensor, output: Tensor) -> None:
        tensor, parts = self._names.tensor(parameter), self._names.stacked.get(parameter, {})
        named = [in_stack(tensor, expert)] if tensor else [experts[expert] for experts in parts.values()]
        for name, rows, made in zip(named, weight.chunk(len(named)), output.chunk(len(named), -1), strict=True):
            self._found.weigh(name, rows)
            self._found.see(name, inputs, made, self._exponents)


def calibrate(
    base: OpenedModel,
    pairs: Sequence[SymmetricPair],
    text: str,
    *,
    exponents: Sequence[int] = (),
    device: str | None = None,
) -> Activations:
    """Run a model on a text, and record what passes through the modules of its pairs.

    Args:
        text: The first 1,024 tokens of it are taken; of a model with a chat template half of them, and half as a chat.
        exponents: For which ``drowned`` is measured.
        device: Where to run; ``None`` takes a GPU where there is one.
    """
    checkpoint, skeleton = base.checkpoint, base.skeleton
    model = skeleton.model
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        raise SpecDefError(f"{type(model).__name__} takes no text to calibrate with", WITHOUT)
    # RoBERTa's positions begin after two others.
    length = min(LENGTH, (getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH + 2) - 2)
    try:
        tokenizer = base.tokenizer()
        parts = [
            token_batch(base.directory, part, sequences=SEQUENCES, length=length, tokenizer=tokenizer)
            for part in (text, *_as_chat(tokenizer, text))
        ]
        require_in_vocabulary(parts, model.config, base.directory)
    except SpecDefError as error:
        raise SpecDefError(f"calibration: {error.problem}", f"{error.hint} {WITHOUT}") from error
    tokens = torch.cat([part[: -(-SEQUENCES // len(parts))] for part in parts])
    place = compute_devices(device, process_state(device))[0]
    found = Activations()
    weights = {
        parameter.removesuffix(".weight"): side.tensor
        for pair in pairs
        for side in pair.sides
        if (parameter := skeleton.names.parameters.get(side.tensor, "")).endswith(".weight")
    }
    streamed = all(_sources(skeleton, name) for name, _ in model.base_model.named_parameters(_path_of(model)))
    runner = _streamed_model(checkpoint, skeleton, found, place) if streamed else _whole_model(base, found, place)
    modules = dict(runner.named_modules())
    for path, weight in weights.items():
        modules[path].register_forward_hook(found.hook(weight, exponents))
    experts = _Experts(found, skeleton.names, exponents)
    stacks = {name.rpartition(".")[0] for name, parameter in skeleton.parameters.items() if parameter.dim() == 3}
    for path in stacks:
        modules[path].register_forward_pre_hook(partial(experts.enter, path))
    if stacks:
        runner.set_experts_implementation("eager")  # one after the other
    inputs: dict[str, Any] = {"input_ids": tokens.to(place), "attention_mask": torch.ones_like(tokens).to(place)}
    if runner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad(), experts:
        runner.base_model(**inputs)
    return found


def _as_chat(tokenizer: Any, text: str) -> list[str]:
    """The text as turns of a chat, where the model has a template: its tokens carry what no prose does."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    pieces = [text[start : start + TURN] for start in range(0, len(text), TURN)]
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(pieces[::2], pieces[1::2], strict=False)
    ]
    try:
        return ["".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)]
    except Exception:  # a template is a program, and raises what it likes; without jinja2, ImportError
        return []


def relative_inputs(inputs: Tensor, column_norms: Tensor) -> Tensor:
    """Inputs x with each token's divided by √Σ_j x_j²·‖column_j‖²; shape [tokens, channels].

    One token of a text, often the first, may put out a thousand times what the others do (massive activations, Sun et
    al. 2024, arXiv 2402.17762). A mean over tokens would show that one alone.
    """
    rows = inputs.detach().float().flatten(0, -2)
    energy = rows.square() @ column_norms
    return rows * energy.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()[:, None]


def drowned_energy(inputs: Tensor, column_norms: Tensor, exponents: Sequence[int]) -> Tensor:
    """For each channel, what its neighbours lose below their block's step once it is 2^exponent times as large.

    Args:
        inputs: x of :func:`relative_inputs`, shape [tokens, channels].
        column_norms: ‖column‖² of the weight that reads them, shape [channels].

    Returns:
        Mean over tokens of Σ_j min(x_j², s²/12)·‖column_j‖², s = |x_c|·2^exponent/127; shape [exponents, channels].
    """
    channels = inputs.shape[-1]
    rows = inputs[:: max(1, len(inputs) // DROWNED_TOKENS)]
    block = WIDE_BLOCK if channels % WIDE_BLOCK == 0 else BLOCK
    energy = (
        nn.functional.pad(rows, (0, -channels % block)).square().unflatten(-1, (-1, block))
    )  # [tokens, blocks, neighbours]
    norms = nn.functional.pad(column_norms, (0, -channels % block)).unflatten(-1, (-1, block)).expand_as(energy)
    ordered, order = energy.sort(-1)
    sorted_norms = norms.gather(-1, order)
    below = nn.functional.pad((ordered * sorted_norms).cumsum(-1), (1, 0))
    above = nn.functional.pad(sorted_norms.flip(-1).cumsum(-1).flip(-1), (0, 1))
    found = []
    for exponent in exponents:
        noise = energy * (4.0**exponent / (12 * LEVELS**2))
        place = torch.searchsorted(ordered, noise)
        lost = below.gather(-1, place) + noise * above.gather(-1, place)
        lost -= torch.minimum(energy, noise) * norms  # its own
        found.append(lost.mean(0).flatten()[:channels])
    return torch.stack(found).clamp_min(0).cpu()


def _channels(values: Tensor) -> Channels:
    rows = values.detach().float().flatten(0, -2)
    return Channels(rows.square().mean(0).cpu(), rows.abs().amax(0).cpu())


def _path_of(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else model.base_model_prefix


def _sources(skeleton: Skeleton, parameter: str) -> str | None:
    """The tensor on disk that a parameter, or one it is tied to, is stored as."""
    tensor = skeleton.names.tensor(parameter)
    if tensor is None and parameter in skeleton.tied and isinstance(skeleton.model, PreTrainedModel):
        shared = skeleton.parameters[parameter]
        ties = skeleton.model.get_expanded_tied_weights_keys(all_submodels=True)
        others = [name for name, other in skeleton.parameters.items() if other is shared]
        others += [ties[parameter]] if parameter in ties else []
        tensor = next((found for name in others if (found := skeleton.names.tensor(name)) is not None), None)
    return tensor


class _Weights:
    """Every parameter of a skeleton, read when accelerate asks for it."""

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton, found: Activations) -> None:
        self._checkpoint, self._skeleton, self._found = checkpoint, skeleton, found

    def __getitem__(self, parameter: str) -> Tensor:
        tensor = _sources(self._skeleton, parameter)
        if tensor is None:
            raise KeyError(parameter)
        value = self._checkpoint.read(tensor)
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight":
            self._found.weigh(tensor, value, self._skeleton.modules[path])
        return value


def _streamed_model(checkpoint: Checkpoint, skeleton: Skeleton, found: Activations, device: torch.device) -> Any:
    """A model whose modules read their weights as they are called, and drop them afterwards."""
    with torch.device("meta"):
        model: Any = type(skeleton.model)(copy.deepcopy(skeleton.model.config))  # in float32
    # What is not stored (RoPE's frequencies, positions) is computed as from_pretrained does it.
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            stored = skeleton.names.tensor(f"{path}.{name}")
            value = torch.empty_like(buffer, device="cpu") if stored is None else checkpoint.read(stored)
            setattr(module, name, value)
    model.initialize_weights()
    attach_align_device_hook(
        model.base_model,
        execution_device=device,
        offload=True,
        weights_map=_Weights(checkpoint, skeleton, found),
        module_name=_path_of(model),
    )
    return model.eval()


def _whole_model(base: OpenedModel, found: Activations, device: torch.device) -> Any:
    """A model that stacks or splits tensors as it loads them, in memory."""
    skeleton = base.skeleton
    parameters = sum(parameter.numel() for parameter in skeleton.parameters.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if 6 * parameters > free:  # float32, and half as much again for what is being loaded
        raise SpecDefError(
            f"{type(skeleton.model).__name__} cannot be read layer by layer, and its {parameters:,} parameters "
            f"do not fit into {free / 2**30:.0f} GiB to calibrate",
            WITHOUT,
        )
    with without_progress_bars():
        model = base.load(auto_class=type(skeleton.model).__name__, dtype=torch.float32, device=device)
    for path, module in model.named_modules():
        tensor = skeleton.names.tensor(f"{path}.weight")
        if tensor is not None:
            found.weigh(tensor, module.weight, module)
    return model


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecDefError(f"--calibration {path} is not a text that can be read", "Give a file of UTF-8.") from error


def default_text() -> str:
    """Source and prose of some modules of Python's standard library."""
    modules = (statistics, argparse, logging, textwrap)
    parts = [Path(inspect.getfile(module)).read_text(encoding="utf-8") for module in modules]
    size = SEQUENCES * LENGTH * 4
    return "\n".join(part[: 2 * size // len(parts)] for part in parts)
