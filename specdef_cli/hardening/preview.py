"""``specdef harden --dry-run``: everything is computed, nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from specdef_cli.architectures.linears import LinearSite
from specdef_cli.checkpoint.arriving import DownloadHook
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.stream import Progress
from specdef_cli.hardening.devices import compute_devices
from specdef_cli.hardening.options import HardenOptions
from specdef_cli.hardening.outlook import PlanSummary, summarize
from specdef_cli.hardening.plan import HardeningPlan
from specdef_cli.hardening.run import open_model
from specdef_cli.runtime.processes import process_state


@dataclass(frozen=True)
class LayerPreview:
    """A layer of a plan: its σ₁ before and after."""

    site: LinearSite
    alpha: float
    sigma_before: float
    sigma_after: float


@dataclass(frozen=True)
class PlanPreview:
    """What :func:`harden` would do.

    Attributes:
        plan: The plan.
        summary: The same in a few figures.
        layers: σ₁ of each layer to be replaced.
        bytes_before, bytes_after: Size of all tensors.
        parameters_before: Number of parameters.
    """

    plan: HardeningPlan
    summary: PlanSummary
    layers: tuple[LayerPreview, ...]
    parameters_before: int
    bytes_before: int
    bytes_after: int


def preview(
    options: HardenOptions,
    on_plan: Callable[[HardeningPlan], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_download: DownloadHook | None = None,
) -> PlanPreview:
    """Compute all that :func:`harden` would change, and write nothing.

    Args:
        options: What to do.
        on_plan: Called with the plan before anything is computed.
        on_progress: Called after each group of tensors.
        on_download: As for :func:`harden`.

    Raises:
        SpecDefError: As :func:`harden`, but for the output directory and the comparison with the base.
    """
    with open_model(options, on_download) as (_, checkpoint, plan, _):
        on_plan(plan)
        return _preview(checkpoint, plan, options, on_progress)


def _preview(
    checkpoint: Checkpoint, plan: HardeningPlan, options: HardenOptions, on_progress: Callable[[Progress], None]
) -> PlanPreview:
    device = compute_devices(options.device, process_state(options.device))[0]
    figures: dict[str, Mapping[str, Any]] = {}
    for group in plan.groups:
        if group.transform is not None:
            figures[group.label] = group.transform(checkpoint, device).figures
        on_progress(Progress(group.label, group.nbytes))
    layers = []
    for layer in plan.inserted:
        sigma = figures[layer.site.module]["singular_values"][0]
        layers.append(LayerPreview(layer.site, layer.alpha, sigma, sigma * layer.alpha))
    return PlanPreview(
        plan=plan,
        summary=summarize(plan, checkpoint),
        layers=tuple(layers),
        parameters_before=sum(math.prod(header.shape) for header in checkpoint.tensors.values()),
        bytes_before=checkpoint.nbytes,
        bytes_after=plan.nbytes,
    )
