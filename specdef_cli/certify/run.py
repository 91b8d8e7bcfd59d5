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
from specdef_cli.attack.target import task_of
from specdef_cli.certify.card import Resistance, attack_section, read_resistance, with_section
from specdef_cli.certify.certificate import (
    FORMAT_VERSION,
    Certificate,
    certificate_section,
    curvature_claim,
    function_claim,
    no_claim_failed,
    provenance,
    spectrum_claim,
)
from specdef_cli.certify.curvature import CurvatureFigures, measure_curvature
from specdef_cli.certify.formats import chosen_formats, measure_formats
from specdef_cli.certify.function import measure_function
from specdef_cli.certify.options import CERTIFICATE_NAME, CertifyOptions
from specdef_cli.certify.spectrum import measure_spectrum
from specdef_cli.checkpoint.check import require_outside, writable_ancestor
from specdef_cli.checkpoint.durable import takes_files, write_durably
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.devices import compute_devices
from specdef_cli.model.inputs import require_in_vocabulary, token_batch
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import OpenedModel, checkpoint_fingerprint, open_base, open_model, require_sound
from specdef_cli.model.skeleton import is_causal_lm
from specdef_cli.report.document import require_report

SEQUENCES, LENGTH = 32, 128
FORMAT_SEQUENCES = 16
CURVATURE_SEQUENCES, CURVATURE_LENGTH = 1, 32


@dataclass(frozen=True)
class _Opened:
    """Everything that the options name, opened before anything is measured.

    Attributes:
        text, tokens: What loss is measured on; ``None`` for other models than causal language models.
        report: The file of the attack report, and ``resistance`` what it says.
    """

    hardened: OpenedModel
    base: OpenedModel
    text: str | None
    tokens: Tensor | None
    formats: tuple[str, ...]
    report: Path | None
    resistance: Resistance | None
    carded: bool


def plan_certify(options: CertifyOptions) -> tuple[str, ...]:
    """What :func:`certify` would measure, after everything given was opened."""
    opened = _open(options)
    attacks = () if opened.resistance is None else ("attacks, from their report",)
    curvature = ("curvature",) if options.curvature and opened.tokens is not None else ()
    return "function", "spectrum", *curvature, *(f"format {name}" for name in opened.formats), *attacks


def certify(options: CertifyOptions, on_progress: Callable[[str], None] = lambda _: None) -> Certificate:
    """Measure a hardened checkpoint against its base.

    Args:
        options: What to measure.
        on_progress: Called with a few words as each part begins.
    """
    opened = _open(options)
    base, hardened = opened.base, opened.hardened
    curvature = _Curvatures(options, opened.tokens, on_progress)
    on_progress("function")
    function = measure_function(base, hardened, opened.tokens, on_model=curvature.measure)
    on_progress("spectrum")
    spectrum = measure_spectrum(base.checkpoint, hardened.checkpoint, hardened.hardening)
    formats = measure_formats(
        base, hardened, None if opened.tokens is None else opened.tokens[:FORMAT_SEQUENCES], opened.formats,
        device=options.device,
        on_figure=lambda figure: on_progress(f"format {figure.format}: {figure.verdict}"),
    )  # fmt: skip
    claims = (
        function_claim(function, hardened.hardening),
        spectrum_claim(spectrum),
        curvature_claim(curvature.both, curvature.reason or "the outputs are not finite"),
    )
    certificate = Certificate(
        format=FORMAT_VERSION,
        holds=no_claim_failed(claims),
        specdef_version=__version__,
        model=hardened.found.public_name,
        base=base.found.public_name,
        provenance=provenance(hardened, base, device=options.device, text=opened.text, attack_report=opened.report),
        claims=claims,
        function=function,
        spectrum=spectrum,
        curvature=curvature.both,
        deployment=formats,
        resistance=opened.resistance,
    ).sealed()
    _write(certificate, options.out, hardened.directory if opened.carded else None)
    return certificate


def _open(options: CertifyOptions) -> _Opened:
    hardened, base = _models(options)
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
    resistance = (
        None
        if report is None
        else read_resistance(report, checkpoint_fingerprint(hardened.directory, hardened.manifest))
    )
    text = _text(options) if is_causal_lm(base.checkpoint.config) else None
    tokens = None if text is None else _tokens(base, text)
    return _Opened(hardened, base, text, tokens, formats, report, resistance, carded)


def _models(options: CertifyOptions) -> tuple[OpenedModel, OpenedModel]:
    """The hardened model, and its base as named or as the manifest names it."""
    hardened = open_model(
        options.model,
        hardened=True,
        manifest=options.manifest,
        revision=options.revision,
        token=options.token,
        trust_remote_code=options.trust_remote_code,
    )
    return hardened, open_base(hardened, options.base, "--base", token=options.token)


def _tokens(base: OpenedModel, text: str) -> Tensor:
    tokens = token_batch(
        base.directory, text, sequences=SEQUENCES, length=LENGTH, trust_remote_code=base.trust_remote_code
    )
    require_in_vocabulary(tokens, base.skeleton.config, base.directory)
    return tokens


def _text(options: CertifyOptions) -> str:
    if options.text is None:
        return "\n".join(standard_library())
    try:
        return options.text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SpecDefError(f"{options.text} cannot be read: {error.strerror}", "Give a text file.") from error


def attack_command(options: CertifyOptions) -> str:
    """The command that makes the report which ``--attacks`` takes."""
    _, base = _models(options)
    command = f"specdef attack {options.model} --control {options.base or base.directory}"
    try:
        task, _ = task_of(base.checkpoint.config, base.directory, None)
    except SpecDefError:
        return f"{command} --task …"
    return f"{command} --dataset …" if "classification" in task else command


class _Curvatures:
    """The curvature of the base and of the hardened model, measured while each is loaded."""

    def __init__(self, options: CertifyOptions, tokens: Tensor | None, on_progress: Callable[[str], None]) -> None:
        self._device = options.device
        self._tokens = tokens
        self._on_progress = on_progress
        self._found: list[CurvatureFigures] = []
        self.reason = "" if options.curvature else "it was left out"
        if options.curvature and tokens is None:
            self.reason = "only causal language models are measured on text"

    def measure(self, model: PreTrainedModel) -> None:
        """Measure one model, the base first."""
        if self.reason or self._tokens is None:
            return
        measured = f"curvature of the {'hardened model' if self._found else 'base'}"
        self._on_progress(measured)
        batch = self._tokens[:CURVATURE_SEQUENCES, :CURVATURE_LENGTH]
        found = measure_curvature(
            model, batch, device=self._device, on_block=lambda block: self._on_progress(f"{measured}: {block}")
        )
        if isinstance(found, str):
            self.reason = found
        else:
            self._found.append(found)

    @property
    def both(self) -> tuple[CurvatureFigures, CurvatureFigures] | None:
        """Of the base and of the hardened model; ``None`` where one of them was not measured."""
        return (self._found[0], self._found[1]) if len(self._found) == 2 else None


def _write(certificate: Certificate, out: Path, directory: Path | None) -> None:
    """Write the certificate, and where a directory is given into that and its card too."""
    out.mkdir(parents=True, exist_ok=True)
    text = certificate.to_json()
    write_durably(out / CERTIFICATE_NAME, text)
    if directory is None:
        return
    write_durably(directory / CERTIFICATE_NAME, text)
    card = directory / "README.md"
    if card.is_file():
        words = with_section(card.read_text(encoding="utf-8", errors="replace"), certificate_section(certificate))
        if certificate.resistance is not None:
            words = with_section(words, attack_section(certificate.resistance))
        write_durably(card, words)
