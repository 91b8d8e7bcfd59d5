"""One commit of a repository on the Hub: its files into the cache, or parts of them, and what may go wrong."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, tqdm

from specdef_cli.checkpoint.downloads import Downloads
from specdef_cli.errors import SpecDefError, first_line

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
        sha: Its hash.
        directory: Its snapshot in the cache.
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
