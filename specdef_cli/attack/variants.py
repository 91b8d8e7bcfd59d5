"""From the name of an attack variant to the surgery that it means.

A new informed attack takes three lines: a kind in :data:`specdef_cli.attack.spec.VariantKind` (with its knowledge and
label), a row in the table here, and its place in :func:`informed_variants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from specdef_cli.attack import expansions
from specdef_cli.attack.channel_rates import scale_rates
from specdef_cli.attack.rebalance import rebalance
from specdef_cli.attack.results import Growth
from specdef_cli.attack.spec import Variant, VariantKind
from specdef_cli.checkpoint.manifest import Manifest

Surgery = Callable[[PreTrainedModel, Variant, int], Growth]
"""(model, variant, seed) → what it cost; the model is changed in place."""

SURGERY: Mapping[VariantKind, Surgery] = {
    "collapse": lambda model, _variant, _seed: expansions.collapse(model),
    "rebalance": lambda model, _variant, _seed: rebalance(model),
    "channel-rates": lambda model, _variant, _seed: scale_rates(model),
    "freeze-compensation": lambda model, _variant, _seed: expansions.freeze_compensation(model),
    "freeze-pair": lambda model, _variant, _seed: expansions.freeze_pair(model),
    "width": lambda model, variant, seed: expansions.widen(model, variant.factor or 2.0, seed=seed),
    "depth": lambda model, variant, _seed: expansions.deepen(model, int(variant.factor or 2)),
    "inject": lambda model, _variant, _seed: expansions.inject(model),
}


def apply_variant(model: PreTrainedModel, variant: Variant, seed: int) -> Growth | None:
    """Change ``model`` in place as ``variant`` says; ``None`` for the plain one.

    Raises:
        SpecDefError: The variant needs hardened layers and the model has none.
    """
    return None if variant.kind == "plain" else SURGERY[variant.kind](model, variant, seed)


def applicable(variant: Variant, manifest: Manifest | None) -> bool:
    """Whether a model hardened like this has what ``variant`` works on."""
    if variant.kind == "plain":
        return True
    if manifest is None:
        return False
    if variant.kind == "channel-rates":
        return True
    return bool(manifest.folded if variant.kind == "rebalance" else manifest.inserted)


def informed_variants(manifest: Manifest | None) -> tuple[Variant, ...]:
    """The attacks by whoever knows the construction that belong in every report on a model hardened like this."""
    if manifest is None:
        return ()
    # Rebalancing collapses inserted layers first, so that it is the stronger one where a model has both.
    return (Variant("rebalance" if manifest.folded else "collapse"),)
