"""What hardening will change and what it will cost, decided from config.json, headers and a sample of the weights."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from specdef_cli.checkpoint.changes import Changed, FactoredLayer, FoldedPair, Method, ScaledModule, ScaledSlice
from specdef_cli.checkpoint.check import require_modules
from specdef_cli.checkpoint.reader import DTYPES, SAFETENSORS_DTYPES, TORCH_DTYPES, Checkpoint
from specdef_cli.checkpoint.shards import TensorGroup, plain_group
from specdef_cli.errors import SpecDefError, dtype_name
from specdef_cli.hardening.card import SCALED_LOADERS, given_up, lost_formats, resistance, serving_advice
from specdef_cli.hardening.expendable import raise_pairs
from specdef_cli.hardening.factors import factor_groups, factor_layers
from specdef_cli.hardening.fold import fold_groups, fold_pairs
from specdef_cli.hardening.options import BY_WEIGHTS, Factors, Fold, HardenOptions
from specdef_cli.hardening.scale import scale_modules, scaled_groups
from specdef_cli.hardening.verify import require_comparable
from specdef_cli.model.body import SymmetricPair
from specdef_cli.model.described import require_code_allows, shim_config
from specdef_cli.model.opened import OpenedModel, require_whole
from specdef_cli.model.sites import LinearSite, linear_sites, scalable_sites
from specdef_cli.model.skeleton import Skeleton, TensorNames
from specdef_cli.model.symmetries import symmetries

RESIDUAL_WRITERS = ("attention_output", "mlp_down")
"""What the paper's construction takes by default."""

NOTHING_TO_HARDEN = "Harden a model that has an embedding, or linear layers below its head."

Member = TypeVar("Member")


@dataclass(frozen=True, kw_only=True)
class Changes(Changed):
    """The changes that a construction makes."""

    folded: tuple[FoldedPair, ...] = ()
    scaled: tuple[ScaledModule, ...] = ()
    factored: tuple[FactoredLayer, ...] = ()
    seed: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def multiplied(self) -> set[str]:
        """Tensors that are multiplied by powers of two."""
        slices = (part for module in self.scaled for part in module.slices)
        return {part.tensor for part in (*self.folded_slices, *slices)}

    @property
    def changed(self) -> set[str]:
        """Tensors of the base whose numbers change."""
        return self.multiplied | {layer.tensor for layer in self.factored}


@dataclass(frozen=True, kw_only=True)
class HardeningPlan(Changes):
    """What will be written.

    Attributes:
        profile: What the fold leaves intact; ``None`` without a fold.
        dtype: The dtype of changed tensors, as torch names it.
        groups: Every output tensor, in the order of the input.
        config: The output's ``config.json``.
        one_sided: Weights that a fold scales by row or by column alone, named likewise. They have no entry that two
            factors hold back, so that training them alone is slowed least.
    """

    method: Method
    profile: str | None
    dtype: str
    groups: tuple[TensorGroup, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    unchanged: tuple[str, ...] = ()
    one_sided: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)


def make_plan(base: OpenedModel, options: HardenOptions) -> HardeningPlan:
    """Decide what to change in a checkpoint."""
    checkpoint, skeleton, wanted = base.checkpoint, base.skeleton, options.construction
    require_modules(checkpoint.directory)
    require_whole(skeleton, checkpoint)
    require_code_allows(skeleton, verify=options.verify, adds_code=not isinstance(wanted, Fold))
    if options.verify:
        require_comparable(skeleton)
    stored = None if options.dtype is None else SAFETENSORS_DTYPES[DTYPES[options.dtype]]
    named = DTYPES.get(options.dtype or "", getattr(skeleton.config, "dtype", None))
    loaded = named if named in DTYPES.values() else None  # as config.json has it, whatever the weights are stored in
    if isinstance(wanted, Fold):
        changes = _folded(base, options, wanted)
    elif isinstance(wanted, Factors):
        chosen = _select(linear_sites(skeleton), lambda site: {site.module, site.tensor}, options)
        layers = factor_layers(checkpoint, skeleton, chosen, wanted, stored, loaded)
        changes = Changes(factored=layers, seed=wanted.seed)
    else:
        changes = _scaled(base, options)
    _require_range(checkpoint, changes.multiplied, stored, loaded)
    if not changes.changed:
        raise SpecDefError(
            "no linear layer is left to harden",
            "Name some with --layers; `specdef inspect MODEL` lists them." if linear_sites(skeleton)
            else "Use --method scale." if scalable_sites(skeleton)
            else NOTHING_TO_HARDEN,
        )  # fmt: skip
    config = dict(checkpoint.config)
    if options.dtype is not None and checkpoint.library.is_transformers:
        config = _with_dtype(config, options.dtype)
    dtypes = {TORCH_DTYPES[stored or checkpoint.tensors[name].dtype] for name in changes.changed}
    one_sided = _one_sided(checkpoint, changes.folded_slices)
    unchanged = _unchanged(skeleton, changes.changed)
    replaced = changes.replaced
    profile = wanted.profile if isinstance(wanted, Fold) else None
    return HardeningPlan(
        **vars(changes),
        method=wanted.method,
        profile=profile,
        dtype=", ".join(sorted(map(dtype_name, dtypes))),
        groups=_groups(checkpoint, changes, stored),
        config=shim_config(config, {layer.module: layer.spec for layer in replaced}) if replaced else config,
        notes=_notes(base, changes, profile or wanted.method, unchanged, one_sided),
        unchanged=unchanged,
        one_sided=one_sided,
    )


def _require_range(
    checkpoint: Checkpoint, multiplied: set[str], stored: str | None, loaded: torch.dtype | None
) -> None:
    """Refuse float16 for what is multiplied by powers of two."""
    headers = (checkpoint.tensors[name] for name in sorted(multiplied))
    narrow = next((header.name for header in headers if (stored or header.dtype) == "F16"), None)
    if narrow is not None:
        raise SpecDefError(
            f"{narrow} would be stored in float16, which overflows beyond 2**15", "Give --dtype bfloat16 or float32."
        )
    if multiplied and loaded is torch.float16:
        raise SpecDefError(
            "config.json has the model loaded in float16, which a fold's powers of two overflow",
            "Give --dtype bfloat16 or float32, which config.json then names.",
        )


def _scaled(base: OpenedModel, options: HardenOptions) -> Changes:
    modules = scalable_sites(base.skeleton)
    if not modules:
        raise SpecDefError(
            f"{base.directory} has no layer to scale: convolutions and heads of classifiers are not scaled",
            NOTHING_TO_HARDEN,
        )
    names: dict[str, set[str]] = {}
    for module in modules:  # a head and the embedding that it shares go together
        names.setdefault(module.tensor, {module.tensor}).add(module.module)
    selected = _select(modules, lambda module: names[module.tensor], options)
    return Changes(scaled=scale_modules(base.checkpoint, base.skeleton, selected))


def _folded(base: OpenedModel, options: HardenOptions, wanted: Fold) -> Changes:
    """Fold the chosen pairs; a model without pairs is refused, with the reason."""
    found = symmetries(base.skeleton)
    pairs: tuple[SymmetricPair, ...] = ()
    if found.pairs:
        pairs = _select(found.pairs, lambda pair: _pair_names(pair, base.skeleton.names), options)
    if wanted.profile in ("quantizable", "gguf"):
        folded = raise_pairs(base, pairs, wanted, options.device)
    else:
        folded = fold_pairs(base.checkpoint, pairs, wanted.profile)
    reasons = found.unpaired
    if pairs and not folded:
        raise SpecDefError(
            f"--profile {wanted.profile} can raise no channel of {len(pairs)} symmetric pairs",
            "Use another --profile or --method scale, or other --layers and --exclude.",
        )
    if not folded:
        why = "".join(f"; {reason}" for reason in reasons[:1])
        others = ", or other --layers and --exclude" if found.pairs else ""
        raise SpecDefError(
            f"{base.directory} has no symmetric pair to fold{why}",
            f"Use --method scale{others}." if found.pairs or scalable_sites(base.skeleton) else NOTHING_TO_HARDEN,
        )
    if wanted.calibration == BY_WEIGHTS:
        reasons = ("The weights alone chose the channels: quantized or in float16, that may cost nats.", *reasons)
    return Changes(folded=folded, reasons=reasons)


def _select(
    members: Sequence[Member], names: Callable[[Member], set[str]], options: HardenOptions
) -> tuple[Member, ...]:
    """The members that ``--layers`` names (without it the method's own) and ``--exclude`` does not.

    A glob that names nothing which the method could change is misspelt, and refused.
    """
    what = "tensor of a symmetric pair" if isinstance(options.construction, Fold) else "linear layer"
    known: set[str] = set().union(*map(names, members))
    for glob in (*options.layers, *options.exclude):
        if not fnmatch.filter(known, glob):
            raise SpecDefError(
                f"{glob!r} matches no {what}", "`specdef inspect MODEL` lists the layers that can be named."
            )

    def named(member: Member, globs: Sequence[str]) -> bool:
        return any(fnmatch.filter(names(member), glob) for glob in globs)

    def taken(member: Member) -> bool:
        if options.layers:
            return named(member, options.layers)
        return not isinstance(member, LinearSite) or member.role in RESIDUAL_WRITERS

    return tuple(member for member in members if taken(member) and not named(member, options.exclude))


def _pair_names(pair: SymmetricPair, names: TensorNames) -> set[str]:
    """Names for the tensors of a pair: as on disk or as in the model, with or without ``.weight``."""
    found = {name for side in pair.sides for name in (side.tensor, names.parameters[side.tensor])}
    return found | {name.removesuffix(".weight") for name in found}


def _notes(
    base: OpenedModel, changes: Changes, way: str, unchanged: Sequence[str], one_sided: Sequence[str]
) -> tuple[str, ...]:
    """Notes for the user on what was decided, and why.

    Args:
        way: The profile of a fold, or another method.
    """
    checkpoint, strangers = base.checkpoint, base.skeleton.strangers
    notes = [serving_advice(lost_formats(changes.folded, way, with_code=bool(changes.replaced)))]
    notes += filter(None, [given_up(changes.folded, way), resistance(changes.folded, way)])
    if changes.scaled and checkpoint.library.is_transformers:
        notes.append(SCALED_LOADERS)
    notes += changes.reasons
    if unchanged and not changes.factored:
        notes.append(f"Not hardened: {', '.join(unchanged)}. Training only these is as fast as before.")
    if one_sided:
        notes.append(f"Scaled on one side only: {', '.join(one_sided)}. Training only these is slowed least.")
    if strangers:
        told = "Not part of the model that config.json describes, so copied unchanged and not hardened"
        notes.append(f"{told}: {len(strangers)} tensors, for example {strangers[0]}.")
    left_out = checkpoint.companions.note()
    return (*notes, left_out) if left_out else tuple(notes)


def within_block(name: str) -> str:
    """A tensor's or module's name without the path to its block, so that all blocks count as one.

    >>> within_block("model.layers.11.mlp.down_proj.weight")
    'mlp.down_proj'
    """
    return re.sub(r"^.*\.\d+\.", "", name).removesuffix(".weight")


def _one_sided(checkpoint: Checkpoint, folded: Sequence[ScaledSlice]) -> tuple[str, ...]:
    axes: dict[str, set[int]] = {}
    for part in folded:
        axes.setdefault(part.tensor, set()).add(part.axis)
    matrices = (name for name, header in checkpoint.tensors.items() if len(header.shape) > 1)
    return tuple(dict.fromkeys(within_block(name) for name in matrices if len(axes.get(name, ())) == 1))


def _unchanged(skeleton: Skeleton, changed: set[str]) -> tuple[str, ...]:
    """The parameters that the plan does not change, the same name once for all blocks."""
    left = dict.fromkeys(
        within_block(tensor)
        for tensor, parameter in skeleton.names.parameters.items()
        if parameter in skeleton.parameters and tensor not in changed
    )
    return tuple(name for name in left if name.removesuffix(".bias") == name or name.removesuffix(".bias") not in left)


def _groups(checkpoint: Checkpoint, changes: Changes, stored: str | None) -> tuple[TensorGroup, ...]:
    """The output, in the order of the input."""
    replaced = fold_groups(changes.folded, checkpoint, stored) | scaled_groups(changes.scaled, checkpoint, stored)
    replaced |= factor_groups(changes.factored, checkpoint, stored, changes.seed)
    absorbed = {name for layer in changes.replaced for name in (*layer.original, *layer.stored)}
    return tuple(
        replaced[name] if name in replaced else plain_group(header, stored)
        for name, header in checkpoint.tensors.items()
        if name in replaced or name not in absorbed
    )


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Set the dtype in ``config.json``, and in its text and vision parts if they name one."""

    def renamed(part: Any) -> Any:
        return {key: value for key, value in part.items() if key != "torch_dtype"} | {"dtype": dtype}

    def names_one(part: Any) -> bool:
        return isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part)

    parts = {key: renamed(part) if names_one(part) else part for key, part in config.items()}
    return dict(renamed(parts))
