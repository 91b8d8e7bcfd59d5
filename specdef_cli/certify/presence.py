"""Is there the certificate that a command names? Asked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from specdef_cli.errors import SpecDefError

CERTIFICATE_NAME = "certificate.json"


def require_certificate(directory: Path) -> Path:
    """Where the certificate of a hardened directory lies.

    Raises:
        SpecDefError: It has none.
    """
    path = directory / CERTIFICATE_NAME
    if not path.is_file():
        raise SpecDefError(
            f"{directory} has no {CERTIFICATE_NAME}",
            "Write one with `specdef certify`, or fetch the one it came with.",
        )
    return path
