"""Load a base or hardened directory from safetensors; code that comes with it runs only where the caller allows it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from specdef_cli.checkpoint.headers import is_lfs_pointer, lfs_pointer
from specdef_cli.checkpoint.library import diffusers_missing, library_of
from specdef_cli.checkpoint.reader import read_config
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.model import register
from specdef_cli.model.configuration_specdef import MODEL_TYPE, SpecDefLoadError
from specdef_cli.process import forget_stale_launcher


@contextlib.contextmanager
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


def own_class(config: Any, architecture: str | None, *, trust_remote_code: bool) -> tuple[str, str] | None:
    """The auto class and the code reference that ``auto_map`` names for a model; ``None`` for transformers' own."""
    models = {
        auto: reference
        for auto, reference in (getattr(config, "auto_map", None) or {}).items()
        if auto.startswith(("AutoModel", "TFAutoModel", "FlaxAutoModel")) and isinstance(reference, str)
    }
    found = next(((auto, ref) for auto, ref in models.items() if ref.rpartition(".")[2] == architecture), None)
    if not models or architecture is None or (found is None and not hasattr(transformers, architecture)):
        return None
    if found is None:
        auto, reference = next(iter(models.items()))
        raise SpecDefError(
            f"config.json names the class {architecture}, and for {auto} the code {reference}: loaders take either",
            "Take auto_map out of config.json if transformers' class is meant, or name the other in architectures.",
        )
    if not trust_remote_code:
        hint = "Read that code, then pass --trust-remote-code."
        if hasattr(transformers, architecture):
            hint += " If transformers' class of that name is meant, take auto_map out of config.json."
        raise SpecDefError(f"architecture {architecture!r} is defined by code in the checkpoint ({found[1]})", hint)
    return found


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
        **kwargs: Passed on to ``from_pretrained``.
    """
    register()
    path = Path(directory)
    library = library_of(read_config(path))
    try:
        if not library.has_model_types:
            return _load_denoiser(path, dtype=None if dtype == "auto" else dtype, device=device, **kwargs)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        chosen = _model_class(path, config, auto_class, trust_remote_code)
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


def _load_denoiser(path: Path, **kwargs: Any) -> Any:
    try:
        from specdef_cli.model.diffusion import load_denoiser
    except ImportError as error:
        raise diffusers_missing(path) from error
    return load_denoiser(path, **kwargs)


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


def _model_class(path: Path, config: Any, auto_class: Any, trust_remote_code: bool) -> Any:
    if auto_class is not None and not isinstance(auto_class, str):
        return auto_class
    name = auto_class or next(iter(config.architectures or ()), None)
    if name is None:
        return transformers.AutoModel
    own = own_class(config, name, trust_remote_code=trust_remote_code)
    chosen = getattr(transformers, name if own is None else own[0], None)
    if chosen is None:
        raise SpecDefError(
            f"transformers {transformers.__version__} has no class {name!r}, which {path / 'config.json'} asks for",
            "Install a release of transformers that has it.",
        )
    return chosen


def _hint(path: Path) -> str:
    if not any(path.glob("*.safetensors")):
        return "Save it as safetensors; pickled weights (.bin, .pt) can run code and are not loaded."
    config = read_config(path)
    if "auto_map" in config and config.get("model_type") != MODEL_TYPE:
        return "If it needs the code that comes with it, read that code and pass --trust-remote-code."
    return "Check the directory's files and the installed release of transformers."
