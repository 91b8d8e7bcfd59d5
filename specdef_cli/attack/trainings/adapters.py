"""The trainings that put PEFT's adapters on a model: the rows of ``PEFT_METHODS``.

LoRA's α is twice the rank, as is usual; the learning rate's search makes up for any other scale.

QLoRA's weights are quantized by bitsandbytes after loading, so that hardened modules get what ordinary ones get: NF4 in
blocks of 64, computed with in bfloat16. Everything else is float32, as PEFT prepares a model for this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft
import torch
from peft import PeftConfig, TaskType, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from torch import nn
from transformers.pytorch_utils import Conv1D

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.target import Task
from specdef_cli.attack.trainings import PEFT_METHODS, Training
from specdef_cli.attack.variants.factored import hardened_paths
from specdef_cli.errors import first_line
from specdef_cli.model import SpecDefScaled
from specdef_cli.model.skeleton import output_embeddings

PEFT_TASKS: Mapping[Task, TaskType | None] = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
    "masked-lm": None,
    "sequence-classification": TaskType.SEQ_CLS,
    "image-classification": None,
}


def with_adapters(model: nn.Module, training: Training, make_config: Callable[[], PeftConfig]) -> nn.Module:
    """Wrap a model with PEFT, so that adapters alone train."""
    placed = training.choice.where is not None
    try:
        return get_peft_model(model, make_config())
    except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise NotApplicable(
            f"{training.label} cannot be put on {','.join(training.where) or 'this model'}: {first_line(error)}",
            f"Choose another --training or another size{', or name linear layers, as in @q_proj' * placed}.",
        ) from error


def train_adapters(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """Put the adapters of a row of :data:`PEFT_METHODS` on a model; on both factors of a pair."""
    method = next(method for method in PEFT_METHODS if method.name == training.method)

    def config() -> PeftConfig:
        if method.on == "prompt" and PEFT_TASKS[task] is None:
            raise ValueError(f"PEFT puts no tokens in front for {task}")
        size = int(training.size or 0)
        arguments: dict[str, Any] = dict(method.arguments)
        if method.size is not None:
            arguments[method.size_argument] = size
        if method.alpha is not None:
            arguments["lora_alpha"] = method.alpha * size
        if method.on == "linears":
            arguments["target_modules"] = linear_paths(model, training.where)
        elif method.on == "norms":
            arguments["target_modules"] = list(training.where) or norm_paths(model)
        elif method.on == "usual":
            arguments |= _usual(model, method.config, training.where)
        return getattr(peft, method.config)(task_type=PEFT_TASKS[task], **arguments)

    return with_adapters(model, training, config)


def _usual(model: nn.Module, config: str, names: Sequence[str]) -> dict[str, Any]:
    """Where PEFT puts LoRA or IA³ on this architecture, or on the modules named.

    IA³ goes on W~ of an inserted pair, and scales what an MLP's last linear reads.
    """
    family = str(getattr(model.config, "model_type", "this model"))
    targets, parts = (IA3_TARGETS, ("inflated",)) if config == "IA3Config" else (LORA_TARGETS, FACTORS)
    names = names or tuple(targets.get(family) or ())
    if not names:
        raise ValueError(f"PEFT has no default targets for {family}")
    placed = {"target_modules": module_paths(model, names, parts)}
    if config == "IA3Config":
        placed["feedforward_modules"] = module_paths(model, tuple(FEEDFORWARD.get(family) or ()), parts)
    return placed


def linear_paths(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """The linears that adapters go on, as PEFT takes them: those named, or else every one.

    Of an inserted pair, both factors. Of every linear PEFT leaves out the head, which it knows by the module; the layer
    inside of a scaled head is another one to it, and is left out here, so that models are trained where controls are.
    """
    if names:
        return module_paths(model, names)
    head = output_embeddings(model)
    if not isinstance(head, SpecDefScaled):
        return "all-linear"
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head.inflated
    ]


def norm_paths(model: nn.Module) -> list[str]:
    """Paths of norms that have parameters."""
    return [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False))
    ]


FACTORS = ("inflated", "compensation")


def module_paths(model: nn.Module, names: Sequence[str], parts: Sequence[str] = FACTORS) -> list[str]:
    """Modules by the end of their names, as PEFT takes them; of a hardened layer, the named factors.

    Where a name means none, it is passed on, for PEFT to say so.
    """
    hardened = set(hardened_paths(model))
    modules = [path for path, _ in model.named_modules()]
    found: list[str] = []
    for name in names:
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        for path in paths:
            present = dict(model.get_submodule(path).named_children())  # of a scaled layer, the one inside alone
            found += [f"{path}.{part}" for part in parts if part in present] if path in hardened else [path]
        found += [] if paths else [name]
    return list(dict.fromkeys(found))


BLOCK = 64
"""Weights that share a scale. Those of one row have to be whole blocks for bitsandbytes' packed kernel of CPUs."""


def train_qlora(model: Any, training: Training, task: Task) -> nn.Module:
    """LoRA on linears in 4 bits; ``qlora`` also quantizes the scales of blocks."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotApplicable("QLoRA needs bitsandbytes, which is not installed", "pip install bitsandbytes") from error
    nested = training.method == "qlora"
    head = output_embeddings(model)
    kept = (head, head.inflated if isinstance(head, SpecDefScaled) else None)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(module is each for each in kept):
            model.set_submodule(path, _quantized(bitsandbytes, module, nested))
    model.is_loaded_in_4bit = True  # by which PEFT knows which kind of adapter to put on
    try:
        return train_adapters(model, training, task)
    finally:
        model.is_loaded_in_4bit = False  # for the Trainer it would be one that transformers placed on devices


def _quantized(bitsandbytes: Any, linear: nn.Linear, nested: bool) -> nn.Module:
    """A linear with its weight in NF4, on its device."""
    has_bias = linear.bias is not None
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, compute_dtype=torch.bfloat16,
        compress_statistics=nested, quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = linear.weight.detach()
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type="nf4", module=made
    )
    if linear.in_features % BLOCK:
        made.support_avx512bf16_for_cpu = False
    if has_bias:
        made.bias = linear.bias
    return made.to(weight.device).train(linear.training)
