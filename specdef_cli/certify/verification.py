"""``specdef verify-certificate``: do files, figures and verdicts still fit a certificate? Nothing is measured again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from specdef_cli.certify import require_certificate
from specdef_cli.certify.card import Resistance, attack_section, read_resistance, section_like
from specdef_cli.certify.certificate import (
    CERTIFICATE_RECORD,
    FORMAT_VERSION,
    Certificate,
    Provenance,
    certificate_section,
    claims_of,
    digest_of,
    file_hashes,
    manifest_sha256,
    no_claim_failed,
)
from specdef_cli.certify.formats import FormatFigure, judge
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, Manifest, manifest_of
from specdef_cli.checkpoint.resolve import resolve
from specdef_cli.checkpoint.stream import file_sha256
from specdef_cli.errors import SpecDefError, first_violation
from specdef_cli.option import Source
from specdef_cli.report.document import require_report

Result = Literal["matches", "differs", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that a certificate says, and which file or figure differs, or why it was not checked."""

    name: str
    result: Result
    detail: str = ""


def verify_certificate(source: Source, *, base: Source | None = None, attacks: Path | None = None) -> tuple[Check, ...]:
    """Check the certificate of a hardened model; ``base`` and ``attacks`` are checked where given."""
    report = None if attacks is None else require_report(attacks)
    directory = _directory(source)
    recorded, origin = _read(require_certificate(directory))
    manifest = manifest_of(directory)
    base_directory = None if base is None else _directory(base)
    return (
        _check("certificate", recorded["digest"] == digest_of(recorded), "its digest is of other figures"),
        _hashes("hardened files", origin.hardened, directory),
        _manifest(origin, manifest, directory),
        Check("base files", "not checked", "give it with --base")
        if base_directory is None
        else _hashes("base files", origin.base, base_directory),
        *_figures(recorded, manifest, report, directory / "README.md"),
        Check("outputs, spectrum, curvature, formats", "not checked", "`specdef certify` measures them again"),
        Check("who wrote it", "not checked", "only a signature says so"),
    )


def _directory(source: Source) -> Path:
    return resolve(
        str(source.model), revision=source.revision, token=source.token, subfolder=source.subfolder
    ).directory


def _read(path: Path) -> tuple[dict[str, Any], Provenance]:
    """Read a certificate's data and provenance; other figures may be null, where they were not finite."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict) or recorded.get("format") != FORMAT_VERSION or "digest" not in recorded:
            raise ValueError(f"it is not of format {FORMAT_VERSION}")
        return recorded, TypeAdapter(Provenance).validate_python(recorded.get("provenance"))
    except ValidationError as error:
        reason = first_violation(error)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise SpecDefError(f"{path} is not a certificate: {reason}", "Certify the model again.")


def _check(name: str, same: bool, otherwise: str, detail: str = "") -> Check:
    return Check(name, "matches", detail) if same else Check(name, "differs", otherwise)


def _hashes(name: str, recorded: dict[str, str], directory: Path) -> Check:
    found = file_hashes(directory)
    differing = sorted(file for file in {*recorded, *found} if recorded.get(file) != found.get(file))
    return _check(name, not differing, ", ".join(differing), f"{len(found)} files")


def _manifest(origin: Provenance, manifest: Manifest | None, directory: Path) -> Check:
    if manifest is None:
        return Check("manifest", "not checked", f"{directory.name} has no {MANIFEST_NAME}")
    found = manifest_sha256(manifest)
    if origin.seed != manifest.seed:
        return Check("manifest", "differs", f"its seed is {manifest.seed}")
    return _check("manifest", origin.manifest == found, f"sha256 is {found}")


def _figures(recorded: dict[str, Any], manifest: Manifest | None, report: Path | None, card: Path) -> tuple[Check, ...]:
    """Check what follows from the figures: verdicts, the card, and the quoted attacks."""
    names = ("verdicts, from the figures", "model card", "attacks, from their report")
    try:
        certificate = CERTIFICATE_RECORD.validate_python(recorded)
    except ValidationError as error:
        # certify writes null for a number that was not finite; what else does not fit was never written by it.
        not_finite = all(violation["input"] is None for violation in error.errors())
        result: Result = "not checked" if not_finite else "differs"
        return tuple(Check(name, result, first_violation(error)) for name in names)
    verdicts, in_card, attacks = names
    return (
        Check(verdicts, "not checked", f"their criteria depend on {MANIFEST_NAME}")
        if manifest is None
        else _verdicts(verdicts, certificate, manifest),
        _card(in_card, certificate, card),
        Check(attacks, "not checked", "give report.json with --attacks")
        if report is None
        else _attacks(attacks, certificate, report),
    )


def _verdicts(name: str, certificate: Certificate, manifest: Manifest) -> Check:
    derived = claims_of(certificate.function, certificate.spectrum, certificate.curvature, "", manifest)
    differing = []
    for claim, other in zip(certificate.claims, derived, strict=False):
        # No figure says why a claim was not tested.
        if claim != (other if other.holds is not None else replace(other, sentence=claim.sentence)):
            differing.append(claim.name)
    if len(certificate.claims) != len(derived) or certificate.holds != no_claim_failed(certificate.claims):
        differing.append("whether all hold")
    differing += [figure.format for figure in certificate.deployment if not _follows(figure)]
    words = {True: "holds", False: "fails", None: "not measured"}
    found = "; ".join(f"{claim.name}: {words[claim.holds]}" for claim in certificate.claims)
    return _check(name, not differing, ", ".join(differing), found)


def _follows(figure: FormatFigure) -> bool:
    """Whether a format's figures allow its status."""
    if figure.base is None:
        return figure.status == "skipped"
    if figure.hardened is None:
        return figure.status in ("broken", "refused", "skipped")
    return figure.status == judge(figure.measure, figure.base, figure.hardened)


def _card(name: str, certificate: Certificate, path: Path) -> Check:
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    wanted = certificate_section(certificate)
    found = section_like(card, wanted)
    if found is None:
        return Check(name, "not checked", f"{path.name} quotes no certificate")
    if found != wanted:
        return Check(name, "differs", "it does not say what the certificate says")
    if certificate.resistance is not None:
        attacks = attack_section(certificate.resistance)
        if section_like(card, attacks) != attacks:
            return Check(name, "not checked", "its attacks are not those of the certificate: a later attack wrote them")
    return Check(name, "matches")


def _attacks(name: str, certificate: Certificate, report: Path) -> Check:
    if certificate.provenance.attack_report != file_sha256(report):
        return Check(name, "differs", "it is not the report that the certificate quotes")
    quoted = certificate.resistance
    same = quoted is not None and _without_places(quoted) == _without_places(read_resistance(report))
    return _check(name, same, "the certificate does not say of them what the report says")


def _without_places(resistance: Resistance) -> Resistance:
    """With names as any machine would have them: a report may name directories of the one that it was made on."""
    return replace(resistance, model=Path(resistance.model).name, data=Path(resistance.data).name)
