"""Is what a command names there, and may its output be written? Asked before anything heavy is imported."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdef_cli.checkpoint.files import Library, held_instead
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, find_manifest, is_hardened, read_manifest
from specdef_cli.errors import SpecDefError
from specdef_cli.option import Source

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@.+)?")


def require_model(source: Source) -> Path | None:
    """Refuse a model that is not there; its directory on this disk, or ``None`` for a Hub id."""
    model = str(source.model)
    path = Path(model).expanduser()
    if path.is_dir():
        find_manifest(path, source.manifest)
        if not (path / "config.json").is_file():
            raise no_config(path)
        return path
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        from specdef_cli.checkpoint.resolve import locate  # here: --help needs no huggingface_hub

        locate(model)  # raises with what is wrong, before anything is asked of the Hub
    return None


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
    if directory is not None and is_hardened(directory):
        raise hardened_already(directory)


def hardened_already(directory: Path) -> SpecDefError:
    """What is said of a hardened model that is to be hardened."""
    return SpecDefError(f"{directory} is hardened already", "Give the base model, or run `specdef collapse` first.")


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
            raise SpecDefError(
                f"the base {name} that the manifest of {source.model} names is not available: {error.problem}",
                f"Give its directory or Hub id with {option}.",
            ) from error


def require_undefended(base: Path, option: str) -> None:
    """Refuse a base that is hardened itself: measured against it, any hardening would seem to do nothing."""
    if (base / MANIFEST_NAME).is_file():
        raise SpecDefError(
            f"{option} {base} is hardened itself: its {MANIFEST_NAME} says so",
            f"Name the undefended model with {option}, or leave it out where the manifest names that.",
        )


def no_base(model: str | Path, option: str) -> SpecDefError:
    """What is said of a model without a manifest where its base is not named either."""
    return SpecDefError(
        f"{model} has no manifest that names its base, so there is nothing to compare it with",
        f"Name the undefended model with {option}.",
    )


ADAPTER_CONFIG = "adapter_config.json"
WEIGHTED_MODULES = frozenset({"Dense", "LayerNorm", "LSTM", "CNN", "WeightedLayerPooling"})
"""Classes of sentence-transformers whose directories hold weights."""
SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")


def no_config(directory: Path) -> SpecDefError:
    """What to say of a directory without a ``config.json``."""
    problem = f"{directory} has no config.json"
    for recognized in _KINDS:
        found = recognized(directory)
        if found is not None:
            what, hint = found
            return SpecDefError(f"{problem}: {what}", hint)
    return SpecDefError(problem, "Give a directory that transformers can load.")


def no_weights(directory: Path, library: Library) -> SpecDefError:
    """What to say of a directory with a ``config.json`` and none of the weight files that its library looks for."""
    if (directory / ADAPTER_CONFIG).is_file():
        return SpecDefError(f"{directory} has no weights of a model: it is {_adapter_of(directory)}", _merge(directory))
    shards = sorted(path.name for path in directory.glob("*.safetensors") if SHARD.fullmatch(path.name))
    if shards:
        return SpecDefError(
            f"{directory} has {shards[0]} and no {library.index_file}, which says what is in which shard",
            f"Fetch {library.index_file} from where the shards came from, or save the model again.",
        )
    held = held_instead([path.name for path in directory.iterdir()], str(directory), library)
    if held is not None:
        return SpecDefError(f"{directory} has only {held[0]}", held[1])
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return SpecDefError(
            f"{directory} has {others[0]} and no {library.single_file}, the name that {library.name} loads",
            f"If that file holds the weights, rename it to {library.single_file}.",
        )
    return SpecDefError(
        f"{directory} has no safetensors weights", f"It needs {library.single_file} or {library.index_file}."
    )


def require_plain(directory: Path, config: dict[str, Any], library: Library) -> None:
    """Refuse a directory of which transformers would load more, or something else, than the weights of its model."""
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
    """Refuse a model of sentence-transformers of which a module after the transformer would be lost."""
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


def _adapter(directory: Path) -> tuple[str, str] | None:
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    return f"it is {_adapter_of(directory)}", _merge(directory)


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


def _pipeline(directory: Path) -> tuple[str, str] | None:
    if not (directory / "model_index.json").is_file():
        return None
    models = sorted(path.parent for path in directory.glob("*/config.json"))
    denoiser = [path for name in ("unet", "transformer") for path in models if path.name == name]
    which = f"Give its denoiser, {denoiser[0]}." if denoiser else "Fetch the directory of its denoiser, and give that."
    return "it is a pipeline of diffusers", which


def _sentence_transformer(directory: Path) -> tuple[str, str] | None:
    if not (directory / "modules.json").is_file():
        return None
    inside = _model_below(directory)
    if inside is None:
        return "it is a model of sentence-transformers without a transformer", "Give a directory with a transformer."
    return "it is a model of sentence-transformers", f"Give its transformer, {inside}."


def _marked(directory: Path) -> tuple[str, str] | None:
    return next(((what, hint) for name, what, hint in _MARKERS if (directory / name).exists()), None)


def _cache(directory: Path) -> tuple[str, str] | None:
    snapshots = sorted((directory / "snapshots").glob("*/config.json"))
    if not snapshots:
        return None
    return "it is a repository in the Hub's cache", f"Give a snapshot in it, such as {snapshots[-1].parent}."


def _llama_cpp(directory: Path) -> tuple[str, str] | None:
    held = held_instead((path.name for path in directory.glob("*.gguf")), str(directory))
    return None if held is None else (f"it holds {held[0]}", held[1])


def _holder(directory: Path) -> tuple[str, str] | None:
    inside = _model_below(directory)
    return None if inside is None else ("it holds a directory that has one", f"Give {inside}.")


def _empty(directory: Path) -> tuple[str, str] | None:
    return None if any(directory.iterdir()) else ("it is empty", "Give a directory that transformers can load.")


def _model_below(directory: Path) -> Path | None:
    """A directory with a ``config.json`` of a model right below; of several training checkpoints, the last."""
    found = []
    for path in directory.glob("*/config.json"):
        try:
            names_a_model = "model_type" in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, RecursionError):
            continue
        if names_a_model:
            found.append(path.parent)
    return max(
        found, key=lambda path: [int(part) if part.isdigit() else part for part in _parts(path.name)], default=None
    )


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


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
"""What a file or directory says of the one that it is in, and what to do."""
_KINDS: tuple[Callable[[Path], tuple[str, str] | None], ...] = (
    _pipeline, _adapter, _sentence_transformer, _cache, _marked, _llama_cpp, _holder, _empty,
)  # fmt: skip
