"""``specdef push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from specdef_cli.cli.options import CreatePr, Json, Private, Quiet, Token
from specdef_cli.cli.output import Output
from specdef_cli.errors import SpecDefError


def push_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `specdef harden` published.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub; made if it does not exist.")],
    private: Private = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch to upload to.", show_default="main", rich_help_panel="Upload"),
    ] = None,
    create_pr: CreatePr = False,
    no_manifest: Annotated[
        bool,
        typer.Option(
            "--no-manifest", help="Leave out specdef.json, which says what was changed.", rich_help_panel="Upload"
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Upload a directory that is not hardened too.", rich_help_panel="Upload")
    ] = False,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a hardened directory with its card and certificate: after `specdef certify`, not before.

    Examples:

      specdef push hardened org/name --private

      specdef push hardened org/name --revision hardened --create-pr
    """
    from specdef_cli.checkpoint.check import require_directory

    require_directory(directory)
    from rich.text import Text

    from specdef_cli.checkpoint.manifest import MANIFEST_NAME
    from specdef_cli.checkpoint.resolve import Resolved
    from specdef_cli.checkpoint.upload import Destination, push, require_writable
    from specdef_cli.hardening.card import has_section
    from specdef_cli.model.opened import open_found

    output = Output(as_json, quiet)
    destination = Destination(repository, private, revision, create_pr, token)
    model = open_found(Resolved(directory, str(directory)))  # what is incomplete is not uploaded
    if model.manifest is None and not has_section(directory) and not yes:
        _ask(directory, repository)
    require_writable(destination)
    if no_manifest:
        output.note(
            f"{MANIFEST_NAME} was not uploaded: keep it for `specdef collapse --manifest`. "
            "Leaving it out hides little: norms give changed channels away, and names give factors away."
        )
    elif model.manifest is not None:
        output.note(
            f"{MANIFEST_NAME} is uploaded and names every changed weight: `specdef collapse {repository}` gives the "
            "original back. --no-manifest leaves it out, which hides little: norms give changed channels away."
        )
    upload = push(directory, destination, manifest=not no_manifest)
    if upload.removed:
        output.note(upload.note)
    output.data(
        {"address": upload.address, "repository": repository, "removed": upload.removed},
        Text(f"uploaded: {upload.address}"),
    )


def _ask(directory: Path, repository: str) -> None:
    """Have the user agree to upload weights that anyone can fine-tune."""
    problem = f"{directory} is not hardened: it has neither specdef.json nor the card that `specdef harden` writes"
    if sys.stdin is not None and sys.stdin.isatty():
        print(f"{problem}.", file=sys.stderr)
        if typer.confirm(f"Upload it to {repository} all the same?", err=True):
            return
    raise SpecDefError(problem, "Harden it first, or upload it as it is with --yes.")
