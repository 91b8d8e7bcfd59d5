"""The certificate: claims with their figures, the exact words for them, and the hashes of what was measured.

A claim either holds or fails, by a criterion that is stated in its sentence. What is measured but not claimed (which
attacks got through, which formats keep the function) stands beside the claims, whatever it says.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter

from specdef_cli import __version__
from specdef_cli.certify.card import Resistance, attack_section
from specdef_cli.certify.curvature import CurvatureFigures
from specdef_cli.certify.formats import FormatFigure
from specdef_cli.certify.function import TOLERANCE, FunctionFigures, SpectrumFigures
from specdef_cli.checkpoint.manifest import Manifest
from specdef_cli.checkpoint.stream import file_sha256
from specdef_cli.hardening.verify import LOGITS_TOLERANCE
from specdef_cli.model.opened import OpenedModel
from specdef_cli.report import cell, number

FORMAT_VERSION: Final = 3
PACKAGES = ("torch", "transformers", "safetensors", "peft", "pytorch_optimizer")
Curvatures = tuple[CurvatureFigures, CurvatureFigures]
"""Before and after."""

LOSS_TOLERANCE = 0.01
"""Nats by which the loss of a model with factors may differ from the base's: 1 % of perplexity."""


@dataclass(frozen=True)
class Claim:
    """A statement that was put to the test."""

    name: str
    """``function``, ``spectrum`` or ``curvature``."""
    holds: bool | None
    """``None`` where it could not be tested."""
    sentence: str
    """What was found, with its criterion."""


@dataclass(frozen=True)
class Provenance:
    """Where figures come from. Hashes are sha256, in hexadecimal."""

    date: str
    """When the measurement ended, UTC, ISO 8601."""
    versions: dict[str, str]
    """Of Python, of this package and of the libraries that compute, by name."""
    platform: str
    """The machine's kind, e.g. ``Linux-x86_64``."""
    device: str
    """Where curvature and formats were measured; the function is compared on the CPU."""
    seed: int
    """Seed of the hardening."""
    hardened: dict[str, str] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    """Hashes of ``config.json``, of every safetensors file and of the code that it brings, by name."""
    manifest: str = ""
    """Hash of the manifest as it is published (:meth:`specdef_cli.checkpoint.manifest.Manifest.published`)."""
    text: str | None = None
    """Hash of the text that loss was measured on; ``None`` for a model without tokens."""
    attack_report: str | None = None
    """Hash of ``report.json``, which names its data, budget and seeds; ``None`` without one."""


@dataclass(frozen=True)
class Certificate:
    """Everything that was measured of a hardened checkpoint."""

    format: Literal[3]
    """Version of the file's shape, :data:`FORMAT_VERSION`."""
    holds: bool
    """Whether no claim failed."""
    specdef_version: str
    """The version of this package that measured."""
    model: str
    base: str
    """Hub id, or the last part of the directory's path; so is ``model``."""
    provenance: Provenance
    """What exactly was measured, when, with what."""
    claims: tuple[Claim, ...]
    """What was put to the test."""
    function: FunctionFigures
    spectrum: SpectrumFigures
    curvature: Curvatures | None
    """Before and after; ``None`` where it was not measured."""
    deployment: tuple[FormatFigure, ...]
    """Formats that were measured."""
    resistance: Resistance | None
    """What the attack report says; ``None`` where none was given."""
    digest: str = ""
    """sha256 of this file's data with an empty digest, keys sorted, without spaces."""

    def sealed(self) -> Certificate:
        return replace(self, digest=digest_of(json.loads(self.to_json())))

    def to_json(self) -> str:
        """The text of ``certificate.json``; numbers that are not finite are null."""
        data = json.loads(CERTIFICATE_RECORD.dump_json(self))
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


CERTIFICATE_RECORD = TypeAdapter(Certificate)
"""Reads and writes a certificate as JSON data."""


def digest_of(data: Mapping[str, Any]) -> str:
    """sha256 of a certificate's JSON data without its digest."""
    text = json.dumps({**data, "digest": ""}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def no_claim_failed(claims: Sequence[Claim]) -> bool:
    return all(claim.holds is not False for claim in claims)


def claims_of(
    function: FunctionFigures, spectrum: SpectrumFigures, curvature: Curvatures | None, reason: str, manifest: Manifest
) -> tuple[Claim, ...]:
    """Derive the claims from the figures; ``reason`` says why there is no curvature."""
    return function_claim(function, manifest), spectrum_claim(spectrum), curvature_claim(curvature, reason)


def function_claim(figures: FunctionFigures, manifest: Manifest) -> Claim:
    """Claim that the files are the manifest's and compute what the base computes."""
    exact = not manifest.factored
    outputs = figures.outputs
    kept = outputs.equal if exact else outputs.relative <= LOGITS_TOLERANCE
    if figures.base_loss is not None and figures.hardened_loss is not None:
        allowed = 0.0 if exact else LOSS_TOLERANCE
        kept = kept and abs(figures.hardened_loss - figures.base_loss) <= allowed
    parts = [
        "its outputs are bit-identical to the base's"
        if outputs.equal
        else f"its outputs differ from the base's by {outputs.relative:.1e} (relative), {outputs.kl:.1e} nats of KL"
    ]
    if figures.base_loss is not None and figures.hardened_loss is not None:
        parts.append(f"its loss on text is {figures.hardened_loss:.4f} against {figures.base_loss:.4f} nats")
    if figures.greedy_agreement is not None:
        parts.append(f"{figures.greedy_agreement:.1%} of greedily generated tokens are the same")
    parts.append(
        "a fresh process computes the same outputs"
        if figures.fresh_process_equal
        else f"a fresh process does not compute the same outputs ({figures.fresh_process_error or 'they differ'})"
    )
    if figures.changed_files:
        parts.append(f"{', '.join(figures.changed_files)} is not the file that was written")
    else:
        parts.append("every weight file has the hash that the manifest names")
    criterion = "bit-identical" if exact else f"at most {LOGITS_TOLERANCE:g} and {LOSS_TOLERANCE:g} nats of loss"
    holds = bool(kept and figures.fresh_process_equal and not figures.changed_files)
    return Claim("function", holds, f"In its stored dtype, {'; '.join(parts)}. Criterion: {criterion}.")


def spectrum_claim(figures: SpectrumFigures) -> Claim:
    """Claim that the stored weights are inflated as the manifest says."""
    parts = []
    if figures.layers:
        worst = max(layer.worst for layer in figures.layers)
        parts.append(
            f"the top singular values of {len(figures.layers)} inflated layers are α times the original's within "
            f"{worst:.1e} (criterion: {TOLERANCE:g})"
        )
    if figures.folded_tensors:
        exact = figures.folded_tensors - len(figures.deviating)
        parts.append(
            f"{exact} of {figures.folded_tensors} rescaled tensors are the base's times the manifest's powers of two, "
            f"bit for bit, up to 2^{figures.largest_exponent} (criterion: all)"
        )
    return Claim("spectrum", figures.as_planned, f"Of the stored weights, {'; '.join(parts)}.")


def curvature_claim(figures: Curvatures | None, reason: str) -> Claim:
    """Claim that σ₁ of the loss Hessian grew."""
    if figures is None:
        return Claim("curvature", None, f"The Hessian was not measured: {reason}.")
    before, after = figures
    where = "" if after.block is None else f" (largest block: {after.block})"
    parts = [
        f"σ₁ of the loss Hessian is {after.top.value:.3g}, {after.top.value / before.top.value:.3g} times the base's "
        f"{before.top.value:.3g}{where}"
    ]
    if not (before.top.converged and after.top.converged):
        parts.append(f"residuals {before.top.residual:.1e} and {after.top.residual:.1e}, not converged")
    parts.append(f"gradient descent may take steps of η < {after.largest_stable_rate:.2g} (2/σ₁)")
    holds = after.top.value > before.top.value
    return Claim("curvature", holds, f"On a small batch of text, {'; '.join(parts)}. Criterion: it grew.")


def certificate_markdown(certificate: Certificate) -> str:
    """The certificate for people: its claims and formats, and the attacks that it quotes."""
    resistance = [] if certificate.resistance is None else [attack_section(certificate.resistance)]
    return "\n\n".join([certificate_section(certificate), *resistance])


def certificate_section(certificate: Certificate) -> str:
    """The certificate as a section of the model card, in Markdown."""
    lines = [
        "### Certificate",
        "",
        f"{certificate.model} against {certificate.base}, measured with specdef-cli {certificate.specdef_version} on "
        f"{certificate.provenance.date[:10]}, on these very files: `certificate.json` has their hashes, and "
        "`specdef verify-certificate` compares them.",
        "",
    ]
    words = {True: "holds", False: "**fails**", None: "not measured"}
    lines += [f"- {claim.name}: {words[claim.holds]}. {claim.sentence}" for claim in certificate.claims]
    if certificate.deployment:
        lines += ["", "What users may do to the weights, against the same done to the base:", ""]
        lines += ["| format | tool | base | hardened | |", "|---|---|---|---|---|"]
        lines += [
            f"| {figure.format} | {figure.tool} | {number(figure.base, 4)} | {number(figure.hardened, 4)} "
            f"| {figure.verdict}{cell(figure.note and f': {figure.note}')} |"
            for figure in certificate.deployment
        ]
    return "\n".join(lines)


def provenance(
    hardened: OpenedModel, base: OpenedModel, *, device: str, text: str | None, attack_report: Path | None
) -> Provenance:
    """Hash everything that a measurement was based on."""
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        platform=f"{platform.system()}-{platform.machine()}",
        device=device,
        seed=hardened.hardening.seed,
        hardened=file_hashes(hardened.directory),
        base=file_hashes(base.directory),
        manifest=manifest_sha256(hardened.hardening),
        text=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        attack_report=None if attack_report is None else file_sha256(attack_report),
    )


def file_hashes(directory: Path) -> dict[str, str]:
    """sha256 of what decides the function of a checkpoint, by name.

    That is ``config.json``, every safetensors file and, where the configuration names code to load, every Python file.
    """
    config = directory / "config.json"
    brings_code = config.is_file() and b'"auto_map"' in config.read_bytes()
    code = sorted(directory.glob("*.py")) if brings_code else []
    files = [config, *sorted(directory.glob("*.safetensors")), *code]
    return {path.name: file_sha256(path) for path in files if path.is_file()}


def manifest_sha256(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.published().to_json().encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "specdef-cli": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree on the path, without metadata
            continue
    return found
