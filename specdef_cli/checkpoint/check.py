"""Is what a command names there, and is it a model? Asked before anything heavy is imported."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from specdef_cli.checkpoint.files import Library, held_instead, locate
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, find_manifest, read_manifest
from specdef_cli.errors import SpecDefError
from specdef_cli.option import Source

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTED_MODULES = frozenset({"Dense", "LayerNorm", "LSTM", "CNN", "WeightedLayerPooling"})
"""Classes of sentence-transformers whose directories hold weights."""
SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
A_MODEL = "Give a model that transformers can load."

_ATTACK = ("it is what `specdef attack` wrote", "Give the model that was attacked.")
_DATA = ("it is a data set", "Give a model here, and the data to `specdef attack --dataset`.")
_MARKERS = (
    ("report.json", *_ATTACK),
    ("runs", *_ATTACK),
    ("certificate.json", "it is what `specdef certify` wrote", "Give the model that was certified."),
    ("dataset_info.json", *_DATA),
    ("dataset_dict.json", *_DATA),
    (
        "zero_to_fp32.py",
        "it is a training checkpoint of DeepSpeed",
        "Save the model with save_pretrained, and give that directory.",
    ),
    (
        "params.json",
        "it is a model in its authors' own format (params.json)",
        "Give the version that transformers loads, or convert it with transformers' script for the family.",
    ),
)
"""Files and directories that tell what the directory around them is, and what to do."""


def require_model(source: Source) -> Path | None:
    """Refuse a model that is not there; its directory on this disk, or ``None`` for a Hub id."""
    path = locate(str(source.model))  # what it cannot be is refused before anything is asked of the Hub
    if not isinstance(path, Path):
        return None
    find_manifest(path, source.manifest)
    if not (path / "config.json").is_file():
        raise no_config(path)
    return path


def require_hardened(source: Source) -> None:
    """Refuse a model that is not there, or that no manifest belongs to."""
    directory = require_model(source)
    if directory is not None:
        read_manifest(directory, source.manifest)


def require_directory(directory: Path) -> None:
    """Refuse what is no directory, where a Hub id will not do: its files are changed or uploaded."""
    if not directory.is_dir():
        raise SpecDefError(f"{directory} is not a directory", "Give one that `specdef harden` published.")


def require_card(source: Source) -> None:
    """Refuse a model whose card cannot be written to: a Hub id, what is not hardened, or a directory without one."""
    directory = Path(source.model).expanduser()
    card = directory / "README.md"
    if not directory.is_dir():
        raise SpecDefError(
            f"--card writes to a directory, and {source.model} is none", "Leave --card out, or download it."
        )
    read_manifest(directory, source.manifest)
    if not card.is_file() or not os.access(card, os.W_OK):
        raise SpecDefError(f"{card} is not a file that can be written to", "Leave --card out, or restore it.")


def require_not_hardened(source: Source) -> None:
    """Refuse a model that is not there, or whose manifest says that it is hardened."""
    directory = require_model(source)
    if directory is not None and find_manifest(directory) is not None:
        raise hardened_already(directory)


def hardened_already(directory: Path) -> SpecDefError:
    return SpecDefError(
        f"{directory} is hardened already",
        f"Give the base model, or have `specdef collapse` make it, which needs the {MANIFEST_NAME} of {directory}.",
    )


def require_models(source: Source, base: str | Path | None, option: str) -> None:
    """Refuse models that are not there; without ``base``, the undefended model is the one that the manifest names."""
    directory = require_model(source)
    if base is not None:
        found = require_model(Source(base))
        if found is not None:
            require_undefended(found, option)
    elif directory is not None:
        if find_manifest(directory, source.manifest) is None:
            raise no_base(source.model, option)
        from specdef_cli.checkpoint.resolve import base_of  # here: --help needs no huggingface_hub

        name, _ = base_of(read_manifest(directory, source.manifest), directory)
        try:
            require_model(Source(name))
        except SpecDefError as error:
            raise base_missing(name, source.model, option, error) from error


def require_undefended(base: Path, option: str) -> None:
    """Refuse a base that is hardened itself: measured against it, any hardening would seem to do nothing."""
    if (base / MANIFEST_NAME).is_file():
        raise SpecDefError(
            f"{option} {base} is hardened itself: its {MANIFEST_NAME} says so",
            f"Name the undefended model with {option}, or leave it out where the manifest names that.",
        )


def base_missing(name: str, model: str | Path, option: str, error: SpecDefError) -> SpecDefError:
    """The error for a base that the manifest names and that is not there."""
    return SpecDefError(
        f"the base {name} that the manifest of {model} names is not available: {error.problem}",
        f"Give its directory or Hub id with {option}.",
    )


def no_base(model: str | Path, option: str) -> SpecDefError:
    """The error for a model without a manifest whose base is not named either."""
    return SpecDefError(
        f"{model} has no manifest that names its base, so there is nothing to compare it with",
        f"Name the undefended model with {option}.",
    )


def no_config(directory: Path) -> SpecDefError:
    """The error for a directory without ``config.json``: what it is instead, and what to do."""
    denoiser = next((name for name in ("unet", "transformer") if (directory / name / "config.json").is_file()), None)
    snapshots = sorted(directory.glob("snapshots/*/config.json"))
    below = _model_below(directory)
    gguf = held_instead((path.name for path in directory.glob("*.gguf")), str(directory))
    known: tuple[tuple[object, str, str], ...] = (
        (
            (directory / "model_index.json").is_file(),
            "it is a pipeline of diffusers",
            f"Give its denoiser, {directory / denoiser}."
            if denoiser
            else "Fetch the directory of its denoiser, and give that.",
        ),
        ((directory / ADAPTER_CONFIG).is_file(), f"it is {_adapter_of(directory)}", _merge(directory)),
        (
            (directory / "modules.json").is_file(),
            "it is a model of sentence-transformers" + ("" if below else " without a transformer"),
            f"Give its transformer, {below}." if below else "Give a directory with a transformer.",
        ),
        *((found, "it is a repository in the Hub's cache", f"Give a snapshot in it, such as {found.parent}.")
          for found in snapshots[-1:]),
        *(((directory / name).exists(), what, hint) for name, what, hint in _MARKERS),
        *((gguf, f"it holds {what}", hint) for what, hint in filter(None, [gguf])),
        (below, "it holds a directory that has one", f"Give {below}."),
        (not any(directory.iterdir()), "it is empty", A_MODEL),
    )  # fmt: skip
    what, hint = next(((f": {what}", hint) for holds, what, hint in known if holds), ("", A_MODEL))
    return SpecDefError(f"{directory} has no config.json{what}", hint)


def no_weights(directory: Path, library: Library) -> SpecDefError:
    """The error for a directory with ``config.json`` and no weight file that its library loads."""
    if (directory / ADAPTER_CONFIG).is_file():
        return SpecDefError(f"{directory} has no weights of a model: it is {_adapter_of(directory)}", _merge(directory))
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    shards = [name for name in others if SHARD.fullmatch(name)]
    if shards:
        return SpecDefError(
            f"{directory} has {shards[0]} and no {library.index_file}, which says what is in which shard",
            f"Fetch {library.index_file} from where the shards came from, or save the model again.",
        )
    held = held_instead([path.name for path in directory.iterdir()], str(directory), library)
    if held is not None:
        return SpecDefError(f"{directory} has only {held[0]}", held[1])
    if others:
        return SpecDefError(
            f"{directory} has {others[0]} and no {library.single_file}, the name that {library.name} loads",
            f"If that file holds the weights, rename it to {library.single_file}.",
        )
    return SpecDefError(
        f"{directory} has no safetensors weights", f"It needs {library.single_file} or {library.index_file}."
    )


def require_plain(directory: Path, config: dict[str, Any], library: Library) -> None:
    """Refuse a directory from which transformers would load other weights too."""
    named = config.get("transformers_weights")
    if named is not None:
        raise SpecDefError(
            f"{directory}/config.json names {named!r} as its weights (transformers_weights)",
            f"Rename that file to {library.single_file}, and take transformers_weights out of config.json.",
        )
    if (directory / ADAPTER_CONFIG).is_file() and list(directory.glob("adapter_model.*")):
        raise SpecDefError(
            f"{directory} holds a model and an adapter, and transformers loads both together",
            f"Move {ADAPTER_CONFIG} and the adapter's weights to a directory of their own, or merge them into the "
            "model first.",
        )


def require_modules(directory: Path) -> None:
    """Refuse a model of sentence-transformers that would lose a module after the transformer."""
    try:
        modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
        folders = {str(module["path"]): str(module["type"]).rsplit(".", 1)[-1] for module in modules if module["path"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for name, kind in folders.items():
        folder = directory / name
        pickled = any(folder.glob("*.bin")) or kind in WEIGHTED_MODULES
        if pickled and not any(folder.glob("*.safetensors")):
            raise SpecDefError(
                f"the module {name} ({kind}) of {directory} has no safetensors weights, and pickles are not copied",
                "Convert it first: in sentence-transformers, SentenceTransformer(...).save_pretrained(...) writes "
                "safetensors.",
            )


def _adapter_of(directory: Path) -> str:
    try:
        base = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return f"an adapter of PEFT for {base}" if isinstance(base, str) else "an adapter of PEFT"


def _merge(directory: Path) -> str:
    return (
        "Give its base model; or merge it first: in peft, AutoPeftModelForCausalLM.from_pretrained"
        f"('{directory}').merge_and_unload().save_pretrained('merged') (or the class of its task)."
    )


def _model_below(directory: Path) -> Path | None:
    """Find a model in a subdirectory; the last of several training checkpoints."""
    found = []
    for path in directory.glob("*/config.json"):
        try:
            names_a_model = "model_type" in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, RecursionError):
            continue
        if names_a_model:
            found.append(path.parent)

    def by_number(path: Path) -> list[object]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]

    return max(found, key=by_number, default=None)
