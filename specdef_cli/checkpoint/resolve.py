"""From what a user typed to a directory on this disk, through the Hub's cache, and what may go wrong on the way."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import DryRunFileInfo, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from specdef_cli.checkpoint.files import OTHER_FORMATS, PICKLES, SAFETENSORS, held_instead, locate, write_durably
from specdef_cli.checkpoint.manifest import Manifest, last_part
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.process import first_completed


def status_of(error: BaseException) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def not_available(repository: str, revision: str | None, error: Exception) -> SpecDefError:
    """The error for a failed request to the Hub."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        # The Hub did answer; that the cache could not stand in for it is only the consequence.
        error = error.__cause__
    status = status_of(error)
    if isinstance(error, GatedRepoError) or status == 403:
        return SpecDefError(
            f"{repository} is gated and this account has no access",
            f"Ask for access on the model's page ({repository}), then set HF_TOKEN or run `hf auth login`.",
        )
    if isinstance(error, RevisionNotFoundError):
        return SpecDefError(f"{repository} has no revision {revision}", "Check the branch, tag or commit hash.")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return SpecDefError(
            f"{repository} is neither a local directory nor a model on the Hub that this account can see",
            "Check the spelling; for a private model set HF_TOKEN or run `hf auth login`.",
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return SpecDefError(
            f"{repository} is not in the local cache and the Hub cannot be reached",
            "Check the connection, unset HF_HUB_OFFLINE, or give a directory.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpecDefError(
            f"{repository} could not be fetched: {error.strerror}",
            "Free some space, or set HF_HOME to a directory on a larger disk.",
        )
    said, hint = first_line(error), "Try again, or give a directory."
    if "protocol" in said or "scheme" in said:
        hint = "Check HF_ENDPOINT and the proxy in the environment (https_proxy)."
    return SpecDefError(f"{repository} could not be fetched: {said}", hint)


# Weights in other formats are neither needed nor wanted: pickles run code when they are loaded. ``consolidated`` are
# Mistral's own names for weights that are there a second time.
IGNORED_DOWNLOADS = [*(f"*{suffix}" for suffix in (*PICKLES, *OTHER_FORMATS)), "*.onnx*", "consolidated*.safetensors"]


@dataclass(frozen=True)
class Resolved:
    """A model on the local disk.

    Attributes:
        revision: The revision asked for; ``None`` for a directory.
        commit: The commit hash of the snapshot; ``None`` for a directory.
        subfolder: The folder of the repository that it is in; ``None`` at its root, and for a directory.
    """

    directory: Path
    name: str
    revision: str | None = None
    commit: str | None = None
    subfolder: str | None = None

    @property
    def public_name(self) -> str:
        """The Hub id, or the last part of the directory's path."""
        return self.name if self.commit else last_part(self.directory)


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    output: Path | None = None,
) -> Resolved:
    """Find ``model`` on disk, downloading it from the Hub if it is not a directory.

    Args:
        output: Where as much will be written once more.
    """
    place = locate(model, revision)
    if isinstance(place, Path):
        return Resolved(place, model)
    repository, revision = place
    arguments: dict[str, Any] = {"token": token, "ignore_patterns": IGNORED_DOWNLOADS}
    if subfolder is not None:
        arguments["allow_patterns"] = f"{glob.escape(subfolder)}/*"
    try:
        try:
            files = snapshot_download(repository, revision=revision, dry_run=True, tqdm_class=_HiddenBar, **arguments)
            commit = files[0].commit_hash if files else revision
        except DryRunError:  # the Hub cannot be asked: the cache may have it nevertheless
            files, commit = None, revision
        if files is not None:
            _require_safetensors(repository, revision, token, subfolder, [file.filename for file in files])
            _require_space(repository, files, output)
        directory = _download(repository, revision=commit, **arguments)
    except SpecDefError:
        raise
    except Exception as error:
        # Not only huggingface_hub's own errors: those of the HTTP library underneath escape it, and that one changes.
        raise not_available(repository, revision, error) from error
    if subfolder is not None and not (directory / subfolder).is_dir():
        raise SpecDefError(f"{repository} has no folder {subfolder} in the local cache", "Unset HF_HUB_OFFLINE.")
    return Resolved(directory / (subfolder or ""), repository, revision or "main", directory.name, subfolder)


def _download(repository: str, **arguments: Any) -> Path:
    """Download a snapshot in a thread that Ctrl-C ends; huggingface_hub would finish the files that are under way."""
    stopped = threading.Event()
    done: Future[str] = Future()

    class Bar(tqdm):
        """huggingface_hub's own bar, which it tells of every piece that has arrived."""

        def update(self, n: float | None = 1) -> Any:
            if stopped.is_set():
                raise CancelledError
            return super().update(n)

    def download() -> None:
        try:
            done.set_result(snapshot_download(repository, tqdm_class=Bar, **arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=download, daemon=True).start()
    try:
        first_completed({done})
    finally:
        stopped.set()
    return Path(done.result())


def _require_safetensors(
    repository: str, revision: str | None, token: str | None, subfolder: str | None, names: Sequence[str]
) -> None:
    """Refuse a repository of weights in other formats or folders, before anything of it is downloaded."""
    holding = {str(PurePosixPath(name).parent) for name in names if name.endswith(SAFETENSORS)}
    if holding:
        models = [folder for folder in sorted(holding) if f"{folder}/config.json" in names]
        if models and (f"{subfolder}/config.json" if subfolder else "config.json") not in names:
            named = next((folder for folder in models if folder in ("unet", "transformer")), models[0])
            raise SpecDefError(
                f"{repository} has no config.json" + (f" in {subfolder}" if subfolder else " at its root"),
                f"Name the folder that the model is in: --subfolder {named}.",
            )
        return
    there = HfApi(token=token).list_repo_files(repository, revision=revision)
    folder = f"{subfolder}/" if subfolder else ""
    inside = [name.removeprefix(folder) for name in there if name.startswith(folder)]
    held = held_instead((name for name in inside if "/" not in name), repository)
    if held is not None:
        raise SpecDefError(f"{repository} has only {held[0]}", held[1])
    if not names:
        raise SpecDefError(
            f"{repository} holds no file that is read here" + (f" in {subfolder}" if subfolder else ""),
            "Check the spelling, and what the repository holds.",
        )


def _require_space(repository: str, files: Sequence[DryRunFileInfo], output: Path | None) -> None:
    """Refuse a download for which the disk is too small, before any of it is written."""
    nbytes = sum(file.file_size or 0 for file in files if file.will_download)
    if not nbytes:
        return
    disk = _existing(Path(files[0].local_path).parent)
    needs, remedy = f"{repository} needs", "or set HF_HOME to a directory on a larger disk"
    if output is not None and _existing(output.absolute()).stat().st_dev == disk.stat().st_dev:
        nbytes += sum(file.file_size or 0 for file in files if file.filename.endswith(SAFETENSORS))
        needs, remedy = f"{repository} and the output {output} need", f"choose another --out, {remedy}"
    free = shutil.disk_usage(disk).free
    if nbytes > free:
        raise SpecDefError(
            f"{needs} {nbytes / 1e9:.1f} GB and {disk} has {free / 1e9:.1f} GB free", f"Free some space, {remedy}."
        )


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


class _HiddenBar(tqdm):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})


def remember_base(manifest: Manifest, base: Path) -> None:
    """Remember on this machine where a manifest's base lies: the manifest names no local path."""
    with contextlib.suppress(OSError):  # it will have to be named with --base
        write_durably(_memory_of(manifest), os.fsencode(base.resolve()))


def _memory_of(manifest: Manifest) -> Path:
    digest = hashlib.sha256(manifest.published().to_json().encode()).hexdigest()
    return Path(constants.HF_HOME) / "specdef" / "bases" / digest[:32]


def base_of(manifest: Manifest, directory: Path) -> tuple[str, str | None]:
    """Find the base that a manifest names: a directory or a Hub id, and its revision."""
    base = manifest.base
    if base.commit or base.revision:
        return base.name, base.commit or base.revision
    path = Path(base.name).expanduser()
    places = [path] if path.is_absolute() else [path, *(parent / path for parent in directory.resolve().parents)]
    with contextlib.suppress(OSError):
        places.insert(0, Path(os.fsdecode(_memory_of(manifest).read_bytes())))
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is not None:
        return str(found), None
    return base.hub_id or (base.name if path.is_absolute() else f"./{base.name}"), None
