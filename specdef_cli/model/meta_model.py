"""A model on the meta device from its config alone, and whether it runs there."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from specdef_cli.checkpoint.files import DIFFUSERS, TRANSFORMERS, Library, diffusers_missing
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.model.inputs import fixed_inputs
from specdef_cli.model.loading import own_class

DIFFUSION_MODELS = ("UNet2DConditionModel",)
"""The classes of diffusers that can be hardened."""


def native_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """transformers' config object of a checkpoint; diffusers has none, and ``config.json`` itself serves."""
    if not checkpoint.library.has_model_types:
        return checkpoint.config
    if checkpoint.config.get("quantization_config") == {}:
        raise SpecDefError(
            f"{checkpoint.directory}/config.json has an empty quantization_config, which transformers cannot load",
            "Remove that key if the weights are floating-point numbers.",
        )
    try:
        return transformers.AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        # transformers raises anything from ValueError to pydantic-like validation errors here.
        if "trust_remote_code" in str(error):
            raise SpecDefError(
                f"{checkpoint.directory} needs Python code that comes with the model",
                "Read that code, then pass --trust-remote-code.",
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpecDefError(
            f"{checkpoint.directory}/config.json is not accepted by transformers: {reason[:300]}",
            "Check model_type and the values in config.json.",
        ) from error


def meta_model(config: PreTrainedConfig | Mapping[str, Any], *, trust_remote_code: bool = False) -> nn.Module:
    """The model of ``config.architectures[0]`` (``AutoModel``'s choice where that is unset), without storage.

    Args:
        config: A native config; of a hardened directory, the base model's. Of a diffusers model, its ``config.json``.

    Returns:
        The model on the meta device: modules, names and shapes, no data.
    """
    if isinstance(config, Mapping):
        return _diffusion_model(config)
    # A copy, because building a model writes into its config; eager, because a config may name an attention kernel that
    # is not installed here and that has no bearing on names.
    config = copy.deepcopy(config)
    architecture = (config.architectures or [None])[0]
    with _building(architecture or config.model_type, TRANSFORMERS):
        if architecture is None:
            model = transformers.AutoModel.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="eager"
            )
        else:
            model_class = _model_class(config, architecture, trust_remote_code)
            model = model_class._from_config(config, attn_implementation="eager")
    for module in model.modules():  # some are made by `torch.Tensor(size)`, which asks for no device
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return model


def _diffusion_model(config: Mapping[str, Any]) -> nn.Module:
    name = config["_class_name"]
    if name not in DIFFUSION_MODELS:
        raise SpecDefError(
            f"{name!r} is not among the models of diffusers that can be hardened",
            f"Give a directory with a {', '.join(DIFFUSION_MODELS)}, such as the unet/ of a Stable Diffusion pipeline.",
        )
    try:
        import diffusers
    except ImportError as error:
        raise diffusers_missing(name) from error
    with _building(name, DIFFUSERS):
        return getattr(diffusers, name).from_config(dict(config))


@contextmanager
def _building(name: str, library: Library) -> Iterator[None]:
    """Build on the meta device; any exception from the constructor becomes a :class:`SpecDefError`."""
    try:
        with torch.device("meta"):
            yield
    except SpecDefError:
        raise
    except Exception as error:
        raise SpecDefError(
            f"{name} cannot be built from this config.json: {first_line(error)}",
            f"Check that config.json belongs to this checkpoint and that {library.name} supports the model.",
        ) from error


def _model_class(config: PreTrainedConfig, architecture: str, trust_remote_code: bool) -> Any:
    own = own_class(config, architecture, trust_remote_code=trust_remote_code)
    if own is not None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(own[1], config._name_or_path)
    model_class = getattr(transformers, architecture, None)
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    raise SpecDefError(
        f"transformers {transformers.__version__} has no architecture {architecture!r}",
        "Install the transformers release that the checkpoint's config.json names, or correct `architectures` there.",
    )


@dataclass(frozen=True)
class Trial:
    """What came of it."""

    inputs: tuple[str, ...]
    error: Exception | None
    certain: bool
    read_past: frozenset[str]


def try_out(model: nn.Module) -> Trial:
    """Run a model on the meta device once, where it computes shapes alone."""
    inputs: tuple[str, ...] = ()
    reads = _Reads(model)
    training = model.training
    try:
        for part in model.modules():  # other ways to run experts ask for values
            if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
                part.config._experts_implementation_internal = "batched_mm"
        batch = fixed_inputs(model.eval())
        inputs = tuple(batch)
        batch.pop("attention_mask", None)  # all ones, which models look at the values to find out
        batch = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.inference_mode(), torch.device("meta"), reads:
            model(**batch)
    except Exception as error:
        certain = not reads.guessed and not isinstance(error, NotImplementedError) and "meta" not in str(error).lower()
        return Trial(inputs, error, certain, frozenset(reads.found))
    finally:
        reads.remove()
        model.train(training)
    return Trial(inputs, None, True, frozenset(reads.found))


_QUESTIONS = (Tensor.__bool__, Tensor.__contains__, Tensor.item)


class _Reads(TorchFunctionMode):
    """Notices parameters that go into a computation while no module that owns them is running.

    Where a model asks whether a value is so, the answer is no.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.guessed = False
        self._running: Counter[str] = Counter()
        self._owners: dict[int, set[str]] = {}
        self._hooks = []
        for path, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            for parameter in own:
                self._owners.setdefault(id(parameter), set()).add(path)
            if own:
                self._hooks.append(module.register_forward_pre_hook(partial(self._count, path, 1)))
                self._hooks.append(module.register_forward_hook(partial(self._count, path, -1)))

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, path: str, step: int, *_: Any) -> None:
        self._running[path] += step

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _QUESTIONS and args[0].device.type == "meta":
            self.guessed = True
            return False
        result = func(*args, **(kwargs or {}))
        computed = isinstance(result, Tensor) or (
            isinstance(result, tuple | list) and any(map(torch.is_tensor, result))
        )
        for value in chain(args, (kwargs or {}).values()) if computed else ():  # not its dtype or its shape
            owners = self._owners.get(id(value), set()) if isinstance(value, nn.Parameter) else set()
            if not any(self._running[path] for path in owners):
                self.found |= owners
        return result
