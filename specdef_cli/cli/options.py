"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdef_cli.errors import clean_token

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a Hub id org/name[@revision].")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to publish; must not exist.", show_default=False)]
Manifest = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="specdef.json, where it does not lie in the directory.", show_default="the directory's"
    ),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest file, e.g. 500MB.")]
Device = Annotated[
    str | None, typer.Option(help="Where to compute, e.g. cpu or cuda:0.", show_default="every GPU, else the CPU")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")]


def _token(value: str | None) -> str | None:
    token = clean_token(value)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise typer.BadParameter("it holds white space or characters that no token has")
    return token


Token = Annotated[
    str | None,
    typer.Option(help="Hub token.", show_default="HF_TOKEN, else the stored login", envvar="HF_TOKEN", callback=_token),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Private = Annotated[bool, typer.Option("--private", help="If the repository is made, make it private.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Upload as a pull request.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no notes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it takes on this machine, and stop.")]
