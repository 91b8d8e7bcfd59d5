"""Should this checkpoint be hardened, how, and what will it cost? Plans of every method, as a few figures each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.lost_formats import lost_formats
from specdef_cli.hardening.options import CONSTRUCTIONS, Construction, HardenOptions
from specdef_cli.hardening.plan import HardeningPlan, make_plan, within_block
from specdef_cli.hardening.verify import require_comparable
from specdef_cli.model.opened import OpenedModel, require_unquantized
from specdef_cli.model.skeleton import Skeleton


@dataclass(frozen=True)
class PlanSummary:
    """A plan in the figures that a publisher asks for.

    Attributes:
        method: ``fold``, ``scale`` or ``factors``.
    """

    method: str
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
        recommended: The first of the methods that can be used; ``None`` where none can.
    """

    methods: tuple[PlanSummary | Obstacle, ...]
    recommended: PlanSummary | None


def outlook(base: OpenedModel) -> Outlook:
    """Plan every method, from headers and a sample of the weights; nothing is computed or written."""
    incomparable = _incomparable(base.skeleton)

    def attempt(construction: Construction) -> PlanSummary | Obstacle:
        options = HardenOptions(str(base.directory), Path(), construction, verify=False)
        try:
            require_unquantized(base.checkpoint)
            if incomparable is not None:
                raise incomparable
            return summarize(make_plan(base, options), base.checkpoint)
        except SpecDefError as error:
            return Obstacle(construction.method, error.problem, error.hint)

    methods = tuple(attempt(kind()) for kind in CONSTRUCTIONS.values())
    return Outlook(methods, next((found for found in methods if isinstance(found, PlanSummary)), None))


def _incomparable(skeleton: Skeleton) -> SpecDefError | None:
    """Why outputs could not be compared, if so; asked once for all methods, as it runs the model on the meta device."""
    try:
        require_comparable(skeleton)
    except SpecDefError as error:
        return error
    return None


def summarize(plan: HardeningPlan, checkpoint: Checkpoint) -> PlanSummary:
    """The figures of a plan."""
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
        lost=lost_formats(plan.folded, plan.profile, with_code=bool(plan.layers)),
        notes=plan.notes,
    )
