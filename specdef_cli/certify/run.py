"""``specdef certify``: measure, judge, write the certificate and its section of the model card."""

from __future__ import annotations

from specdef_cli.errors import require_extra

require_extra("attack", "certificates")

# ruff: noqa: E402 (what is imported below needs the extra)
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli import __version__
from specdef_cli.attack.data.language import standard_library
from specdef_cli.attack.tasks import task_of
from specdef_cli.certify import CERTIFICATE_NAME, CertifyOptions
from specdef_cli.certify.card import Resistance, attack_section, read_resistance, with_section
from specdef_cli.certify.certificate import (
    FORMAT_VERSION,
    Certificate,
    Curvatures,
    certificate_section,
    claims_of,
    no_claim_failed,
    provenance,
)
from specdef_cli.certify.curvature import CurvatureFigures, measure_curvature
from specdef_cli.certify.formats import chosen_formats, measure_formats
from specdef_cli.certify.function import measure_function, measure_spectrum
from specdef_cli.checkpoint.files import takes_files, write_durably
from specdef_cli.checkpoint.output import require_outside, writable_ancestor
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.execute import compute_devices
from specdef_cli.model.inputs import require_in_vocabulary, token_batch
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import OpenedModel, open_base, open_model, require_sound
from specdef_cli.model.skeleton import is_causal_lm
from specdef_cli.report.document import require_report

SEQUENCES, LENGTH = 32, 128
FORMAT_SEQUENCES = 16
CURVATURE_SEQUENCES, CURVATURE_LENGTH = 1, 32


def certify(options: CertifyOptions, on_progress: Callable[[str], None] = lambda _: None) -> Certificate:
    """Measure a hardened checkpoint against its base; ``on_progress`` gets a few words as each part begins."""
    return prepare(options).certify(on_progress)


def prepare(options: CertifyOptions) -> Prepared:
    """Open everything that the options name, before anything is measured."""
    hardened = open_model(options, hardened=True)
    base = open_base(hardened, options.base, "--base", token=options.token, subfolder=options.base_subfolder)
    for model in (base, hardened):
        require_sound(model)
        require_outside(options.out, model.directory)
    formats = chosen_formats(options.formats)
    writable_ancestor(options.out)
    carded = options.card and Path(options.model).expanduser().is_dir()
    if carded and not takes_files(hardened.directory):
        raise SpecDefError(
            f"{hardened.directory} cannot be written to, and the certificate goes into its card", "Pass --no-card."
        )
    compute_devices(options.device, process_state())
    report = None if options.attacks is None else require_report(options.attacks)
    resistance = None if report is None else read_resistance(report, hardened.fingerprint, base.fingerprint)
    text = _text(options) if is_causal_lm(base.checkpoint.config) else None
    tokens = None
    if text is not None:
        tokens = token_batch(base.directory, text, sequences=SEQUENCES, length=LENGTH, tokenizer=base.tokenizer())
        require_in_vocabulary(tokens, base.skeleton.config, base.directory)
    return Prepared(options, hardened, base, text, tokens, formats, report, resistance, carded)


def _text(options: CertifyOptions) -> str:
    if options.text is None:
        return "\n".join(standard_library())
    try:
        return options.text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SpecDefError(f"{options.text} cannot be read: {error.strerror}", "Give a text file.") from error


@dataclass(frozen=True)
class Prepared:
    """A certificate that could be measured.

    Attributes:
        text, tokens: What loss is measured on; ``None`` for other models than causal language models.
        report: The file of the attack report, and ``resistance`` what it says.
        carded: Whether the certificate goes into the hardened directory, too.
    """

    options: CertifyOptions
    hardened: OpenedModel
    base: OpenedModel
    text: str | None
    tokens: Tensor | None
    formats: tuple[str, ...]
    report: Path | None
    resistance: Resistance | None
    carded: bool

    @property
    def parts(self) -> tuple[str, ...]:
        attacks = () if self.resistance is None else ("attacks, from their report",)
        curvature = ("curvature",) if self.options.curvature and self.tokens is not None else ()
        return "function", "spectrum", *curvature, *(f"format {name}" for name in self.formats), *attacks

    @property
    def attack_command(self) -> str:
        """The command that writes the report for ``--attacks``."""
        folder = "" if self.options.subfolder is None else f" --subfolder {self.options.subfolder}"
        command = f"specdef attack {self.options.model}{folder} --control {self.options.base or self.base.directory}"
        try:
            task, _ = task_of(self.base.checkpoint.config, self.base.directory, None)
        except SpecDefError:
            return f"{command} --task …"
        return f"{command} --dataset …" if "classification" in task else command

    def certify(self, on_progress: Callable[[str], None] = lambda _: None) -> Certificate:
        options, base, hardened, tokens = self.options, self.base, self.hardened, self.tokens
        curvatures: list[CurvatureFigures | str] = []

        def curvature(model: PreTrainedModel) -> None:  # the base's comes first
            if tokens is None or not options.curvature or any(isinstance(found, str) for found in curvatures):
                return
            measured = f"curvature of the {'hardened model' if curvatures else 'base'}"
            on_progress(measured)
            batch = tokens[:CURVATURE_SEQUENCES, :CURVATURE_LENGTH]
            curvatures.append(
                measure_curvature(
                    model, batch, device=options.device, on_block=lambda block: on_progress(f"{measured}: {block}")
                )
            )

        on_progress("function")
        function = measure_function(base, hardened, tokens, on_model=curvature)
        on_progress("spectrum")
        spectrum = measure_spectrum(base.checkpoint, hardened.checkpoint, hardened.hardening)
        formats = measure_formats(
            base, hardened, None if tokens is None else tokens[:FORMAT_SEQUENCES], self.formats,
            device=options.device,
            on_figure=lambda figure: on_progress(f"format {figure.format}: {figure.verdict}"),
        )  # fmt: skip
        both, reason = self._both(curvatures)
        claims = claims_of(function, spectrum, both, reason, hardened.hardening)
        certificate = Certificate(
            format=FORMAT_VERSION,
            holds=no_claim_failed(claims),
            specdef_version=__version__,
            model=hardened.found.public_name,
            base=base.found.public_name,
            provenance=provenance(hardened, base, device=options.device, text=self.text, attack_report=self.report),
            claims=claims,
            function=function,
            spectrum=spectrum,
            curvature=both,
            deployment=formats,
            resistance=self.resistance,
        ).sealed()
        self._write(certificate)
        return certificate

    def _both(self, found: list[CurvatureFigures | str]) -> tuple[Curvatures | None, str]:
        """The curvatures of both models, or the reason why there are none."""
        match found:
            case [CurvatureFigures() as base, CurvatureFigures() as hardened]:
                return (base, hardened), ""
            case [*_, str(reason)]:
                return None, reason
        if not self.options.curvature:
            return None, "it was left out"
        if self.tokens is None:
            return None, "only causal language models are measured on text"
        return None, "the outputs are not finite"

    def _write(self, certificate: Certificate) -> None:
        """Write the certificate, also into the hardened directory and its card if wanted."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        text = certificate.to_json()
        write_durably(self.options.out / CERTIFICATE_NAME, text)
        if not self.carded:
            return
        write_durably(self.hardened.directory / CERTIFICATE_NAME, text)
        card = self.hardened.directory / "README.md"
        if card.is_file():
            words = with_section(card.read_text(encoding="utf-8", errors="replace"), certificate_section(certificate))
            if certificate.resistance is not None:
                words = with_section(words, attack_section(certificate.resistance))
            write_durably(card, words)
