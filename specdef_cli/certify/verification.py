"""``specdef verify-certificate``: what of a certificate can be found out again without measuring for hours.

Hashes are computed anew; claims, verdicts and the card are derived again from the figures; attacks are read again from
their report, and the stored spectrum from the weights, where these are at hand. What was not looked at is said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from specdef_cli.attack.presence import require_report
from specdef_cli.certify.attack_section import attack_section, section_like
from specdef_cli.certify.certificate import (
    CERTIFICATE_RECORD,
    Certificate,
    Claim,
    certificate_section,
    curvature_claim,
    function_claim,
    no_claim_failed,
    spectrum_claim,
)
from specdef_cli.certify.deployment import DeploymentFigure, judge
from specdef_cli.certify.presence import require_certificate
from specdef_cli.certify.provenance import Provenance, file_hashes, manifest_sha256
from specdef_cli.certify.resistance import Resistance, quoted_resistance
from specdef_cli.certify.spectrum import TOLERANCE, LayerSpectrum, SpectrumFigures, measure_spectrum
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
    certificate = _record(recorded)
    manifest = read_manifest(directory) if is_hardened(directory) else None
    base_directory = None if base is None else resolve(base, token=token).directory
    return (
        _hashes("hardened files", origin.hardened, directory),
        _manifest(origin, manifest, directory),
        Check("base files", "not checked", "give it with --base")
        if base_directory is None
        else _hashes("base files", origin.base, base_directory),
        Check("attacks, from their report", "not checked", "give report.json with --attacks")
        if attacks is None
        else _attacks(certificate, origin, attacks),
        _claims(certificate, manifest),
        _spectrum(directory, base_directory, manifest, certificate),
        _card(certificate, directory / "README.md"),
        Check("outputs, curvature, attacks, formats", "not checked", "`specdef certify` measures them again"),
        Check("date, versions, device, names, text", "not checked", "no file tells; a signature vouches for them"),
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


def _record(recorded: dict[str, Any]) -> Certificate | Check:
    """The whole certificate, or why its figures cannot be judged.

    ``certify`` writes null for a number that was not finite; what else does not fit was never written by it.
    """
    try:
        return CERTIFICATE_RECORD.validate_python(recorded)
    except ValidationError as error:
        not_finite = all(violation["input"] is None for violation in error.errors())
        return Check("", "not checked" if not_finite else "differs", first_violation(error))


def _hashes(name: str, recorded: dict[str, str], directory: Path) -> Check:
    found = file_hashes(directory)
    differing = sorted(file for file in {*recorded, *found} if recorded.get(file) != found.get(file))
    if differing:
        return Check(name, "differs", ", ".join(differing))
    return Check(name, "matches", f"{len(found)} files")


def _manifest(origin: Provenance, manifest: Manifest | None, directory: Path) -> Check:
    if manifest is None:
        return Check("manifest", "not checked", f"{directory.name} has no {MANIFEST_NAME}")
    found = manifest_sha256(directory)
    if origin.manifest != found:
        return Check("manifest", "differs", f"sha256 is {found}")
    if origin.seed != manifest.seed:
        return Check("manifest", "differs", f"its seed is {manifest.seed}")
    return Check("manifest", "matches")


def _attacks(certificate: Certificate | Check, origin: Provenance, report: Path) -> Check:
    """That the report is the one that was quoted, and was quoted as it is."""
    name = "attacks, from their report"
    found = file_sha256(report)
    if origin.attack_report != found:
        return Check(name, "differs", f"sha256 of the report is {found}")
    if isinstance(certificate, Check):
        return Check(name, certificate.result, certificate.detail)
    if _without_places(certificate.resistance) != _without_places(quoted_resistance(report)):
        return Check(name, "differs", "the certificate does not say of them what the report says")
    return Check(name, "matches", f"{len(certificate.resistance.attacks)} attacks")


def _without_places(resistance: Resistance) -> Resistance:
    """With names as any machine would have them: a report may name directories of the one that it was made on."""
    return replace(resistance, model=Path(resistance.model).name, data=Path(resistance.data).name)


def _claims(certificate: Certificate | Check, manifest: Manifest | None) -> Check:
    """That verdicts and sentences are those which the figures beside them lead to."""
    name = "claims, from the figures beside them"
    if isinstance(certificate, Check):
        return Check(name, certificate.result, certificate.detail)
    if manifest is None:
        return Check(name, "not checked", f"their criteria depend on {MANIFEST_NAME}")
    derived = (
        function_claim(certificate.function, manifest),
        spectrum_claim(certificate.spectrum),
        curvature_claim(certificate.curvature, _why_not_measured(certificate.claims)),
    )
    differing = [claim.name for claim, other in zip(certificate.claims, derived, strict=False) if claim != other]
    if certificate.holds != no_claim_failed(certificate.claims):
        differing.append("whether all hold")
    if len(certificate.claims) != len(derived):
        differing.append("how many there are")
    differing += [figure.format for figure in certificate.deployment if not _follows(figure)]
    if differing:
        return Check(name, "differs", ", ".join(differing))
    words = {True: "holds", False: "fails", None: "not measured"}
    return Check(name, "matches", "; ".join(f"{claim.name}: {words[claim.holds]}" for claim in certificate.claims))


def _why_not_measured(claims: Sequence[Claim]) -> str:
    """Why there is no curvature: no figure tells, so the recorded words stand for themselves, and only they."""
    before, after = curvature_claim(None, "\0").sentence.split("\0")
    return claims[-1].sentence.removeprefix(before).removesuffix(after) if claims else ""


def _follows(figure: DeploymentFigure) -> bool:
    """Whether the status of a format is one that its figures can have."""
    if figure.base is None:
        return figure.status == "skipped"
    if figure.hardened is None:
        return figure.status in ("broken", "refused", "skipped")
    return figure.status == judge(figure.measure, figure.base, figure.hardened)


def _spectrum(
    directory: Path, base: Path | None, manifest: Manifest | None, certificate: Certificate | Check
) -> Check:  # fmt: skip
    name = "spectrum, read from the weights"
    if base is None or manifest is None:
        missing = "the base (--base)" if base is None else MANIFEST_NAME
        return Check(name, "not checked", f"it takes {missing}")
    figures = measure_spectrum(open_checkpoint(base), open_checkpoint(directory), manifest)
    same = isinstance(certificate, Check) or _alike(certificate.spectrum, figures)
    return Check(name, "matches" if same and figures.as_planned else "differs", spectrum_claim(figures).sentence)


def _alike(recorded: SpectrumFigures, found: SpectrumFigures) -> bool:
    """Whether two readings are of the same weights. Singular values differ by rounding from machine to machine."""

    def without_values(figures: SpectrumFigures) -> SpectrumFigures:
        return replace(figures, layers=tuple(replace(layer, measured=()) for layer in figures.layers))

    def values(layer: LayerSpectrum, other: LayerSpectrum) -> bool:
        same_length = len(layer.measured) == len(other.measured)
        return same_length and replace(other, planned=layer.measured).worst <= TOLERANCE

    return without_values(recorded) == without_values(found) and all(
        values(*layers) for layers in zip(recorded.layers, found.layers, strict=True)
    )


def _card(certificate: Certificate | Check, path: Path) -> Check:
    """That the model card says what the certificate says."""
    name = "model card"
    if isinstance(certificate, Check):
        return Check(name, certificate.result, certificate.detail)
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    expected = certificate_section(certificate), attack_section(certificate.resistance)
    found = [section_like(card, section) for section in expected]
    if found[0] is None:
        return Check(name, "not checked", f"{path.name} quotes no certificate")
    if found[0] != expected[0]:
        return Check(name, "differs", "it does not say what the certificate says")
    if found[1] != expected[1]:
        return Check(name, "not checked", "its attacks are not those of the certificate; `specdef card` writes others")
    return Check(name, "matches")
