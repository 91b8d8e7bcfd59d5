"""From what the user typed (a directory, or a Hub id) to a local directory.

Everything about the Hub is huggingface_hub's: its cache, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``. This
module only splits ``org/name@revision``, leaves pickled weights where they are, and turns failures into advice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from specdef_cli.errors import SpecDefError

# Weights in other formats are neither needed nor wanted: pickles run code when they are loaded.
IGNORED_DOWNLOADS = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    "*.gguf",
    "*.tflite",
    "*.mlmodel",
]


@dataclass(frozen=True)
class Resolved:
    """A model on the local disk.

    Attributes:
        directory: Where its files are.
        name: What to call it: the Hub id, or the directory as given.
        revision: The revision asked for; ``None`` for a directory.
        commit: The commit hash of the snapshot; ``None`` for a directory.
    """

    directory: Path
    name: str
    revision: str | None = None
    commit: str | None = None


def resolve(model: str, *, revision: str | None = None, token: str | None = None) -> Resolved:
    """Find ``model`` on disk, downloading it from the Hub if it is not a directory.

    Args:
        model: A directory, or a Hub id ``org/name``, optionally ``org/name@revision``.
        revision: Branch, tag or commit; the same as the part after ``@``.
        token: Hub token; by default huggingface_hub looks for ``HF_TOKEN`` and the stored login.

    Raises:
        SpecDefError: There is no such directory or repository, or it cannot be reached.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return Resolved(path, model)
    if model and path.exists():
        raise SpecDefError(f"{model} is a file", "Give the directory that holds config.json and the safetensors files.")
    repository, _, suffix = model.partition("@")
    if suffix and revision and suffix != revision:
        raise SpecDefError(f"two revisions are named: {suffix} and {revision}", "Give the revision once.")
    revision = revision or suffix or None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or model.startswith((".", "~")):
        raise SpecDefError(f"{model!r} is neither a directory nor a Hub id", "Check the path, or give org/name.")
    try:
        directory = Path(
            snapshot_download(repository, revision=revision, token=token, ignore_patterns=IGNORED_DOWNLOADS)
        )
    except Exception as error:
        # Not only huggingface_hub's own errors: those of the HTTP library underneath escape it, and that one changes.
        raise _not_available(repository, revision, error) from error
    return Resolved(directory, repository, revision or "main", directory.name)


def push(directory: Path, repository: str, *, token: str | None = None) -> str:
    """Upload a published directory to the Hub, creating the repository if need be. Returns its address.

    Raises:
        SpecDefError: The Hub refused.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload hardened model"))
    except Exception as error:
        # As above: what the HTTP library raises is nobody's interface.
        raise SpecDefError(
            f"{repository} could not be uploaded: {_first_line(error)}",
            f"Log in with `hf auth login` or set HF_TOKEN to a token that may write; {directory} is complete.",
        ) from error


def _not_available(repository: str, revision: str | None, error: Exception) -> SpecDefError:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        # The Hub did answer; that the cache could not stand in for it is only the consequence.
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
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
    return SpecDefError(f"{repository} could not be fetched: {_first_line(error)}", "Try again, or give a directory.")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
