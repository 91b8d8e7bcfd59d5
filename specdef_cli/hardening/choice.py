"""Which weights hardening changes: what the options ask for, as far as the checkpoint has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdef_cli.architectures.linears import LinearSite, linear_sites, require_insertable
from specdef_cli.architectures.pairs import Symmetries
from specdef_cli.architectures.scalable import ScalableSite, scalable_sites
from specdef_cli.architectures.skeleton import Skeleton
from specdef_cli.architectures.symmetries import symmetries
from specdef_cli.checkpoint.manifest import FoldedPair, Profile, ScaledModule
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.dtypes import DTYPES
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.fold import FOLDED_KINDS, fold_pairs
from specdef_cli.hardening.options import HardenOptions
from specdef_cli.hardening.scale import scale_modules
from specdef_cli.hardening.selection import (
    require_named,
    scaled_instead,
    select_layers,
    select_pairs,
    select_scalable,
)

DEFAULT_ALPHA = 1e4


@dataclass(frozen=True)
class Choice:
    """What is changed, and why not more.

    Attributes:
        profile: Of the fold.
        folded, scaled: As in the plan.
        sites: Linears that become two factors.
        left: What is or, with ``--allow-code``, would be scaled.
        reasons: Why no more symmetric pairs are folded, in sentences.
    """

    profile: Profile
    folded: tuple[FoldedPair, ...]
    sites: tuple[LinearSite, ...]
    scaled: tuple[ScaledModule, ...]
    left: tuple[ScalableSite, ...]
    reasons: tuple[str, ...]

    @property
    def multiplied(self) -> set[str]:
        """Tensors with entries that are multiplied by powers of two."""
        slices = [part for pair in self.folded for part in pair.slices]
        slices += [part for module in self.scaled for part in module.slices]
        return {part.tensor for part in slices}


def choose(checkpoint: Checkpoint, skeleton: Skeleton, options: HardenOptions, stored: str | None) -> Choice:
    """Decide which pairs are folded, which linears become two factors and which modules are scaled.

    Args:
        checkpoint: The base.
        skeleton: Its model.
        options: What the user asked for.
        stored: safetensors dtype of the result; ``None`` for the base's own.

    Raises:
        SpecDefError: There is nothing to change, or an option does not fit what there is.
    """
    sites, scalable = linear_sites(skeleton), scalable_sites(skeleton)
    found = Symmetries((), ()) if options.method == "insert" else symmetries(skeleton)
    pairs = select_pairs(found.pairs, skeleton.names, options.layers, options.exclude)
    # Options of the paper's factors ask for them, where there is nothing that they could mean in a fold.
    factors = wants_factors(options) and (options.method == "insert" or (options.method == "auto" and not pairs))
    nameable = () if options.method == "fold" else sites if factors else scalable
    require_named(options, nameable, found.pairs, skeleton.names)
    scales = options.allow_code and not folds_alone(options)
    # Who gives an option of a fold wants one.
    wants_fold = options.profile is not None or options.schedule == "constant"
    instead = set() if wants_fold else scaled_instead(found.pairs, scalable)

    profile = options.profile or "coverage"
    folded = fold_pairs(
        checkpoint,
        [pair for pair in pairs if not (scales and pair.name in instead)],
        profile=profile,
        schedule=options.schedule or "staircase",
        alpha=DEFAULT_ALPHA if options.alpha is None else options.alpha,
        dtype=stored,
    )
    reasons = tuple(note.reason for note in found.unpaired if note.kind is None or note.kind in FOLDED_KINDS[profile])
    if not folded and folds_alone(options):
        raise _no_pair(checkpoint, reasons, _instead_of_a_fold(options, selected_otherwise=bool(found.pairs)))

    in_pairs = {part.tensor for pair in folded if pair.name not in instead for part in pair.slices}
    freed = {side.tensor for pair in pairs if pair.name in instead for side in pair.sides}
    free = [site for site in scalable if site.tensor not in in_pairs]
    named = select_scalable(free, options.layers, options.exclude)
    left = tuple(site for site in free if site in named or site.tensor in freed)
    inserted: tuple[LinearSite, ...] = ()
    scaled: tuple[ScaledModule, ...] = ()
    if factors:
        inserted = select_layers(sites, options.layers, options.exclude)
        require_insertable(skeleton, inserted)
    elif options.method == "insert" or scales:
        scaled = scale_modules(checkpoint, skeleton, left, stored)
        reasons = _why_scaled(sum(pair.name in instead for pair in pairs)) or reasons
    elif not folded and left:
        code = "--allow-code: the model then brings code that undoes a scale of each weight"
        raise _no_pair(checkpoint, reasons, f"Pass {code}, or use --method insert.")
    choice = Choice(profile, folded, inserted, scaled, left, reasons)
    _require_honourable(choice, skeleton.config, options)
    return choice


def _why_scaled(pairs: int) -> tuple[str, ...]:
    """Why this many pairs that hold are not folded."""
    if not pairs:
        return ()
    return (f"{pairs_are(pairs)} scaled on both sides instead of folded, as no pairs cross in this family.",)


def pairs_are(count: int) -> str:
    """The beginning of a sentence: ``4 symmetric pairs are``."""
    return "1 symmetric pair is" if count == 1 else f"{count} symmetric pairs are"


def _no_pair(checkpoint: Checkpoint, reasons: Sequence[str], hint: str) -> SpecDefError:
    """There is nothing to fold; the first reason says why."""
    why = "".join(f"; {reason}" for reason in reasons[:1])
    return SpecDefError(f"{checkpoint.directory} has no symmetric pair to fold{why}", hint)


def _instead_of_a_fold(options: HardenOptions, *, selected_otherwise: bool) -> str:
    """What to do where a fold alone was asked for: with pairs that the options leave out, or with none."""
    if options.profile == "quantizable":
        return "Use --profile coverage, for float32 and bfloat16 alone."
    return "Use --method insert" + (", or other --layers and --exclude." if selected_otherwise else ".")


def folds_alone(options: HardenOptions) -> bool:
    """Whether nothing but a fold is wanted; no quantizer survives an insert."""
    return options.method == "fold" or (options.profile == "quantizable" and options.method != "insert")


def wants_factors(options: HardenOptions) -> bool:
    """Whether insert is to store the paper's two factors a layer, one α for all, rather than scales."""
    return options.schedule == "constant" or (
        options.schedule is None and any(given is not None for given in (options.alpha, options.top_k, options.gauge))
    )


def _require_honourable(choice: Choice, config: Any, options: HardenOptions) -> None:
    """Refuse a choice of nothing, one that would overflow, and an option that nothing in it would use.

    Raises:
        SpecDefError: naming what stands in the way.
    """
    folded, inserted, scaled = bool(choice.folded), bool(choice.sites), bool(choice.scaled)
    if (folded or scaled) and loaded_dtype(config, options) is torch.float16:
        raise SpecDefError(
            "config.json has the model loaded in float16, which a fold's powers of two overflow",
            "Give --dtype bfloat16 or float32, which config.json then names.",
        )
    if not (folded or inserted or scaled):
        raise SpecDefError(
            "no linear layer is left to harden", "Name some with --layers; `specdef inspect MODEL` lists them."
        )
    _require_used(options, folded=folded, inserted=inserted, scaled=scaled)


def _require_used(options: HardenOptions, *, folded: bool, inserted: bool, scaled: bool) -> None:
    """Refuse an option that nothing in the plan would use: who gives it expects it to matter.

    Raises:
        SpecDefError: naming the option.
    """
    if options.allow_code and not scaled:
        raise SpecDefError(
            "--allow-code would change nothing: "
            + (
                "a fold needs no code"
                if options.method == "fold"
                else "nothing is left that this method and profile would scale"
            ),
            "Leave --allow-code out.",
        )
    for flag, value in {"top-k": options.top_k, "gauge": options.gauge}.items():
        if value is not None and not inserted:
            what = "a staircase scales by powers of two" if scaled else "this plan only folds"
            raise SpecDefError(
                f"--{flag} {value} would change nothing: it concerns inserted layers, and {what}",
                f"Leave --{flag} out, or use --method insert --schedule constant.",
            )
    if options.alpha is not None and not inserted and options.schedule != "constant":
        raise SpecDefError(
            f"--alpha {options.alpha:g} would change nothing: a staircase has powers of two of its own",
            "Leave --alpha out, or use --schedule constant, alone or with --method insert.",
        )
    if options.profile is not None and not folded:
        raise SpecDefError(
            f"--profile {options.profile} would change nothing: it concerns folded pairs, and this plan has none",
            "Leave --profile out, or use --method fold.",
        )


def loaded_dtype(native: Any, options: HardenOptions) -> torch.dtype | None:
    """The dtype in which ``config.json`` has the model loaded, whatever its weights are stored in."""
    if options.dtype is not None:
        return DTYPES[options.dtype]
    named = getattr(native, "dtype", None)
    return named if named in DTYPES.values() else None
