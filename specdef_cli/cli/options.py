"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdef_cli.errors import clean_token

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a Hub id org/name[@revision].")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="New directory to publish.", metavar="DIR", show_default=False, rich_help_panel="Output"
    ),
]
Manifest = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="specdef.json.", show_default="the directory's", rich_help_panel="Model"),
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest file, e.g. 500MB.", rich_help_panel="Output")]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda:0, …", show_default="every GPU, else cpu", rich_help_panel="Model"),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Branch, tag or commit.", show_default="main", rich_help_panel="Model / On the Hub."
    ),
]

Subfolder = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Folder in MODEL that the model is in.",
        show_default=False,
        rich_help_panel="Model / In a folder of it.",
    ),
]


def _token(value: str | None) -> str | None:
    token = clean_token(value)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise typer.BadParameter("it holds white space or characters that no token has")
    return token


Token = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="Hub token.",
        show_default="HF_TOKEN, else the login",
        envvar="HF_TOKEN",
        callback=_token,
        rich_help_panel="Model / On the Hub.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel="Model"),
]
Private = Annotated[
    bool, typer.Option("--private", help="If the repository is made, make it private.", rich_help_panel="Upload")
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Upload as a pull request.", rich_help_panel="Upload")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run stopped.", rich_help_panel="Output")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.", rich_help_panel="Output")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no notes.", rich_help_panel="Output")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and its time here; run nothing.", rich_help_panel="Output")
]
