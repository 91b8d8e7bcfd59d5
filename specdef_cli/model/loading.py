"""Load a base or hardened directory from safetensors; code that comes with it runs only where the caller allows it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from specdef_cli.checkpoint.files import (
    DIFFUSERS,
    TRANSFORMERS,
    Library,
    is_lfs_pointer,
    lfs_pointer,
    library_of,
)
from specdef_cli.checkpoint.reader import Checkpoint, read_config
from specdef_cli.errors import SpecDefError, first_line, require_extra
from specdef_cli.model import register
from specdef_cli.model.configuration_specdef import MODEL_TYPE, SpecDefLoadError
from specdef_cli.model.families import DENOISER_WRITERS
from specdef_cli.process import forget_stale_launcher


@contextmanager
def new_objects_only() -> Iterator[None]:
    """Have garbage collections look only at objects made from now on.

    Code that loads one model after another collects garbage between them, and the Trainer and Accelerate do so several
    times a run; walking through torch and transformers takes a third of a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def named_class(config: Any, *, trust_remote_code: bool, auto: bool = False) -> Any:
    """The class of transformers, or of the checkpoint's own code, that ``architectures`` names; else ``AutoModel``.

    Args:
        auto: Return the auto class in the place of one that comes with the checkpoint.
    """
    name = next(iter(config.architectures or ()), None)
    if name is None:
        return transformers.AutoModel
    known = getattr(transformers, name, None)
    own = {
        auto: reference
        for auto, reference in (getattr(config, "auto_map", None) or {}).items()
        if auto.startswith(("AutoModel", "TFAutoModel", "FlaxAutoModel")) and isinstance(reference, str)
    }
    found = next(((auto, ref) for auto, ref in own.items() if ref.rpartition(".")[2] == name), None)
    if found is not None:
        if not trust_remote_code:
            hint = "Read that code, then pass --trust-remote-code."
            if known is not None:
                hint += " If transformers' class of that name is meant, take auto_map out of config.json."
            raise SpecDefError(f"architecture {name!r} is defined by code in the checkpoint ({found[1]})", hint)
        if auto:
            return getattr(transformers, found[0])
        return get_class_from_dynamic_module(found[1], config._name_or_path)
    if not (isinstance(known, type) and issubclass(known, PreTrainedModel)):
        raise SpecDefError(
            f"transformers {transformers.__version__} has no class {name!r}, which "
            f"{Path(config._name_or_path, 'config.json')} names",
            "Install the release of transformers that has it, or correct `architectures` in config.json.",
        )
    if own:
        which, reference = next(iter(own.items()))
        raise SpecDefError(
            f"config.json names the class {name}, and for {which} the code {reference}: loaders take either",
            "Take auto_map out of config.json if transformers' class is meant, or name the other in architectures.",
        )
    return known


# A process that has written its shards waits for the slowest one: for a large model, longer than any default.
LONGEST_WAIT = timedelta(days=2)


def process_state(device: str | None = None) -> PartialState:
    """Accelerate's view of the processes.

    Accelerate looks for other processes on the CPU only where it is told that the CPU is what computes; without that,
    every process of a launch on a machine without an accelerator would believe that it is alone. ``accelerate launch``
    itself starts several processes on accelerators only; on the CPU, ``torchrun`` does.

    Args:
        device: Where to compute; ``None`` is an accelerator where there is one.
    """
    forget_stale_launcher()
    try:
        return PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise SpecDefError(
            f"the processes that RANK and WORLD_SIZE name cannot be joined: {first_line(error)}",
            "Run `unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT` to work alone, or start all processes "
            "with torchrun.",
        ) from error


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_model(
    directory: str | Path,
    *,
    auto_class: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    configure: Callable[[Any], None] = lambda config: None,
    **kwargs: Any,
) -> Any:
    """Load the model in a directory, hardened or not, in evaluation mode.

    Args:
        directory: A directory with a ``config.json`` and safetensors files.
        auto_class: A class of transformers to load with, e.g. ``AutoModelForCausalLM``, or its name. By default the one
            that ``architectures`` names. A model of diffusers has one class only.
        dtype: The parameters' dtype; by default the one they are stored in.
        device: Where to load to; by default the CPU.
        trust_remote_code: Run code that comes with the directory. Hardened directories do not need it here.
        configure: Changes transformers' config before the model is built.
        **kwargs: Passed on to ``from_pretrained``.
    """
    register()
    path = Path(directory)
    library = library_of(read_config(path))
    try:
        if not library.is_transformers:
            require_extra("diffusion", "models of diffusers")
            from specdef_cli.model.diffusion import load_denoiser

            return load_denoiser(path, dtype=dtype, device=device, **kwargs)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        configure(config)
        if isinstance(auto_class, str):
            auto_class = getattr(transformers, auto_class)
        chosen = auto_class or named_class(config, trust_remote_code=trust_remote_code, auto=True)
        if device is not None:
            kwargs.setdefault("device_map", {"": device})
        if chosen.__name__.startswith("Auto"):
            kwargs.setdefault("trust_remote_code", trust_remote_code)
        return chosen.from_pretrained(path, config=config, dtype=dtype or "auto", use_safetensors=True, **kwargs)
    except SpecDefLoadError as error:
        raise SpecDefError(
            f"{directory} is not complete: {error}", "Restore its files, or harden the base model again."
        ) from error
    except SpecDefError:
        raise
    except Exception as error:
        # Unknown model types, damaged files, tensors of another shape, code that may not run: transformers raises
        # anything from OSError to what its libraries raise.
        raise SpecDefError(f"{directory} cannot be loaded: {first_line(error)}", _hint(path)) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars while it loads, and from listing tensors that it has no use for."""
    shown, verbosity = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if shown:
            transformers.logging.enable_progress_bar()


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory; its image processor where it has no tokenizer; ``None`` where it has neither."""
    register()
    path = Path(directory)
    for files, auto_class in ((_TOKENIZER_FILES, AutoTokenizer), (_IMAGE_PROCESSOR_FILES, AutoImageProcessor)):
        if any((path / name).is_file() for name in files):
            try:
                return auto_class.from_pretrained(path, trust_remote_code=trust_remote_code)
            except Exception as error:  # tokenizers raises plain ones
                pointer = next((name for name in files if is_lfs_pointer(path / name)), None)
                if pointer is not None:
                    raise lfs_pointer(pointer) from error
                raise SpecDefError(
                    f"the tokenizer or image processor in {directory} cannot be loaded: {first_line(error)}",
                    "Copy the files of the base model over it.",
                ) from error
    return None


def _hint(path: Path) -> str:
    if not any(path.glob("*.safetensors")):
        return "Save it as safetensors; pickled weights (.bin, .pt) can run code and are not loaded."
    config = read_config(path)
    if "auto_map" in config and config.get("model_type") != MODEL_TYPE:
        return "If it needs the code that comes with it, read that code and pass --trust-remote-code."
    return "Check the directory's files and the installed release of transformers."


DEEPEST = 1000
"""Layers that a model may share out among fewer tensors."""


def native_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """transformers' config object of a checkpoint; diffusers has none, and ``config.json`` itself serves."""
    if not checkpoint.library.is_transformers:
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


def empty_model(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> tuple[Any, nn.Module]:
    """The native config of a checkpoint, and its model without storage."""
    config = native_config(checkpoint, trust_remote_code=trust_remote_code)
    layers, tensors = getattr(config, "num_hidden_layers", None), len(checkpoint.tensors)
    if isinstance(layers, int) and layers > max(tensors, DEEPEST):  # they take minutes to build, and memory without end
        raise SpecDefError(
            f"config.json says num_hidden_layers {layers}, and the checkpoint has {tensors} tensors",
            "Use the config.json that belongs to this checkpoint.",
        )
    return config, meta_model(config, trust_remote_code=trust_remote_code)


def meta_model(config: PreTrainedConfig | Mapping[str, Any], *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a native config (of diffusers, ``config.json``) on the meta device: modules, names and shapes."""
    if isinstance(config, Mapping):
        return _diffusion_model(config)
    # A copy, because building a model writes into its config; eager, because a config may name an attention kernel that
    # is not installed here and that has no bearing on names.
    config = copy.deepcopy(config)
    with _building((config.architectures or [config.model_type])[0], TRANSFORMERS):
        chosen = named_class(config, trust_remote_code=trust_remote_code)
        if chosen is transformers.AutoModel:
            model = chosen.from_config(config, trust_remote_code=trust_remote_code, attn_implementation="eager")
        else:
            model = chosen._from_config(config, attn_implementation="eager")
    for module in model.modules():  # some are made by `torch.Tensor(size)`, which asks for no device
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return model


def _diffusion_model(config: Mapping[str, Any]) -> nn.Module:
    name = config["_class_name"]
    if name not in DENOISER_WRITERS:
        raise SpecDefError(
            f"{name!r} is not among the models of diffusers that can be hardened",
            f"Give a directory with a {', '.join(DENOISER_WRITERS)}, such as the unet/ of a Stable Diffusion pipeline.",
        )
    require_extra("diffusion", "models of diffusers")
    import diffusers

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
