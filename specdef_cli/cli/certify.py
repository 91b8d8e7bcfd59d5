"""``specdef certify`` and ``specdef verify-certificate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from specdef_cli.certify import CertifyOptions, require_certificate
from specdef_cli.checkpoint.check import require_hardened, require_model, require_models
from specdef_cli.checkpoint.output import writable_ancestor
from specdef_cli.cli.options import takes
from specdef_cli.cli.output import Output
from specdef_cli.errors import SpecDefError, require_extra
from specdef_cli.option import Source, option


@dataclass(frozen=True)
class Flags:
    dry_run: bool = option(False, "Print what would be measured; measure nothing.", group="Output")


@takes(CertifyOptions)
def certify_command(
    flags: Flags,
    output: Output,
    model: Annotated[
        str, typer.Argument(metavar="HARDENED", help="Directory or Hub id of a hardened model.")
    ] = "hardened",
    **given: Any,
) -> None:
    """Check a hardened checkpoint against its base: outputs, spectrum, curvature, formats.

    Attacks are quoted from a report of `specdef attack`. The exit code is 1 if a claim fails. The certificate names
    what was tried and what got through; it promises nothing else.

    Examples:

      specdef certify hardened --base ./my-model

      specdef certify hardened --attacks attack/report.json --json

      specdef certify hardened --formats nf4 --formats q8_0
    """
    # Validate first: importing torch takes seconds.
    options = CertifyOptions(model, **given)
    require_hardened(options)
    require_models(options, options.base, "--base")
    if options.text is not None and not options.text.is_file():
        raise SpecDefError(f"--text {options.text} is not a file", "Check the path.")
    writable_ancestor(options.out)
    require_extra("attack", "certificates")
    if options.attacks is not None:
        from specdef_cli.report.document import read_report

        read_report(options.attacks)
    from specdef_cli.certify.run import prepare

    prepared = prepare(options)
    if flags.dry_run:
        output.data({"measured": prepared.parts}, Text(f"measured: {', '.join(prepared.parts)}"))
        return
    with output.progress("certifying") as bar:

        def part(name: str) -> None:
            bar.advance(name, 0)
            bar.log(name)

        certificate = prepared.certify(part)
    from specdef_cli.certify.certificate import certificate_markdown

    output.data(certificate, Markdown(certificate_markdown(certificate)), written=options.out / "certificate.json")
    output.note(f"certificate: {options.out / 'certificate.json'}")
    if certificate.resistance is None:
        output.note(
            f"attacks: no report was given. `{prepared.attack_command}` makes one; "
            "then certify with --attacks attack/report.json."
        )
    if not certificate.holds:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Compared:
    base: str | None = option(
        None, "What it was made from.", metavar="BASE", shown_default="not checked", group="Model"
    )
    base_subfolder: str | None = option(
        None, "Folder in BASE that it is in.", metavar="DIR", group="Model / Folder that the model is in."
    )
    attacks: Path | None = option(
        None, "The report.json that it quotes.", metavar="REPORT", shown_default="not checked", group="Model"
    )


@takes(Source, without=("manifest", "trust_remote_code"))
def verify_certificate_command(
    model: Annotated[str, typer.Argument(metavar="HARDENED", help="Directory or Hub id with a certificate.json.")],
    compared: Compared,
    output: Output,
    **given: Any,
) -> None:
    """Check that files, figures and verdicts still fit a certificate.

    Compares hashes, and derives the verdicts from the figures again. Exits with 1 if anything differs. What was not
    checked is listed too.

    Examples:

      specdef verify-certificate hardened

      specdef verify-certificate org/name --base org/base --attacks report.json
    """
    from specdef_cli.report.document import require_report

    source = Source(model, **given)
    directory = require_model(source)
    if directory is not None:
        require_certificate(directory)
    base = None
    if compared.base is not None:
        base = Source(compared.base, subfolder=compared.base_subfolder, token=source.token)
        require_model(base)
    if compared.attacks is not None:
        require_report(compared.attacks)
    from specdef_cli.certify.verification import verify_certificate

    with output.progress("checking"):
        checks = verify_certificate(source, base=base, attacks=compared.attacks)
    table = Table("certificate", "", "detail")
    for check in checks:
        table.add_row(check.name, "DIFFERS" if check.result == "differs" else check.result, Text(check.detail))
    output.data({"checks": checks}, table)
    if any(check.result == "differs" for check in checks):
        raise typer.Exit(1)
