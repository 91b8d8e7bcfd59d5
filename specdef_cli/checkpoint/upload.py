"""Upload a published directory to the Hub, and find out before the work whether that will be allowed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from specdef_cli.checkpoint.files import holds_weights, require_inside
from specdef_cli.checkpoint.manifest import MANIFEST_NAME
from specdef_cli.checkpoint.resolve import status_of
from specdef_cli.errors import SpecDefError, WrongUsage, first_line

LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
OF_A_HARDENING = frozenset({MANIFEST_NAME, "certificate.json", "configuration_specdef.py"})
HINTS = {
    401: LOGIN,
    403: LOGIN,
    409: "Someone else wrote to the repository meanwhile; try again.",
    412: "Someone else wrote to the repository meanwhile; try again.",
    413: "The Hub takes no file of this size: harden with a smaller --max-shard-size.",
    429: "The Hub takes no more requests for now; try again in some minutes.",
}
"""What to do about an upload that the Hub refused, by its status."""


@dataclass(frozen=True)
class Destination:
    """A place on the Hub to upload to: ``org/name``, or ``name`` of the user's own; made if it does not exist."""

    repository: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    token: str | None = None


@dataclass(frozen=True)
class Upload:
    address: str
    removed: tuple[str, ...]

    @property
    def note(self) -> str:
        return f"Removed from the repository, as the directory has no such files: {', '.join(self.removed)}."


def upload_hint(error: BaseException) -> str:
    status = status_of(error)
    if status is None:
        return "Check the connection, or unset HF_HUB_OFFLINE."
    return HINTS.get(status, "The Hub is out of order; try again later." if status >= 500 else "See what the Hub said.")


def require_writable(destination: Destination) -> None:
    """Ask the Hub who this is, and refuse where an upload could only fail.

    A fine-grained token may still lack the right; the Hub tells that at the upload.
    """
    try:
        validate_repo_id(destination.repository)
    except HFValidationError as error:
        raise WrongUsage(
            f"{destination.repository!r} is not the name of a repository",
            "Give org/name; --revision (of harden: --push-revision) names a branch.",
        ) from error
    if destination.create_pr and destination.revision is not None:
        raise WrongUsage(
            f"a pull request cannot be opened against {destination.revision}, only against the default branch",
            "Leave out either the branch or --create-pr.",
        )
    try:
        account = HfApi(token=destination.token).whoami()
    except LocalTokenNotFoundError as error:
        raise SpecDefError(f"{destination.repository} cannot be uploaded: nobody is logged in", LOGIN) from error
    except Exception as error:
        # huggingface_hub documents no classes for what its HTTP library raises.
        raise SpecDefError(
            f"{destination.repository} cannot be uploaded: {first_line(error)}",
            f"{upload_hint(error)} `specdef push` uploads later.",
        ) from error
    if (account.get("auth", {}).get("accessToken") or {}).get("role") == "read":
        raise SpecDefError(f"{destination.repository} cannot be uploaded: {account['name']}'s token only reads", LOGIN)
    namespace, _, name = destination.repository.rpartition("/")
    spaces = [account["name"], *(organization["name"] for organization in account.get("orgs", ()))]
    if namespace and namespace not in spaces and not destination.create_pr:
        raise SpecDefError(
            f"{destination.repository} cannot be uploaded: {account['name']} does not belong to {namespace}",
            f"Upload to {account['name']}/{name}, or open a pull request with --create-pr.",
        )


def push(directory: Path, destination: Destination, *, without: Collection[Path] = ()) -> Upload:
    """Upload a directory in one commit that leaves no weights, manifest or certificate but the directory's.

    Args:
        without: Files and directories that stay here, relative to it.
    """
    files = _files(directory, without)
    api = HfApi(token=destination.token)
    try:
        repository = api.create_repo(destination.repository, private=destination.private or None, exist_ok=True).repo_id
        if destination.revision is not None:
            api.create_branch(repository, branch=destination.revision, exist_ok=True)
        there = api.model_info(repository, revision=destination.revision)
        # What would stand beside the upload and speak of, or be, other weights.
        others = [file.rfilename for file in there.siblings or () if file.rfilename not in files]
        stale = [name for name in others if name in OF_A_HARDENING or holds_weights(PurePosixPath(name))]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
                *(CommitOperationAdd(name, path) for name, path in files.items()),
            ],
            commit_message="Upload hardened model",
            revision=destination.revision,
            create_pr=destination.create_pr,
            parent_commit=there.sha,  # what was listed is what is removed
        )
    except Exception as error:
        raise SpecDefError(
            f"{destination.repository} could not be uploaded: {first_line(error)}",
            f"{upload_hint(error)} {directory} stays as it is, and `specdef push` uploads it.",
        ) from error
    return Upload(str(commit.pr_url or commit.commit_url), tuple(stale))


def _files(directory: Path, without: Collection[Path]) -> dict[str, Path]:
    kept = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if not path.is_file() or {".git", ".cache"} & {*name.parts} or {*without} & {name, *name.parents}:
            continue
        require_inside(directory, path)
        kept[name.as_posix()] = path
    return kept
