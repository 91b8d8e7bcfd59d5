"""Base and hardened checkpoint through the same formats; what a format costs the one is compared with the other's cost.

A published model is cast, quantized, compiled and adapted by people who never heard of its hardening. What hardening
does to the weights (large factors on some channels, small ones on others, an extra layer) is invisible in the dtype
that it was verified in, and may be fatal in another.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from specdef_cli.architectures.causal import is_causal_lm
from specdef_cli.certify.deployment.consumers import Score
from specdef_cli.certify.deployment.figure import DeploymentFigure, Measure, Outcome, compare
from specdef_cli.certify.deployment.formats import DEFAULT_FORMATS, FORMATS, Format
from specdef_cli.certify.deployment.quantizers import MissingPackageError
from specdef_cli.certify.deployment.stand_ins import RoundingCache
from specdef_cli.certify.deployment.subject import Change, Subject
from specdef_cli.certify.deployment.tools import PROGRAMS, missing
from specdef_cli.certify.deployment.trial import NotApplicableError, Trial, load, mean_over_batches
from specdef_cli.checkpoint.reader import open_checkpoint
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.runtime.fixed_batch import fixed_inputs
from specdef_cli.runtime.garbage import new_objects_only


def measure_deployment(
    base: Path,
    hardened: Path,
    tokens: Tensor | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_figure: Callable[[DeploymentFigure], None] = lambda _: None,
) -> tuple[DeploymentFigure, ...]:
    """Put a base and its hardened checkpoint through formats, one model at a time.

    Args:
        base, hardened: Checkpoint directories.
        tokens: int64, shape [sequences, length], e.g. from :func:`token_batch`. With it a causal language model is
            measured by its loss; every other model, or without it, by the relative error of its outputs.
        formats: Names of formats.
        device: Where to run; by default the CPU.
        trust_remote_code: Whether code that comes with the directories may run.
        on_figure: Called with each figure as soon as it is measured.

    Raises:
        SpecDefError: A format is unknown, or a directory holds no checkpoint.
    """
    require_formats(formats)
    measured = tokens if is_causal_lm(open_checkpoint(base).config) else None
    measure: Measure = "relative error" if measured is None else "loss"
    figures = []
    with tempfile.TemporaryDirectory(prefix="specdef-formats-") as scratch, new_objects_only():
        trials = []
        for part, directory in (("base", base), ("hardened", hardened)):
            place = Path(scratch) / part
            place.mkdir()
            trials.append(Trial(directory, base, place, measured, device, trust_remote_code))
        for name in formats:
            of_base = measure_format(trials[0], name)
            # What the base does not survive says nothing of the hardening, so it is not tried.
            of_hardened = measure_format(trials[1], name) if of_base.value is not None else Outcome("skipped")
            figures.append(compare(name, FORMATS[name].tool, measure, of_base, of_hardened))
            on_figure(figures[-1])
    return tuple(figures)


def require_formats(formats: Sequence[str]) -> None:
    """Refuse names that no format has.

    Raises:
        SpecDefError: naming the first.
    """
    for name in formats:
        if name not in FORMATS:
            raise SpecDefError(f"there is no deployment format {name!r}", f"Choose from {', '.join(FORMATS)}.")


def measure_format(trial: Trial, name: str) -> Outcome:
    """Put one checkpoint through one format, by its tool where that is installed.

    Args:
        trial: The checkpoint, and what it is measured by.
        name: A key of :data:`~specdef_cli.certify.deployment.formats.FORMATS`.

    Raises:
        SpecDefError: The directory holds no checkpoint.
    """
    wanted, simulated = FORMATS[name], False
    reason = missing(wanted.tool)
    if reason:
        if wanted.stand_in is None:
            return Outcome("skipped", note=reason)
        wanted, simulated = wanted.stand_in, True
    try:
        require_room(trial, wanted)
        value, note = wanted.score(trial) if wanted.score is not None else _by_forward_pass(trial, wanted)
    except (NotApplicableError, MissingPackageError) as error:
        return Outcome("skipped", note=str(error), simulated=simulated)
    except Exception as error:  # whatever the tool raises is its way to refuse
        return Outcome("refused", note=_refusal(error, trial.directory), simulated=simulated)
    return Outcome("measured", value if math.isfinite(value) else None, simulated, note)


def require_room(trial: Trial, wanted: Format) -> None:
    """Check that the checkpoint fits into memory, and on the disk where a program of its own converts it.

    Raises:
        NotApplicableError: It does not.
    """
    needed = sum(
        header.nbytes if wanted.dtype is None else math.prod(header.shape) * wanted.dtype.itemsize
        for header in open_checkpoint(trial.directory).tensors.values()
    )
    available = psutil.virtual_memory().available
    if needed > 0.8 * available:
        raise NotApplicableError(f"loading takes {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free")
    free = shutil.disk_usage(trial.scratch).free
    if wanted.tool in PROGRAMS and 2 * needed > free:
        raise NotApplicableError(f"its files take {2 * needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of disk are free")


def _refusal(error: Exception, directory: Path) -> str:
    """A tool's message in one line, without the directory: checkpoints that are refused alike read alike."""
    if isinstance(error, SpecDefError):
        return error.problem.removeprefix(f"{directory} cannot be loaded: ")
    return first_line(error)


def _by_forward_pass(trial: Trial, wanted: Format) -> Score:
    if wanted.round_states is not None and trial.tokens is None:
        raise NotApplicableError("only the key/value cache of a causal language model is measured")
    with trial.loaded(wanted.dtype, **wanted.loading()) as model:
        changed = wanted.change(Subject(trial.directory, model))
        if trial.tokens is not None:

            def logits(batch: Tensor) -> Tensor:
                return _outputs(changed, {"input_ids": batch.to(model.device)}, wanted)

            return Score(mean_over_batches(trial.tokens, model.config, logits), changed.note)
        found = _outputs(changed, fixed_inputs(model), wanted)
    return Score(_relative_error(found, _reference(trial, wanted.reference)), changed.note)


def _reference(trial: Trial, change: Change) -> Tensor:
    """The base's outputs in float32."""
    with load(trial.base, torch.float32, trial.device, trial.trust_remote_code) as model:
        return _outputs(change(Subject(trial.base, model)), fixed_inputs(model), FORMATS["float32"])


def _outputs(subject: Subject, inputs: dict[str, Tensor], wanted: Format) -> Tensor:
    """The first output (logits, or the last hidden state) in float32 on the CPU."""
    if "pixel_values" in inputs:
        dtype = next(
            (parameter.dtype for parameter in subject.model.parameters() if parameter.is_floating_point()),
            torch.float32,
        )
        inputs = inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
    with torch.inference_mode():
        if wanted.round_states is None:
            outputs = subject.model(**inputs)
        else:
            cache = RoundingCache(wanted.round_states, subject.model.config)
            outputs = subject.model(**inputs, past_key_values=cache, use_cache=True)
            if not cache.get_seq_length():
                raise NotApplicableError("the model did not use the key/value cache that it was given")
    first: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
    return first.float().cpu()


def _relative_error(outputs: Tensor, reference: Tensor) -> float:
    difference = torch.linalg.vector_norm(outputs.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))
