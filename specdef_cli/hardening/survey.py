"""``specdef inspect``: the linear layers of a checkpoint, their spectra, and whether they are hardened."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from specdef_cli.checkpoint.files import FLOATING_DTYPES, TensorHeader
from specdef_cli.checkpoint.manifest import Manifest
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.resolve import Resolved
from specdef_cli.checkpoint.stream import Progress
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.card import is_weak, lost_formats
from specdef_cli.hardening.execute import compute_devices
from specdef_cli.hardening.factors import read_weight
from specdef_cli.hardening.options import CONSTRUCTIONS, Construction, HardenOptions
from specdef_cli.hardening.plan import RESIDUAL_WRITERS, HardeningPlan, make_plan, within_block
from specdef_cli.hardening.recognise import Recognised, recognise
from specdef_cli.model.described import replaced_stems
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import OpenedModel, open_model, require_unquantized
from specdef_cli.model.sites import LinearSite, linear_sites
from specdef_cli.option import Source
from specdef_cli.spectral.subspace import effective_rank, layer_seed, top_subspace


@dataclass(frozen=True)
class LayerSurvey(LinearSite):
    """One linear layer.

    Attributes:
        sigma: σ₁ of the weight as stored (of the inflated factor, if hardened); ``None`` for a quantized weight, and
            where no spectra were asked for.
        effective_rank: (Σσ²)²/Σσ⁴, estimated; ``None`` likewise.
        alpha: α if the layer is stored as factors, else ``None``.
        default: Whether ``harden --method factors`` takes it without ``--layers``.
    """

    dtype: str
    sigma: float | None
    effective_rank: float | None
    alpha: float | None
    default: bool


@dataclass(frozen=True)
class Survey:
    """What :func:`survey` found.

    Attributes:
        outlook: What hardening would do; ``None`` if it is hardened.
        recognised: What the weights show of hardening.
    """

    model: Resolved
    architecture: str
    parameters: int
    nbytes: int
    manifest: Manifest | None
    layers: tuple[LayerSurvey, ...]
    outlook: Outlook | None
    recognised: Recognised


def survey(
    model: str | Path | Source,
    *,
    device: str | None = None,
    spectra: bool = True,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Survey:
    """Look at every linear layer of a checkpoint, one tensor in memory at a time, and at what hardening would do.

    Args:
        device: Where spectra are computed.
        spectra: Whether every layer is read, for its σ₁ and effective rank. Without them headers and a sample are read.
        on_progress: Called after each layer.
    """
    with process_state(device).main_process_first():
        opened = open_model(model)
    checkpoint, described, skeleton = opened.checkpoint, opened.manifest, opened.skeleton
    if "quantization_config" not in opened.original.config:  # packed weights have shapes of their own
        skeleton.require_complete()
    factored = {layer.tensor: layer for layer in described.factored} if described else {}
    # With a manifest or without one, the names on disk say which layers are replaced.
    factors = {f"{stem}.weight": f"{stem}.inflated.weight" for stem in replaced_stems(checkpoint.tensors)}
    place = compute_devices(device, process_state(device))[0]
    layers = []
    for site in linear_sites(skeleton):
        stored = checkpoint.tensors[factors.get(site.tensor, site.tensor)]
        sigma = rank = None
        if spectra and stored.dtype in FLOATING_DTYPES:
            sigma, rank = _spectrum(checkpoint, site, stored, place)
        on_progress(Progress(site.module, stored.nbytes))
        layers.append(
            LayerSurvey(
                **vars(site),
                dtype=stored.dtype,
                sigma=sigma,
                effective_rank=rank,
                alpha=factored[site.tensor].alpha if site.tensor in factored else None,
                default=site.role in RESIDUAL_WRITERS,
            )
        )
    return Survey(
        model=opened.found,
        architecture=type(skeleton.model).__name__,
        parameters=sum(torch.Size(header.shape).numel() for header in checkpoint.tensors.values()),
        nbytes=checkpoint.nbytes,
        manifest=described,
        layers=tuple(layers),
        outlook=None if described or factors else outlook(opened),
        recognised=recognise(checkpoint, skeleton),
    )


def _spectrum(
    checkpoint: Checkpoint, site: LinearSite, stored: TensorHeader, place: torch.device
) -> tuple[float, float]:
    """σ₁ and the effective rank of a layer's weight, or of the inflated factor that stands in its place."""
    seed = layer_seed(0, site.tensor)
    own = stored.name == site.tensor
    weight = read_weight(checkpoint, site, place) if own else checkpoint.read(stored.name).to(place)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return float(top_subspace(weight, 1, seed).singular_values[0]), effective_rank(weight, seed)


@dataclass(frozen=True)
class PlanSummary:
    """A plan in the figures that a publisher asks for."""

    method: str
    weak: bool  # whether it is a fold that leaves out the norms inside the blocks
    pairs: int
    layers: int
    modules: int
    changed: Mapping[str, int]
    parameters: int
    parameters_changed: int
    parameters_added: int
    left: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    lost: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Obstacle:
    """Why a method cannot be used, and what to do about it."""

    method: str
    problem: str
    hint: str


@dataclass(frozen=True)
class Outlook:
    """What hardening would do to a checkpoint.

    Attributes:
        recommended: The first of the methods that can be used, but scale before a weak fold; ``None`` where none can.
    """

    methods: tuple[PlanSummary | Obstacle, ...]
    recommended: PlanSummary | None


def outlook(base: OpenedModel) -> Outlook:
    """Plan every method, from headers and a sample of the weights; nothing is computed or written."""

    def attempt(construction: Construction) -> PlanSummary | Obstacle:
        try:
            require_unquantized(base.checkpoint)
            plan = make_plan(base, HardenOptions(str(base.directory), Path(), construction))
        except SpecDefError as error:
            return Obstacle(construction.method, error.problem, error.hint)
        return summarize(plan, base.checkpoint)

    methods = tuple(attempt(kind()) for kind in CONSTRUCTIONS.values())
    usable = {found.method: found for found in methods if isinstance(found, PlanSummary)}
    first = next(iter(usable.values()), None)
    return Outlook(methods, usable.get("scale", first) if first is not None and first.weak else first)


def summarize(plan: HardeningPlan, checkpoint: Checkpoint) -> PlanSummary:
    changed: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for group in plan.groups:
        name = within_block(group.label)
        if group.changes:
            changed[name] += 1
        else:
            left[name] += sum(math.prod(spec.shape) for spec in group.outputs)
    parameters = sum(math.prod(header.shape) for header in checkpoint.tensors.values())
    return PlanSummary(
        method=plan.method,
        weak=is_weak(plan.folded),
        pairs=len(plan.folded),
        layers=len(plan.factored),
        modules=len(plan.scaled),
        changed=dict(changed),
        parameters=parameters,
        parameters_changed=parameters - left.total(),
        parameters_added=plan.parameters_added,
        left=dict(left.most_common()),
        bytes_before=checkpoint.nbytes,
        bytes_after=plan.nbytes,
        lost=lost_formats(plan.folded, plan.profile, with_code=bool(plan.replaced)),
        notes=plan.notes,
    )
