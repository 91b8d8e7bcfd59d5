"""``specdef verify-certificate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdef_cli.cli.options import Json, Quiet, Revision, Token
from specdef_cli.cli.output import Output


def verify_certificate_command(
    model: Annotated[str, typer.Argument(metavar="HARDENED", help="Directory or Hub id with a certificate.json.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="What it was made from.", show_default="not checked", rich_help_panel="Model"
        ),
    ] = None,
    attacks: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT",
            help="The report.json that it quotes.",
            show_default="not checked",
            rich_help_panel="Model",
        ),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that files, figures and verdicts still fit a certificate.

    Compares hashes, and derives the verdicts from the figures again. Exits with 1 if anything differs. What was not
    checked is listed too.

    Examples:

      specdef verify-certificate hardened

      specdef verify-certificate org/name --base org/base --attacks report.json
    """
    from rich.table import Table
    from rich.text import Text

    from specdef_cli.certify.options import require_certificate
    from specdef_cli.checkpoint.check import require_model
    from specdef_cli.report.document import require_report

    directory = require_model(model)
    if directory is not None:
        require_certificate(directory)
    if base is not None:
        require_model(base)
    if attacks is not None:
        require_report(attacks)
    from specdef_cli.certify.verification import verify_certificate

    output = Output(as_json, quiet)
    with output.progress("checking"):
        checks = verify_certificate(model, base=base, attacks=attacks, revision=revision, token=token)
    table = Table("certificate", "", "detail")
    for check in checks:
        table.add_row(check.name, "DIFFERS" if check.result == "differs" else check.result, Text(check.detail))
    output.data({"checks": checks}, table)
    if any(check.result == "differs" for check in checks):
        raise typer.Exit(1)
