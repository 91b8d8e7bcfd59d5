"""One commit of a repository on the Hub: its files into the cache, or parts of them, and what may go wrong."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DryRunFileInfo, HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, tqdm

from specdef_cli.checkpoint.downloads import Downloads
from specdef_cli.checkpoint.manifest import last_part
from specdef_cli.checkpoint.other_directories import held_instead
from specdef_cli.checkpoint.weight_formats import OTHER_FORMATS, PICKLES, SAFETENSORS
from specdef_cli.errors import SpecDefError, clean_token, first_line

PARTIAL_CONTENT = 206
# As many as huggingface_hub takes for a snapshot.
WORKERS = 8


class NoPartsError(Exception):
    """The server sends whole files only."""


@dataclass(frozen=True)
class Commit:
    """One commit of a repository.

    Attributes:
        repository: ``org/name``.
        revision: What the user called the commit; ``None`` is the default branch.
        token: Hub token; ``None`` leaves the choice to huggingface_hub.
    """

    repository: str
    revision: str | None
    sha: str
    directory: Path
    token: str | None

    def fetch(self, name: str, bar: type[tqdm]) -> None:
        """Download a file into the cache, if it is not there.

        Raises:
            Exception: Whatever huggingface_hub raises.
        """
        hf_hub_download(self.repository, name, revision=self.sha, token=self.token, tqdm_class=bar)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end`` of a file, from the Hub.

        Raises:
            NoPartsError: It has sent something else.
            Exception: Whatever huggingface_hub raises.
        """
        headers = build_hf_headers(token=self.token)
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.repository, name, revision=self.sha)
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, max_retries=2
        ) as response:
            hf_raise_for_status(response)
            if response.status_code != PARTIAL_CONTENT:
                raise NoPartsError
            data = bytes(response.read())
        if len(data) != end - begin:
            raise NoPartsError
        return data


def download_all(commit: Commit, names: Sequence[str]) -> None:
    """Download files into the cache; whatever ends this ends the downloads."""
    downloads = Downloads(names, commit.fetch, WORKERS)
    try:
        downloads.wait_for_all()
    except Exception as error:
        raise not_available(commit.repository, commit.revision, error) from error
    finally:
        downloads.close()


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception carries."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def not_available(repository: str, revision: str | None, error: Exception) -> SpecDefError:
    """What went wrong between here and the Hub, as the user should hear it."""
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
    said = first_line(error)
    wrong_address = "protocol" in said or "scheme" in said
    return SpecDefError(
        f"{repository} could not be fetched: {said}",
        "Check HF_ENDPOINT and the proxy in the environment (https_proxy)."
        if wrong_address
        else "Try again, or give a directory.",
    )


# Weights in other formats are neither needed nor wanted: pickles run code when they are loaded. ``consolidated`` are
# Mistral's own names for weights that are there a second time.
IGNORED_DOWNLOADS = [*(f"*{suffix}" for suffix in (*PICKLES, *OTHER_FORMATS)), "*.onnx*", "consolidated*.safetensors"]


@dataclass(frozen=True)
class Resolved:
    """A model on the local disk.

    Attributes:
        revision: The revision asked for; ``None`` for a directory.
        commit: The commit hash of the snapshot; ``None`` for a directory.
    """

    directory: Path
    name: str
    revision: str | None = None
    commit: str | None = None

    @property
    def public_name(self) -> str:
        """What others may read: the Hub id, or the last part of the directory's path."""
        return self.name if self.commit else last_part(self.directory)


def resolve(model: str, *, revision: str | None = None, token: str | None = None) -> Resolved:
    """Find ``model`` on disk, downloading it from the Hub if it is not a directory.

    Args:
        model: A directory, or a Hub id ``org/name``, optionally ``org/name@revision``.
        revision: Branch, tag or commit; the same as the part after ``@``.
        token: Hub token; by default huggingface_hub looks for ``HF_TOKEN`` and the stored login.
    """
    where = locate(model, revision, token)
    if isinstance(where, Resolved):
        return where
    commit, missing = where
    download_all(commit, [file.filename for file in missing])
    return resolved(commit)


def locate(model: str, revision: str | None, token: str | None) -> Resolved | tuple[Commit, list[DryRunFileInfo]]:
    """Where ``model`` is: on this disk, or else its commit and the files that its snapshot lacks."""
    token = clean_token(token)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return Resolved(path, model)
    if model and path.exists():
        held = held_instead([path.name], str(path.parent))
        if held is not None:
            raise SpecDefError(f"{model} holds {held[0]}", held[1])
        raise SpecDefError(f"{model} is a file", "Give the directory that holds config.json and the safetensors files.")
    repository, _, suffix = model.partition("@")
    if suffix and revision and suffix != revision:
        raise SpecDefError(f"two revisions are named: {suffix} and {revision}", "Give the revision once.")
    revision = revision or suffix or None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or model.startswith((".", "~")):
        raise SpecDefError(f"{model!r} is neither a directory nor a Hub id", "Check the path, or give org/name.")
    try:
        try:
            files = snapshot_download(
                repository,
                revision=revision,
                token=token,
                ignore_patterns=IGNORED_DOWNLOADS,
                dry_run=True,
                tqdm_class=_HiddenBar,
            )
        except DryRunError:  # the Hub cannot be asked: the cache may have it nevertheless
            files = []
        if not files:
            directory = Path(
                snapshot_download(repository, revision=revision, token=token, ignore_patterns=IGNORED_DOWNLOADS)
            )
    except Exception as error:
        # Not only huggingface_hub's own errors: those of the HTTP library underneath escape it, and that one changes.
        raise not_available(repository, revision, error) from error
    if not files:
        if not directory.is_dir():
            _require_safetensors(Commit(repository, revision, directory.name, directory, token), ())
            raise SpecDefError(
                f"{repository} holds no file that is read here", "Check the spelling, and what the repository holds."
            )
        return Resolved(directory, repository, revision or "main", directory.name)
    first = files[0]
    directory = Path(first.local_path).parents[first.filename.count("/")]
    commit = Commit(repository, revision, directory.name, directory, token)
    _require_safetensors(commit, [file.filename for file in files])
    missing = [file for file in files if not Path(file.local_path).exists()]
    _require_space(commit, bytes_to_download(missing))
    return (commit, missing) if missing else resolved(commit)


def _require_safetensors(commit: Commit, names: Iterable[str]) -> None:
    """Refuse a repository of weights in other formats, before anything of it is downloaded."""
    if any(name.endswith(SAFETENSORS) for name in names):
        return
    try:
        there = HfApi(token=commit.token).list_repo_files(commit.repository, revision=commit.sha)
    except Exception as error:
        raise not_available(commit.repository, commit.revision, error) from error
    held = held_instead((name for name in there if "/" not in name), commit.repository)
    if held is not None:
        raise SpecDefError(f"{commit.repository} has only {held[0]}", held[1])


def bytes_to_download(missing: Iterable[DryRunFileInfo]) -> int:
    """What files will take in the cache; the contents of some may be there already, under another commit."""
    return sum(file.file_size or 0 for file in missing if file.will_download)


def _require_space(commit: Commit, nbytes: int) -> None:
    """Refuse a download for which the disk is too small, before any of it is written."""
    cache = commit.directory.parents[2]  # <cache>/models--org--name/snapshots/<commit>
    existing = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise SpecDefError(
            f"{commit.repository} needs {nbytes / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB free",
            "Free some space, or set HF_HOME to a directory on a larger disk.",
        )


def resolved(commit: Commit) -> Resolved:
    """A commit whose files are in the cache, or will be."""
    return Resolved(commit.directory, commit.repository, commit.revision or "main", commit.sha)


class _HiddenBar(tqdm):
    """A bar for looking only."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})
