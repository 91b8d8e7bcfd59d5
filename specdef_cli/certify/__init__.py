"""Checks of a hardened checkpoint against its base: what was promised, measured. Here are their options."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from specdef_cli.errors import SpecDefError
from specdef_cli.option import Source, into_folder, option
from specdef_cli.process import CallablePackage

sys.modules[__name__].__class__ = CallablePackage

CERTIFICATE_NAME = "certificate.json"


@dataclass(frozen=True)
class CertifyOptions(Source):
    """Options of :func:`specdef_cli.certify`.

    Attributes:
        formats: Names of :data:`specdef_cli.certify.formats.FORMATS`, ``all`` or ``none``.
        device: The function is always compared on the CPU, where a fresh process must give the same bits.
    """

    out: Path = option(Path("certificate"), "Where the certificate goes.", "--out", "-o", metavar="DIR", group="Output")
    base: str | None = option(
        None, "What it was made from.", metavar="BASE", shown_default="the manifest's", group="Model"
    )
    base_subfolder: str | None = option(
        None, "Folder in BASE that it is in.", metavar="DIR", group="Model / Folder that the model is in."
    )
    attacks: Path | None = option(
        None,
        "Quote this report.json of `specdef attack`.",
        metavar="REPORT",
        group="Measurements",
    )
    text: Path | None = option(
        None, "Text to measure loss on.", metavar="FILE", shown_default="Python's source", group="Measurements"
    )
    formats: tuple[str, ...] | None = option(
        None,
        "Format, all or none.",
        "--formats",
        metavar="NAME",
        shown_default="float32, bfloat16, float16",
        group="Measurements",
    )
    curvature: bool = option(True, "Measure the Hessian.", "--curvature/--no-curvature", group="Measurements")
    card: bool = option(True, "Write it beside the model, and into its card.", "--card/--no-card", group="Output")
    device: str = option("cpu", "Where curvature and formats are measured.", metavar="DEVICE", group="Measurements")

    def __post_init__(self) -> None:
        super().__post_init__()
        into_folder(self, "base")


def require_certificate(directory: Path) -> Path:
    """Find the certificate of a hardened directory, before anything heavy is imported."""
    path = directory / CERTIFICATE_NAME
    if not path.is_file():
        raise SpecDefError(
            f"{directory} has no {CERTIFICATE_NAME}",
            "Write one with `specdef certify`, or fetch the one it came with.",
        )
    return path
