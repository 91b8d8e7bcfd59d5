"""Base and hardened checkpoint in the formats that others publish and serve them in, by the tools that make these.

What a format costs the hardened checkpoint is compared with what it costs the base. To add a format, add a row to
:data:`FORMATS`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from specdef_cli.certify import tools
from specdef_cli.certify.tools import NotApplicableError, Trial, mean_loss
from specdef_cli.errors import SpecDefError, WrongUsage, first_line
from specdef_cli.model.inputs import compared_output, fixed_inputs, run_alike
from specdef_cli.model.loading import new_objects_only
from specdef_cli.model.opened import OpenedModel
from specdef_cli.model.skeleton import is_causal_lm

Measure = Literal["loss", "relative error"]
Status = Literal["kept", "degraded", "broken", "refused", "skipped"]
Change = Callable[[Any, Trial], Any]

LIMITS: dict[Measure, tuple[float, float]] = {
    # A perplexity 1 % higher is less than 4-bit quantization itself costs; the paper calls a doubled one diverged.
    "loss": (math.log(1.01), math.log(2)),
    # Two runs that round differently in bfloat16 part by about 1e-2.
    "relative error": (0.05, 0.5),
}
"""Largest difference from the base's figure, in either direction, that is kept, and that is not yet broken."""

ALL, NONE = "all", "none"
"""What stands for every format, and for no format."""


@dataclass(frozen=True)
class Format:
    """One thing that others do to a checkpoint.

    Attributes:
        description: A few words for a table, without the tool's name.
        tool: A key of :data:`specdef_cli.certify.tools.PACKAGES` or ``PROGRAMS``.
        dtype: What to load the weights as; ``None`` for the dtype that they are stored in.
        loading: More arguments of ``from_pretrained``.
        change: What is done to the loaded model.
        reference: What is done to the float32 base for the outputs that relative errors are measured against.
        score: Measures the trial in place of a forward pass; returns the value and a note.
    """

    description: str
    tool: str = "transformers"
    dtype: torch.dtype | None = torch.float32
    loading: Callable[[], dict[str, Any]] = dict
    change: Change | None = None
    reference: Change | None = None
    score: Callable[[Trial], tuple[float, str]] | None = None


@dataclass(frozen=True)
class Outcome:
    """How one checkpoint fares in one format.

    Attributes:
        kind: ``refused`` where the tool raised an error; ``skipped`` where the tool is not installed, or the format
            means nothing for the model.
        value: ``None`` where it is not finite or was not measured.
    """

    kind: Literal["measured", "refused", "skipped"]
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class FormatFigure:
    """How base and hardened checkpoint fare in one format."""

    format: str
    """A key of :data:`FORMATS`."""
    tool: str
    """Who makes the format."""
    measure: Measure
    """``loss`` is the mean next-token cross-entropy in nats; ``relative error`` is ‖y − y₀‖/‖y₀‖, y₀ the base's float32
    outputs on a fixed batch."""
    base: float | None
    hardened: float | None
    """Its measure in this format, as the base's; ``None`` where it is not finite or was not measured."""
    status: Status
    """The hardened figure against the base's, by :data:`LIMITS`; refused where the tool stopped with an error."""
    note: str = ""
    """Why it was skipped or refused."""

    @property
    def verdict(self) -> str:
        """The status in words: what breaks without an error breaks silently."""
        return "broken, silently" if self.status == "broken" else self.status


def _compiled(model: Any, _: Trial) -> Any:
    if model.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise NotApplicableError("torch.compile needs a C++ compiler")
    return torch.compile(model)


def _llama_cpp(kind: str) -> Format:
    return Format(kind, "llama.cpp", score=lambda trial: (tools.gguf_loss(trial, kind), ""))


_torchao = partial(Format, tool="torchao")

FORMATS: Mapping[str, Format] = {
    "float32": Format("float32"),
    "bfloat16": Format("bfloat16", dtype=torch.bfloat16),
    "float16": Format("float16", dtype=torch.float16),
    "compile": Format("torch.compile", dtype=None, change=_compiled),
    "llm-int8": Format("LLM.int8", "bitsandbytes", None, tools.bitsandbytes_8bit),
    "nf4": Format("NF4", "bitsandbytes", None, partial(tools.bitsandbytes_4bit, "nf4")),
    "fp4": Format("FP4", "bitsandbytes", None, partial(tools.bitsandbytes_4bit, "fp4")),
    "nf4-double": Format(
        "NF4, double quantization", "bitsandbytes", None, partial(tools.bitsandbytes_4bit, "nf4", double=True)
    ),
    "torchao-float8": _torchao("float8 weights, a scale a row", change=tools.torchao("Float8WeightOnlyConfig")),
    "torchao-int8": _torchao("int8 weights", change=tools.torchao("Int8WeightOnlyConfig")),
    "torchao-int4": _torchao(
        "int4 weights, groups of 64",
        change=tools.torchao("IntxWeightOnlyConfig", weight_dtype="int4", granularity=("PerGroup", 64)),
    ),
    "torchao-int4-packed": _torchao(
        "int4 weights, groups of 64, packed for a GPU", change=tools.torchao("Int4WeightOnlyConfig", group_size=64)
    ),
    **{
        kind.lower() if kind.startswith("Q") else f"gguf-{kind.lower()}": _llama_cpp(kind)
        for kind in ("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_0", "Q4_1", "Q4_K_M")
    },
}
"""Every format by its name."""

DEFAULT_FORMATS = ("float32", "bfloat16", "float16")
"""Those that take seconds, with what is installed anyway."""


def measure_formats(
    base: OpenedModel,
    hardened: OpenedModel,
    tokens: Tensor | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    *,
    device: str | None = None,
    on_figure: Callable[[FormatFigure], None] = lambda _: None,
) -> tuple[FormatFigure, ...]:
    """Measure a base and its hardened checkpoint in formats, one model at a time.

    Args:
        tokens: int64, shape [sequences, length], e.g. from :func:`specdef_cli.certify.tools.token_batch`. With it a
            causal language model is measured by its loss; else by the relative error of its outputs.
        formats: Names of formats; ``("all",)`` for every one.
    """
    names = chosen_formats(formats)
    measured = tokens if is_causal_lm(base.checkpoint.config) else None
    measure: Measure = "relative error" if measured is None else "loss"
    figures = []
    with tempfile.TemporaryDirectory(prefix="specdef-formats-") as scratch, new_objects_only():
        of_base, of_hardened = (
            Trial(model, base, Path(tempfile.mkdtemp(dir=scratch)), measured, device) for model in (base, hardened)
        )
        for name in names:
            row = FORMATS[name]
            before = measure_format(of_base, row)
            # What the base does not survive says nothing of the hardening, so it is not tried.
            after = measure_format(of_hardened, row) if before.value is not None else Outcome("skipped")
            figures.append(compare(name, row.tool, measure, before, after))
            on_figure(figures[-1])
    return tuple(figures)


def chosen_formats(wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Resolve names of formats, ``all`` and ``none``; ``None`` is those that take seconds."""
    if wanted is None:
        return DEFAULT_FORMATS
    for name in wanted:
        if name not in (*FORMATS, ALL, NONE):
            raise WrongUsage(f"unknown format {name!r}", f"Choose from {ALL}, {NONE}, {', '.join(FORMATS)}.")
    if NONE in wanted:
        if set(wanted) != {NONE}:
            raise WrongUsage(f"--formats {NONE} stands beside {', '.join(sorted({*wanted} - {NONE}))}", "Give either.")
        return ()
    return tuple(FORMATS) if ALL in wanted else tuple(dict.fromkeys(wanted))


def measure_format(trial: Trial, wanted: Format) -> Outcome:
    """Measure one checkpoint in one format, by its own tool."""
    if reason := tools.missing(wanted.tool):
        return Outcome("skipped", note=reason)
    try:
        require_room(trial, wanted)
        value, note = wanted.score(trial) if wanted.score is not None else (_by_forward_pass(trial, wanted), "")
    except NotApplicableError as error:
        return Outcome("skipped", note=str(error))
    except SpecDefError as error:  # without the directory: checkpoints that are refused alike read alike
        return Outcome("refused", note=error.problem.removeprefix(f"{trial.directory} cannot be loaded: "))
    except Exception as error:  # whatever the tool raises is its way to refuse
        return Outcome("refused", note=first_line(error))
    return Outcome("measured", value if math.isfinite(value) else None, note)


def require_room(trial: Trial, wanted: Format) -> None:
    """Check that the checkpoint fits into memory, and its converted files on the disk.

    Raises:
        NotApplicableError: It does not.
    """
    needed = sum(
        header.nbytes if wanted.dtype is None else math.prod(header.shape) * wanted.dtype.itemsize
        for header in trial.model.checkpoint.tensors.values()
    )
    available = psutil.virtual_memory().available
    if needed > 0.8 * available:
        raise NotApplicableError(f"loading takes {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free")
    free = shutil.disk_usage(trial.scratch).free
    if wanted.tool in tools.PROGRAMS and 2 * needed > free:
        raise NotApplicableError(f"its files take {2 * needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of disk are free")


def judge(measure: Measure, base: float, hardened: float | None) -> Status:
    """Kept, degraded or broken, by :data:`LIMITS`; ``None`` stands for a figure that is not finite."""
    kept, broken = LIMITS[measure]
    if hardened is None or abs(hardened - base) > broken:
        return "broken"
    return "kept" if abs(hardened - base) <= kept else "degraded"


def compare(name: str, tool: str, measure: Measure, base: Outcome, hardened: Outcome) -> FormatFigure:
    """Compare the outcomes of hardened model and base in one format, on the same tokens."""
    status: Status = "skipped"
    if base.kind == "skipped":
        note = base.note
    elif base.kind == "refused":
        note = f"the base fails: {base.note}"
    elif base.value is None:
        note = "the base itself is not finite in this format"
    else:
        note = hardened.note
        status = judge(measure, base.value, hardened.value) if hardened.kind == "measured" else hardened.kind
    return FormatFigure(name, tool, measure, base.value, hardened.value, status, note)


def _by_forward_pass(trial: Trial, wanted: Format) -> float:
    with trial.loaded(wanted.dtype, **wanted.loading()) as model:
        changed = model if wanted.change is None else wanted.change(model, trial)
        if trial.tokens is not None:
            return mean_loss(changed, trial.tokens)
        found = _outputs(changed, fixed_inputs(model))
    with trial.base.loaded(dtype=torch.float32, device=trial.device) as model:
        changed = model if wanted.reference is None else wanted.reference(model, replace(trial, model=trial.base))
        reference = _outputs(changed, fixed_inputs(model))
    return float(torch.linalg.vector_norm(found - reference) / torch.linalg.vector_norm(reference))


def _outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first output (logits, or the last hidden state) in float64 on the CPU."""
    return compared_output(run_alike(model, inputs)).double().cpu()
