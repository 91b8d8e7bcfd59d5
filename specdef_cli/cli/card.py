"""``specdef card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdef_cli.cli.options import Json, Manifest, Quiet
from specdef_cli.cli.output import Output


def card_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `specdef harden` published.")],
    attacks: Annotated[Path, typer.Option(metavar="REPORT", help="report.json of an attack on it.")],
    manifest: Manifest = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what an attack found into the model card, those attacks first that got furthest.

    `specdef certify` does so too, with its certificate.

    Examples:

      specdef card hardened --attacks attack/report.json
    """
    from rich.text import Text

    from specdef_cli.attack.presence import require_report
    from specdef_cli.checkpoint.presence import require_directory, require_hardened

    require_directory(directory)
    require_hardened(str(directory), manifest)
    require_report(attacks)
    from specdef_cli.certify.attack_section import attacks_on_card  # torch: after what can be wrong

    output = Output(as_json, quiet)
    section = attacks_on_card(directory, attacks)
    output.data({"card": directory / "README.md", "section": section}, Text(section))
