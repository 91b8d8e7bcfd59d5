"""Before publication: does the reloaded result compute what the base computes?

The comparison runs through transformers itself, on the files as they will be published, so that it covers what no
formula does: names, dtypes, the loader. Both models are loaded one after the other, never together.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import Tensor

from specdef_cli.checkpoint.changes import Method
from specdef_cli.checkpoint.files import write_json
from specdef_cli.checkpoint.reader import DTYPES, Checkpoint, carry_over
from specdef_cli.checkpoint.shards import TensorGroup, plan_shards, shard_header
from specdef_cli.errors import ResumableError, SpecDefError, first_line, is_out_of_memory
from specdef_cli.hardening.options import HardenOptions
from specdef_cli.model.described import SHIM_SOURCE, is_shim
from specdef_cli.model.inputs import model_outputs, no_batch, try_out
from specdef_cli.model.loading import new_objects_only, without_progress_bars
from specdef_cli.model.opened import OpenedModel
from specdef_cli.model.skeleton import Skeleton

COMPARE_YOURSELF = "With --no-verify it is written unseen: run it, and compare it with the base, before you publish it."
# Two runs of one model in bfloat16 that round differently part by about 1e-2; a broken layer by more than 1e-1.
LOGITS_TOLERANCE = 0.05
INSTEAD: dict[Method, str] = {
    "fold": "Use --method scale",
    "scale": "Use --method factors",
    "factors": "Use a smaller --alpha",
}

Loader = Callable[..., Any]


@dataclass(frozen=True)
class OutputComparison:
    """How far the hardened model's outputs on a fixed batch are from the base's."""

    max_abs: float
    relative: float
    kl: float
    """Mean KL divergence from base to hardened over positions, in nats (outputs taken as logits)."""
    agreement: float
    equal: bool


def compare_outputs(reference: Tensor, outputs: Tensor) -> OutputComparison:
    """Compare two output tensors, shape [..., classes], in float64."""
    equal = torch.equal(reference, outputs)
    reference, outputs = reference.double(), outputs.double()
    difference = outputs - reference
    kl = torch.nn.functional.kl_div(
        outputs.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
    )
    norm = float(torch.linalg.vector_norm(reference))
    return OutputComparison(
        max_abs=float(difference.abs().max()),
        relative=float(torch.linalg.vector_norm(difference)) / norm if norm else math.inf,
        kl=float(kl.sum(-1).mean()),
        agreement=float((reference.argmax(-1) == outputs.argmax(-1)).double().mean()),
        equal=equal,
    )


def is_loadable_here(nbytes: int) -> bool:
    """Whether that much of memory is free, and some to spare."""
    return nbytes <= 0.8 * psutil.virtual_memory().available


def verify(base: OpenedModel, hardened: Loader, nbytes: int, options: HardenOptions) -> dict[str, Any]:
    """Run the same batch through both models, one after the other: figures for the manifest, or why there are none."""
    if not options.verify:
        return {"skipped": "verification was switched off"}
    nbytes = max(nbytes, base.checkpoint.nbytes)
    if not is_loadable_here(nbytes):
        free = psutil.virtual_memory().available
        return {"skipped": f"loading the model takes {nbytes / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"}
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    with new_objects_only():
        try:
            reference = _outputs(base.load, dtype, options.device)
        except (RuntimeError, IndexError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            raise _base_does_not_run(base.directory, error) from error
        if not torch.isfinite(reference).all():
            raise SpecDefError(
                f"the outputs of {base.directory} hold NaN or infinity before any change",
                "Repair its weights, or --dtype float32.",
            )
        try:
            outputs = _outputs(hardened, dtype, options.device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise SpecDefError(
                f"the hardened model cannot be run: {first_line(error)}",
                "Leave layers out with --exclude; nothing was published.",
            ) from error
        comparison = compare_outputs(reference, outputs)
    method = options.construction.method
    exact, instead = method != "factors", INSTEAD[method]
    if base.trust_remote_code and "auto_map" in base.checkpoint.config:
        instead = "Leave out with --exclude the layers whose outputs the model's code changes"
    if not math.isfinite(comparison.max_abs):
        raise SpecDefError(
            "the hardened model's outputs hold NaN or infinity, and the base's do not",
            f"{instead}, or --dtype float32; nothing was published.",
        )
    if not (comparison.equal if exact else comparison.relative <= LOGITS_TOLERANCE):
        raise SpecDefError(
            f"the hardened model's outputs differ from the base's by {comparison.relative:.2g} (relative)",
            f"{instead}, {'' if exact else 'another --gauge, '}or --dtype float32; nothing was published.",
        )
    figures = asdict(comparison)
    if base.checkpoint.library.is_transformers:
        return figures
    return {name: figures[name] for name in ("max_abs", "relative", "equal")}  # a noise has no classes to agree on


def require_comparable(skeleton: Skeleton) -> None:
    """Refuse, before any work, a model for which no batch can be made up, or that does not run on it."""
    trial, name = skeleton.trial, type(skeleton.model).__name__
    if isinstance(trial.error, ResumableError):
        raise SpecDefError(trial.error.problem, COMPARE_YOURSELF) from trial.error
    if isinstance(trial.error, TypeError):  # of an input that is missing
        raise SpecDefError(
            no_batch(skeleton.model, f"more than {' and '.join(trial.inputs)}").problem, COMPARE_YOURSELF
        )
    if trial.error is not None and trial.certain:
        raise _base_does_not_run(name, trial.error) from trial.error


def _base_does_not_run(name: object, error: Exception) -> SpecDefError:
    return SpecDefError(
        f"{name} cannot be run before any change, on inputs made up from config.json: {first_line(error)}",
        f"Correct config.json if transformers cannot run it either. {COMPARE_YOURSELF}",
    )


def _outputs(load: Loader, dtype: torch.dtype | None, device: str | None) -> Tensor:
    with without_progress_bars():
        model = load(dtype=dtype, device=device).eval()
    outputs = model_outputs(model)
    del model
    gc.collect()
    return outputs


def rehearse(base: OpenedModel, config: Mapping[str, Any], groups: Sequence[TensorGroup]) -> Loader | None:
    """Load what a plan would write on the meta device; with code, run it there if the base runs there.

    Returns:
        What makes the model of its tensors; ``None`` of a library that cannot load a model without its weights.
    """
    if not base.checkpoint.library.is_transformers:
        return None
    with TemporaryDirectory() as place:
        _write_empty(base.checkpoint, config, groups, Path(place))
        try:
            model = base.beside(Path(place)).load_without_weights()
        except SpecDefError as error:
            raise SpecDefError(error.problem.replace(place, "the hardened model"), error.hint) from error
        except OSError as error:
            raise SpecDefError(
                f"the temporary directory {place} cannot be used: {error.strerror or error}",
                "Free some space there, or set TMPDIR.",
            ) from error
    load = partial(type(model).from_pretrained, None, config=copy.deepcopy(model.config))  # a run writes into a config
    # A fold runs as its base does: the same class, and tensors of the same shapes.
    found = None if not is_shim(config) or base.skeleton.trial.error else try_out(model).error
    if found is not None:
        raise SpecDefError(
            f"the hardened model could not be run: {first_line(found)}",
            "Leave layers out (--exclude), or fold instead (--method fold).",
        ) from found
    return load


def _write_empty(
    checkpoint: Checkpoint, config: Mapping[str, Any], groups: Sequence[TensorGroup], directory: Path
) -> None:
    """Write a directory with holes for weights: no byte of them is on disk."""
    write_json(directory / "config.json", config)
    (directory / SHIM_SOURCE.name).write_bytes(SHIM_SOURCE.read_bytes())
    carry_over(
        checkpoint.directory, directory, [file for file in checkpoint.companions.carried if file.suffix == ".py"]
    )
    (shard,) = plan_shards(groups, sum(group.nbytes for group in groups) + 1, checkpoint.library)
    header, _ = shard_header(shard)
    with (directory / shard.name).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + shard.nbytes)
