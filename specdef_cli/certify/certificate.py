"""The certificate: claims with their figures, and the exact words for them.

A claim either holds or fails, by a criterion that is stated in its sentence. What is measured but not claimed (which
attacks got through, which formats keep the function) stands beside the claims, whatever it says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import TypeAdapter

from specdef_cli.certify.curvature_change import CurvatureFigures
from specdef_cli.certify.deployment import DeploymentFigure
from specdef_cli.certify.function import FunctionFigures
from specdef_cli.certify.provenance import Provenance
from specdef_cli.certify.resistance import Resistance
from specdef_cli.certify.spectrum import TOLERANCE, SpectrumFigures
from specdef_cli.checkpoint.manifest import Manifest
from specdef_cli.hardening.verify import LOGITS_TOLERANCE

FORMAT_VERSION: Final = 2
LOSS_TOLERANCE = 0.01
"""Nats by which the loss of a model with factors may differ from the base's: 1 % of perplexity."""


@dataclass(frozen=True)
class Claim:
    """A statement that was put to the test.

    Attributes:
        name: ``function``, ``spectrum`` or ``curvature``.
        holds: ``None`` where it could not be tested.
        sentence: What was found, with its criterion.
    """

    name: str
    holds: bool | None
    sentence: str


@dataclass(frozen=True)
class Certificate:
    """Everything that was measured of a hardened checkpoint.

    Attributes:
        format: Version of the file's shape, :data:`FORMAT_VERSION`.
        holds: Whether no claim failed.
        specdef_version: The version of this package that measured.
        model, base: Hub ids, or the last part of the directories' paths.
        provenance: What exactly was measured, when, with what.
        claims: What was put to the test.
        function, spectrum, deployment, resistance: The figures.
        curvature: Before and after; ``None`` where it was not measured.
    """

    format: Literal[2]
    holds: bool
    specdef_version: str
    model: str
    base: str
    provenance: Provenance
    claims: tuple[Claim, ...]
    function: FunctionFigures
    spectrum: SpectrumFigures
    curvature: tuple[CurvatureFigures, CurvatureFigures] | None
    deployment: tuple[DeploymentFigure, ...]
    resistance: Resistance

    def to_json(self) -> str:
        """The text of ``certificate.json``; numbers that are not finite are null."""
        data = json.loads(CERTIFICATE_RECORD.dump_json(self))
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


CERTIFICATE_RECORD = TypeAdapter(Certificate)
"""Reads and writes a certificate as JSON data."""


def no_claim_failed(claims: Sequence[Claim]) -> bool:
    """Whether a certificate with these claims holds."""
    return all(claim.holds is not False for claim in claims)


def function_claim(figures: FunctionFigures, manifest: Manifest) -> Claim:
    """That the files are those of the manifest and compute what the base computes."""
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
    """That the stored weights are inflated as the manifest says."""
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


def curvature_claim(figures: tuple[CurvatureFigures, CurvatureFigures] | None, reason: str) -> Claim:
    """That σ₁ of the loss Hessian grew, and is no smaller than the bound says."""
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
    bounded = True
    if after.bound is not None:
        bounded = after.bound <= after.top.value * (1 + after.top.residual) * (1 + 1e-6)
        parts.append(f"the bound from the inflated weights alone is {after.bound:.3g}")
    parts.append(f"gradient descent may take steps of η < {after.largest_stable_rate:.2g} (2/σ₁)")
    if after.observed is not None:
        parts.append(f"and was seen to diverge from η = {after.observed.divergent:.2g} on")
    holds = after.top.value > before.top.value and bounded
    return Claim(
        "curvature",
        holds,
        f"On a small batch of text, {'; '.join(parts)}. Criterion: it grew, and the bound is below it.",
    )


def certificate_section(certificate: Certificate) -> str:
    """The certificate as a section of the model card, in Markdown."""
    lines = [
        "### Certificate",
        "",
        f"Measured with specdef-cli {certificate.specdef_version} on {certificate.provenance.date[:10]}, on these very "
        "files: `certificate.json` has their hashes, and `specdef verify-certificate` compares them.",
        "",
    ]
    words = {True: "holds", False: "**fails**", None: "not measured"}
    lines += [f"- {claim.name}: {words[claim.holds]}. {claim.sentence}" for claim in certificate.claims]
    if certificate.deployment:
        lines += ["", "What users may do to the weights, against the same done to the base:", ""]
        lines += ["| format | tool | base | hardened | |", "|---|---|---|---|---|"]
        lines += [
            f"| {figure.format} | {figure.tool} | {_number(figure.base)} | {_number(figure.hardened)} "
            f"| {figure.verdict} |"
            for figure in certificate.deployment
        ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
