"""``specdef certify``: measure, judge, write the certificate and its section of the model card."""

from __future__ import annotations

from specdef_cli.extras import require_extra

require_extra("attack", "certificates")

# ruff: noqa: E402 (what is imported below needs the extra)
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli.architectures.causal import is_causal_lm
from specdef_cli.attack.forecast import Forecast
from specdef_cli.attack.options import AttackOptions
from specdef_cli.attack.recorder import ProgressEvent
from specdef_cli.attack.retained import standard_library
from specdef_cli.attack.run import attack, plan_attack
from specdef_cli.attack.spec import checkpoint_fingerprint
from specdef_cli.attack.suite import load_suite
from specdef_cli.attack.tasks import task_of
from specdef_cli.certify.attack_section import attack_section, with_section
from specdef_cli.certify.certificate import (
    FORMAT_VERSION,
    Certificate,
    certificate_section,
    curvature_claim,
    function_claim,
    no_claim_failed,
    spectrum_claim,
)
from specdef_cli.certify.curvature_change import CurvatureFigures, measure_curvature
from specdef_cli.certify.deployment import (
    DEFAULT_FORMATS,
    DeploymentFigure,
    measure_deployment,
    require_formats,
    token_batch,
)
from specdef_cli.certify.function import measure_function
from specdef_cli.certify.options import CertifyOptions
from specdef_cli.certify.presence import CERTIFICATE_NAME
from specdef_cli.certify.provenance import provenance
from specdef_cli.certify.resistance import Resistance, read_resistance, resistance_of
from specdef_cli.certify.spectrum import measure_spectrum
from specdef_cli.certify.statement import STATEMENT_NAME, in_toto_statement
from specdef_cli.checkpoint.destination import require_outside, writable_ancestor
from specdef_cli.checkpoint.durable import write_durably
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.checkpoint.presence import require_undefended
from specdef_cli.checkpoint.reader import Checkpoint, open_checkpoint
from specdef_cli.checkpoint.resolve import Resolved, resolve, resolve_base, resolve_hardened
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.devices import compute_devices
from specdef_cli.hardening.soundness import require_sound
from specdef_cli.report import write_report
from specdef_cli.runtime.processes import process_state
from specdef_cli.runtime.vocabulary import require_in_vocabulary
from specdef_cli.version import __version__

SEQUENCES, LENGTH = 32, 128
CURVATURE_SEQUENCES, CURVATURE_LENGTH = 4, 64


def certify(
    options: CertifyOptions,
    on_progress: Callable[[str], None] = lambda _: None,
    on_attack: Callable[[ProgressEvent], None] = lambda _: None,
) -> Certificate:
    """Measure a hardened checkpoint against its base.

    Args:
        options: What to measure.
        on_progress: Called with a few words as each part begins.
        on_attack: Progress of the quick suite.

    Raises:
        SpecDefError: A model cannot be read, the base is not known, or an option does not fit.
    """
    formats = DEFAULT_FORMATS if options.formats is None else options.formats
    require_formats(formats)
    hardened_model = _hardened(options)
    directory = hardened_model.directory
    manifest = read_manifest(directory)
    base_model = _base(options)
    base_directory = base_model.directory
    for place in (base_directory, directory):
        require_sound(place, trust_remote_code=options.trust_remote_code)
        require_outside(options.out, place)
    _require_attackable(options, base_directory)
    writable_ancestor(options.out)
    compute_devices(options.device, process_state())  # refused, if at all, before anything is measured
    base, hardened = open_checkpoint(base_directory), open_checkpoint(directory)
    tokens = _tokens(base, options)
    resistance = None
    if options.attacks is not None:  # refused, if at all, before anything is measured
        resistance = read_resistance(options.attacks, checkpoint_fingerprint(directory))

    curvature = _Curvatures(options, tokens, on_progress)
    on_progress("function")
    trust = options.trust_remote_code
    function = measure_function(
        base_directory, directory, manifest, tokens, trust_remote_code=trust, on_model=curvature.measure
    )
    on_progress("spectrum")
    spectrum = measure_spectrum(base, hardened, manifest)
    deployment: tuple[DeploymentFigure, ...] = ()
    if formats:
        deployment = measure_deployment(
            base_directory, directory, tokens, formats, device=options.device, trust_remote_code=trust,
            on_figure=lambda figure: on_progress(f"deployment: {figure.format}"),
        )  # fmt: skip
    if resistance is None:
        on_progress("attacks: the quick suite")
        resistance = _attack(options, base_directory, on_attack)
    claims = (
        function_claim(function, manifest),
        spectrum_claim(spectrum),
        curvature_claim(curvature.both, curvature.reason or "the outputs are not finite"),
    )
    certificate = Certificate(
        format=FORMAT_VERSION,
        holds=no_claim_failed(claims),
        specdef_version=__version__,
        model=hardened_model.public_name,
        base=base_model.public_name,
        provenance=provenance(
            directory,
            base_directory,
            device=options.device,
            text=None if tokens is None else _text(options),
            attack_report=options.attacks or options.out / "attack" / "report.json",
        ),
        claims=claims,
        function=function,
        spectrum=spectrum,
        curvature=curvature.both,
        deployment=deployment,
        resistance=resistance,
    )
    _write(certificate, options, directory)
    return certificate


def _hardened(options: CertifyOptions) -> Resolved:
    return resolve_hardened(options.model, options.manifest, revision=options.revision, token=options.token)


def _base(options: CertifyOptions) -> Resolved:
    """The base: as named, or as the manifest names it."""
    if options.base is not None:
        found = resolve(options.base, token=options.token)
        require_undefended(found.directory, "--base")
        return found
    directory = _hardened(options).directory
    return resolve_base(read_manifest(directory), directory, token=options.token, option="--base")


def _tokens(base: Checkpoint, options: CertifyOptions) -> Tensor | None:
    """Text for a causal language model; ``None`` for any other model."""
    if not is_causal_lm(base.config):
        return None
    text = _text(options)
    trust = options.trust_remote_code
    tokens = token_batch(base.directory, text, sequences=SEQUENCES, length=LENGTH, trust_remote_code=trust)
    require_in_vocabulary(tokens, base.directory, trust_remote_code=trust)
    return tokens


def _text(options: CertifyOptions) -> str:
    if options.text is None:
        return "\n".join(standard_library())
    try:
        return options.text.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SpecDefError(f"{options.text} cannot be read: {error.strerror}", "Give a text file.") from error


class _Curvatures:
    """The curvature of the base and of the hardened model, measured while each is loaded.

    Attributes:
        reason: Why they were not measured; empty where nothing is in the way.
    """

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


def _attack(options: CertifyOptions, base: Path, on_attack: Callable[[ProgressEvent], None]) -> Resistance:
    attacks = _attack_options(options, base)
    report = attack(attacks, on_progress=on_attack)
    write_report(report, attacks.out)
    return resistance_of(report)


def _attack_options(options: CertifyOptions, base: Path) -> AttackOptions:
    """The quick suite, on a budget that suits the size of the model."""
    suite = load_suite("quick")
    budget = {key: value for key, value in suite.budget.items() if key != "seeds"}
    return AttackOptions(
        model=options.model,
        out=options.out / "attack",
        manifest=options.manifest,
        control=base,
        suite=suite,
        free=("steps", "batch_size", "sequence_length", "eval_every", "eval_sequences"),
        jobs=options.jobs,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
        token=options.token,
        **budget,  # type: ignore[arg-type]
    )


def plan_certify(options: CertifyOptions) -> Forecast | None:
    """The attacks of a certificate and what they take on this machine; ``None`` where a report of them is given.

    Raises:
        SpecDefError: As :func:`certify`.
    """
    base = _base(options).directory
    _require_attackable(options, base)
    return None if options.attacks is not None else plan_attack(_attack_options(options, base))


def _require_attackable(options: CertifyOptions, base: Path) -> None:
    """Refuse a classifier, or a model of no known task, without a report: only ``specdef attack`` takes what it needs.

    Raises:
        SpecDefError: naming the command that makes the report.
    """
    if options.attacks is not None:
        return
    attacked = f"specdef attack {options.model} --control {base}"
    try:
        task, _ = task_of(base, None)
    except SpecDefError as error:
        if "--task" not in error.hint:
            raise
        hint = f"Run `{attacked} --task …`, then certify with --attacks attack/report.json. {error.hint}"
        raise SpecDefError(error.problem, hint) from error
    if "classification" in task:
        raise SpecDefError(
            f"{options.model} is a classifier, and attacks on it need labelled data",
            f"Run `{attacked} --dataset …`, then certify with --attacks attack/report.json.",
        )


def _write(certificate: Certificate, options: CertifyOptions, directory: Path) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    text = certificate.to_json()
    write_durably(options.out / CERTIFICATE_NAME, text)
    if options.statement:
        write_durably(options.out / STATEMENT_NAME, in_toto_statement(certificate))
    if not options.card or not Path(options.model).expanduser().is_dir():
        return
    write_durably(directory / CERTIFICATE_NAME, text)
    card = directory / "README.md"
    if card.is_file():
        old = card.read_text(encoding="utf-8", errors="replace")
        text = with_section(old, certificate_section(certificate))
        write_durably(card, with_section(text, attack_section(certificate.resistance)))
