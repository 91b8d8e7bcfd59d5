"""``specdef verify-certificate``: what of a certificate can be found out again without measuring for hours.

Hashes are computed anew, claims are derived again from the figures that stand beside them, and the stored spectrum is
read again where the base is at hand. What was not looked at is said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from specdef_cli.attack.presence import require_report
from specdef_cli.certify.certificate import (
    CERTIFICATE_RECORD,
    curvature_claim,
    function_claim,
    no_claim_failed,
    spectrum_claim,
)
from specdef_cli.certify.presence import require_certificate
from specdef_cli.certify.provenance import Provenance, file_hashes, manifest_sha256
from specdef_cli.certify.spectrum import measure_spectrum
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, Manifest, is_hardened, read_manifest
from specdef_cli.checkpoint.reader import open_checkpoint
from specdef_cli.checkpoint.resolve import resolve
from specdef_cli.checkpoint.stream import file_sha256
from specdef_cli.errors import SpecDefError, first_violation

Result = Literal["matches", "differs", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that a certificate says, looked at again.

    Attributes:
        name: What it is about.
        result: What came of it.
        detail: Which file or figure differs, or why it was not checked.
    """

    name: str
    result: Result
    detail: str = ""


def verify_certificate(
    model: str, *, base: str | None = None, attacks: Path | None = None, revision: str | None = None,
    token: str | None = None,
) -> tuple[Check, ...]:  # fmt: skip
    """Check the certificate of a hardened directory.

    Args:
        model: A hardened directory or Hub id with a ``certificate.json``.
        base: What it was made from; ``None`` leaves out what needs it.
        attacks: The ``report.json`` that the certificate quotes; ``None`` leaves it out.
        revision, token: Passed on to the Hub.

    Raises:
        SpecDefError: There is no certificate, or it cannot be read.
    """
    if attacks is not None:
        attacks = require_report(attacks)
    directory = resolve(model, revision=revision, token=token).directory
    recorded, origin = _read(require_certificate(directory))
    manifest = read_manifest(directory) if is_hardened(directory) else None
    base_directory = None if base is None else resolve(base, token=token).directory
    without_manifest = Check("manifest", "not checked", f"{directory.name} has no {MANIFEST_NAME}")
    return (
        _hashes("hardened weights", origin.hardened, directory),
        without_manifest if manifest is None else _equal("manifest", origin.manifest, manifest_sha256(directory)),
        Check("base weights", "not checked", "give it with --base")
        if base_directory is None
        else _hashes("base weights", origin.base, base_directory),
        Check("attack report", "not checked", "give report.json with --attacks")
        if attacks is None
        else _equal("attack report", origin.attack_report, file_sha256(attacks)),
        _claims(recorded, manifest),
        _spectrum(directory, base_directory, manifest),
        Check("outputs, curvature, attacks, formats", "not checked", "`specdef certify` measures them again"),
    )


@dataclass(frozen=True)
class _Header:
    """What a certificate must have to be checked at all: its figures may be null, where they were not finite."""

    format: Literal[2]
    provenance: Provenance
    claims: list[Any]


def _read(path: Path) -> tuple[dict[str, Any], Provenance]:
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        return recorded, TypeAdapter(_Header).validate_python(recorded).provenance
    except ValidationError as error:
        reason = first_violation(error)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise SpecDefError(f"{path} is not a certificate: {reason}", "Certify the model again.")


def _equal(name: str, recorded: str | None, found: str) -> Check:
    if recorded is None:
        return Check(name, "not checked", "the certificate names none")
    return Check(name, "matches") if recorded == found else Check(name, "differs", f"sha256 is {found}")


def _hashes(name: str, recorded: dict[str, str], directory: Path) -> Check:
    found = file_hashes(directory)
    differing = sorted(file for file in {*recorded, *found} if recorded.get(file) != found.get(file))
    if differing:
        return Check(name, "differs", ", ".join(differing))
    return Check(name, "matches", f"{len(found)} files")


def _claims(recorded: dict[str, Any], manifest: Manifest | None) -> Check:
    """That verdicts and sentences are those which the figures beside them lead to."""
    name = "claims, from the figures beside them"
    if manifest is None:
        return Check(name, "not checked", f"their criteria depend on {MANIFEST_NAME}")
    try:
        certificate = CERTIFICATE_RECORD.validate_python(recorded)
    except ValidationError as error:
        return Check(name, "not checked", first_violation(error))
    derived = [
        function_claim(certificate.function, manifest),
        spectrum_claim(certificate.spectrum),
        # Why a curvature was not measured is no figure: there the recorded sentence stands for itself.
        curvature_claim(certificate.curvature, "") if certificate.curvature else certificate.claims[-1],
    ]
    differing = [claim.name for claim, other in zip(certificate.claims, derived, strict=False) if claim != other]
    if certificate.holds != no_claim_failed(certificate.claims):
        differing.append("whether all hold")
    if len(certificate.claims) != len(derived):
        differing.append("how many there are")
    return Check(name, "differs", ", ".join(differing)) if differing else Check(name, "matches")


def _spectrum(directory: Path, base: Path | None, manifest: Manifest | None) -> Check:
    name = "spectrum, read from the weights"
    if base is None or manifest is None:
        missing = "the base (--base)" if base is None else MANIFEST_NAME
        return Check(name, "not checked", f"it takes {missing}")
    figures = measure_spectrum(open_checkpoint(base), open_checkpoint(directory), manifest)
    return Check(name, "matches" if figures.as_planned else "differs", spectrum_claim(figures).sentence)
