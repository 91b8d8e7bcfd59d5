"""Upload a published directory to the Hub, and find out before the work whether that will be allowed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from specdef_cli.checkpoint.manifest import MANIFEST_NAME, is_hardened, read_manifest
from specdef_cli.errors import SpecDefError, first_line

LOGIN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."


@dataclass(frozen=True)
class Destination:
    """A place on the Hub to upload to.

    Attributes:
        repository: ``org/name``, or ``name`` of the user's own; made if it does not exist.
        private: Whether a repository that is made is private. An existing one stays as it is.
        revision: The branch; ``None`` is the default one. Made if it does not exist.
        create_pr: Open a pull request instead of committing to the branch.
        token: Hub token; ``None`` leaves the choice to huggingface_hub.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    token: str | None = None


def require_writable(destination: Destination) -> None:
    """Ask the Hub who this is, and refuse where an upload could only fail.

    A fine-grained token may still lack the right; the Hub tells that at the upload.

    Raises:
        SpecDefError: There is no login, the token can only read, or the namespace is another one's.
    """
    require_name(destination.repository)
    try:
        account = HfApi(token=destination.token).whoami()
    except LocalTokenNotFoundError as error:
        raise SpecDefError(f"{destination.repository} cannot be uploaded: nobody is logged in", LOGIN) from error
    except Exception as error:
        # huggingface_hub documents no classes for what its HTTP library raises.
        refused = getattr(getattr(error, "response", None), "status_code", None) is not None
        raise SpecDefError(
            f"{destination.repository} cannot be uploaded: {first_line(error)}",
            LOGIN if refused else "Check the connection, or unset HF_HUB_OFFLINE; `specdef push` uploads later.",
        ) from error
    if _role(account) == "read":
        raise SpecDefError(f"{destination.repository} cannot be uploaded: {account['name']}'s token only reads", LOGIN)
    namespace, _, name = destination.repository.rpartition("/")
    spaces = [account["name"], *(organization["name"] for organization in account.get("orgs", ()))]
    if namespace and namespace not in spaces and not destination.create_pr:
        raise SpecDefError(
            f"{destination.repository} cannot be uploaded: {account['name']} does not belong to {namespace}",
            f"Upload to {account['name']}/{name}, or open a pull request with --create-pr.",
        )


def require_name(repository: str) -> None:
    """Refuse what no repository can be called, before anybody is asked.

    Raises:
        SpecDefError: naming it.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise SpecDefError(f"{repository!r} is not the name of a repository", "Give org/name.") from error


def _role(account: dict[str, Any]) -> str | None:
    token = account.get("auth", {}).get("accessToken") or {}
    role: str | None = token.get("role")
    return role


def push(directory: Path, destination: Destination, *, manifest: bool = True) -> str:
    """Upload a published directory, creating repository and branch if need be.

    Args:
        directory: What to upload.
        destination: Where to.
        manifest: Whether ``specdef.json`` goes along; what it says of a base that was a directory is its name alone.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        SpecDefError: The Hub refused.
    """
    api = HfApi(token=destination.token)
    try:
        repository = api.create_repo(destination.repository, private=destination.private or None, exist_ok=True).repo_id
        if destination.revision is not None and not destination.create_pr:
            api.create_branch(repository, branch=destination.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="Upload hardened model",
            revision=destination.revision,
            create_pr=destination.create_pr,
            ignore_patterns=[MANIFEST_NAME],
        )
        if manifest and is_hardened(directory):
            api.upload_file(
                repo_id=repository,
                path_or_fileobj=read_manifest(directory).published().to_json().encode(),
                path_in_repo=MANIFEST_NAME,
                commit_message="Upload manifest",
                revision=commit.pr_revision or destination.revision,
            )
    except Exception as error:
        raise SpecDefError(
            f"{destination.repository} could not be uploaded: {first_line(error)}",
            f"{LOGIN[:-1]}; {directory} is complete, and `specdef push` uploads it.",
        ) from error
    return str(commit.pr_url or commit.commit_url)
