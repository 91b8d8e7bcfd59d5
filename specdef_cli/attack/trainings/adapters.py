"""The trainings that put PEFT's adapters on a model.

LoRA (Hu et al. 2021, arXiv 2106.09685), DoRA (Liu et al. 2024, arXiv 2402.09353), PiSSA (Meng et al. 2024, arXiv
2404.02948), IA³ (Liu et al. 2022, arXiv 2205.05638), QLoRA (Dettmers et al. 2023, arXiv 2305.14314) and the rows of
``PEFT_METHODS``. LoRA's α is twice the rank, as is usual; the learning rate's search makes up for any other scale.

QLoRA's weights are quantized by bitsandbytes after loading, so that hardened modules get what ordinary ones get: NF4 in
blocks of 64, computed with in bfloat16. Everything else is float32, as PEFT prepares a model for this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft
import torch
from peft import IA3Config, LoraConfig, PeftConfig, TaskType, get_peft_model
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
    """PEFT's wrapper around a model, in which the adapters alone train."""
    try:
        return get_peft_model(model, make_config())
    except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError, AssertionError) as error:
        raise NotApplicable(
            f"{training.label} cannot be put on {','.join(training.where) or 'this model'}: {first_line(error)}",
            f"Name linear layers of this model, as in --training {training.method}@q_proj.",
        ) from error


def train_peft_method(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """The adapters of a row of :data:`PEFT_METHODS`; of an inserted pair, on both factors."""
    method = next(method for method in PEFT_METHODS if method.name == training.method)

    def config() -> PeftConfig:
        arguments: dict[str, Any] = dict(method.arguments)
        if method.size is not None:
            arguments[method.size_argument] = int(training.size or 0)
        if method.on == "norms":
            arguments["target_modules"] = list(training.where) or norm_paths(model)
        elif method.on == "linears":
            arguments["target_modules"] = linear_paths(model, training.where)
        return getattr(peft, method.config)(task_type=PEFT_TASKS[task], **arguments)

    return with_adapters(model, training, config)


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
    """Modules that normalize, and have something to train."""
    return [
        path
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False))
    ]


def module_paths(
    model: nn.Module, names: Sequence[str], parts: Sequence[str] = ("inflated", "compensation")
) -> list[str]:
    """Modules by the end of their names, as PEFT takes them; of a hardened layer, the named factors.

    Where a name means none, it is passed on, for PEFT to say so.
    """
    hardened = set(hardened_paths(model))
    modules = [path for path, _ in model.named_modules()]
    found: list[str] = []
    for name in names:
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        for path in paths:
            found += _parts(model, path, parts) if path in hardened else [path]
        found += [] if paths else [name]
    return list(dict.fromkeys(found))


def _parts(model: nn.Module, path: str, parts: Sequence[str]) -> list[str]:
    """The named factors that a hardened layer has; of a scaled one, the layer inside."""
    present = {name for name, _ in model.get_submodule(path).named_children()}
    return [f"{path}.{part}" for part in parts if part in present]


def model_type(model: nn.Module) -> str:
    """As transformers and PEFT know the architecture: ``llama``."""
    return str(getattr(model.config, "model_type", "this model"))


def train_lora(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA on every linear, or on those named; of an inserted pair, on both factors."""
    return with_adapters(model, training, lambda: _config(training, task, linear_paths(model, training.where)))


def train_dora(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """As :func:`train_lora`, with the weight's norm trained apart."""
    targets = linear_paths(model, training.where)
    return with_adapters(model, training, lambda: _config(training, task, targets, use_dora=True))


def train_lora_default(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA where PEFT puts it on this architecture."""

    def config() -> LoraConfig:
        names = tuple(LORA_TARGETS.get(model_type(model), ()))
        if not names:
            raise ValueError(f"PEFT has no default targets for {model_type(model)}")
        return _config(training, task, module_paths(model, names))

    return with_adapters(model, training, config)


def _config(training: Training, task: Task, targets: list[str] | str, **more: Any) -> LoraConfig:
    rank = int(training.size or 0)
    return LoraConfig(task_type=PEFT_TASKS[task], r=rank, lora_alpha=2 * rank, target_modules=targets, **more)


def train_pissa(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """PiSSA on every linear, or on those named; of an inserted pair, on both factors.

    The frozen rest is rounded in the weights' dtype: beside factors beyond 2^24 nothing of the other channels is left,
    so a fold may be broken before its first step.
    """
    rank = int(training.size or 0)
    targets = linear_paths(model, training.where)
    return with_adapters(
        model,
        training,
        lambda: LoraConfig(
            task_type=PEFT_TASKS[task], r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="pissa"
        ),
    )


def train_ia3(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """IA³ where PEFT puts it on this architecture, or on the modules named; of an inserted pair, on W~.

    PEFT knows the usual architectures, and that IA³ scales what an MLP's last linear reads.
    """

    def config() -> IA3Config:
        family = model_type(model)
        return IA3Config(
            task_type=PEFT_TASKS[task],
            target_modules=_paths(model, training.where or tuple(IA3_TARGETS.get(family) or ())) or None,
            feedforward_modules=_paths(model, tuple(FEEDFORWARD.get(family) or ())),
        )

    return with_adapters(model, training, config)


def _paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    return module_paths(model, names, ("inflated",))


BLOCK = 64
"""Weights that share a scale. Those of one row have to be whole blocks for bitsandbytes' packed kernel of CPUs."""


def train_qlora(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """LoRA on every linear, or on those named, with double quantization: that of the scales of blocks."""
    return _train(model, training, task, nested=True)


def train_qlora_single(model: nn.Module, training: Training, task: Task) -> nn.Module:
    """As :func:`train_qlora`, with the scales of blocks in float32."""
    return _train(model, training, task, nested=False)


def _train(model: Any, training: Training, task: Task, *, nested: bool) -> nn.Module:
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotApplicable("QLoRA needs bitsandbytes, which is not installed", "pip install bitsandbytes") from error
    head = output_embeddings(model)
    kept = (head, head.inflated if isinstance(head, SpecDefScaled) else None)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(module is each for each in kept):
            model.set_submodule(path, _quantized(bitsandbytes, module, nested))
    model.is_loaded_in_4bit = True  # by which PEFT knows which kind of adapter to put on
    try:
        return train_lora(model, training, task)
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
