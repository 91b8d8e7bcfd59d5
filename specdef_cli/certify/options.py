"""What a caller may ask of :func:`specdef_cli.certify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specdef_cli.option import as_declared, option, require_positive


@dataclass(frozen=True)
class CertifyOptions:
    """Options of :func:`specdef_cli.certify`.

    Attributes:
        model: The hardened directory (or a Hub id).
        out: Where the certificate is written, and the attack report where one is made.
        manifest: ``specdef.json`` where it does not lie in the model's directory.
        base: What it was made from; ``None`` takes the base that the manifest names.
        attacks: A ``report.json`` on this model; ``None`` runs the quick suite.
        text: A text file to measure loss on; ``None`` is the source of Python's standard library.
        formats: Deployment formats; ``None`` takes those that take seconds, and empty leaves that part out.
        curvature: Whether the Hessian is measured.
        card: Whether a local model's card and directory get the certificate too.
        statement: Whether the certificate is written as an in-toto statement too.
        jobs: Attack runs at a time.
        device: Where the curvature and the deployment formats are measured. The function is always compared on the CPU,
            where a fresh process must give the same bits.
        trust_remote_code: Whether the base's own Python code may run.
        revision, token: Passed on to the Hub.

    Raises:
        SpecDefError: ``jobs`` is not positive.
    """

    model: str
    out: Path = option(Path("certificate"), "Where the certificate and the attack report go.", "--out", "-o")
    base: str | None = option(None, "What it was made from.", shown_default="the base that the manifest names")
    attacks: Path | None = option(
        None, "report.json of an attack on it.", metavar="REPORT", shown_default="the quick suite is run"
    )
    text: Path | None = option(None, "Text to measure loss on.", shown_default="Python's standard library")
    formats: tuple[str, ...] | None = option(
        None, "Deployment format to try.", "--format", shown_default="those that take seconds"
    )
    curvature: bool = option(True, "Measure the Hessian.", "--curvature/--no-curvature")
    card: bool = option(True, "Put the certificate into the model's directory and its card.", "--card/--no-card")
    statement: bool = option(False, "Write certificate.intoto.json too, which in-toto's tools can sign.")
    jobs: int = option(1, "Attack runs at a time.", "--jobs", "-j")
    device: str = option("cpu", "Where curvature and formats are measured, e.g. cuda.")
    manifest: Path | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        as_declared(self)
        require_positive(self, "jobs")
