"""What of a model ``--layers`` and ``--exclude`` name: linears, scalable modules, symmetric pairs."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from specdef_cli.architectures.linears import LinearSite
from specdef_cli.architectures.names import TensorNames
from specdef_cli.architectures.pairs import SymmetricPair
from specdef_cli.architectures.scalable import ScalableSite
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import HardenOptions

RESIDUAL_WRITERS = ("attention_output", "mlp_down")


def require_named(
    options: HardenOptions,
    sites: Sequence[LinearSite | ScalableSite],
    pairs: Sequence[SymmetricPair],
    names: TensorNames,
) -> None:
    """Refuse a glob that names nothing which the method could change: it is misspelt.

    Raises:
        SpecDefError: naming the glob.
    """
    known = {name for site in sites for name in (site.module, site.tensor)}
    known |= {name for pair in pairs for name in _names(pair, names)}
    for glob in (*options.layers, *options.exclude):
        if not fnmatch.filter(known, glob):
            what = "linear layer" if sites or not pairs else "tensor of a symmetric pair"
            raise SpecDefError(
                f"{glob!r} matches no {what}", "`specdef inspect MODEL` lists the layers that can be named."
            )


def select_layers(sites: Sequence[LinearSite], layers: Sequence[str], exclude: Sequence[str]) -> tuple[LinearSite, ...]:
    """The linears that the globs name; without globs, those that write to the residual stream."""

    def matches(site: LinearSite, glob: str) -> bool:
        return fnmatch.fnmatchcase(site.module, glob) or fnmatch.fnmatchcase(site.tensor, glob)

    return tuple(
        site
        for site in sites
        if (any(matches(site, glob) for glob in layers) if layers else site.role in RESIDUAL_WRITERS)
        and not any(matches(site, glob) for glob in exclude)
    )


def select_scalable(
    sites: Sequence[ScalableSite], layers: Sequence[str], exclude: Sequence[str]
) -> tuple[ScalableSite, ...]:
    """The modules that the globs name; without globs, all of them. A head and the embedding it shares go together."""

    def named(tensor: str, globs: Sequence[str]) -> bool:
        known = [name for site in sites if site.tensor == tensor for name in (site.module, site.tensor)]
        return any(fnmatch.filter(known, glob) for glob in globs)

    return tuple(
        site for site in sites if (not layers or named(site.tensor, layers)) and not named(site.tensor, exclude)
    )


def select_pairs(
    pairs: Sequence[SymmetricPair], names: TensorNames, layers: Sequence[str], exclude: Sequence[str]
) -> tuple[SymmetricPair, ...]:
    """The pairs that touch a tensor named by ``layers`` (any, without globs) and none named by ``exclude``."""

    def touches(pair: SymmetricPair, globs: Sequence[str]) -> bool:
        return any(fnmatch.filter(_names(pair, names), glob) for glob in globs)

    return tuple(pair for pair in pairs if (not layers or touches(pair, layers)) and not touches(pair, exclude))


def scaled_instead(pairs: Sequence[SymmetricPair], scalable: Sequence[ScalableSite]) -> set[str]:
    """Names of the pairs of a family that are better scaled than folded, where both can be had.

    What trains on an inflated row or column is a vector, and only a number where two of them cross holds it back
    (docs/decisions.md). So where no pair has the other axis of another's tensor, as in Gemma, whose norms are in none,
    pairs are left to scales on both sides, but for those with a tensor that cannot be scaled (a classifier).
    """
    axes: dict[str, set[int]] = {}
    for pair in pairs:
        for side in pair.sides:
            axes.setdefault(side.tensor, set()).add(side.axis)
    if any(len(scaled) > 1 for scaled in axes.values()):
        return set()
    reached = {tensor for site in scalable for tensor in (site.tensor, site.bias)}
    return {pair.name for pair in pairs if reached >= {side.tensor for side in pair.sides}}


def _names(pair: SymmetricPair, names: TensorNames) -> set[str]:
    """What a user may call the tensors of a pair: as on disk or as in the model, with or without ``.weight``."""
    found = {name for side in pair.sides for name in (side.tensor, names.parameters[side.tensor])}
    return found | {name.removesuffix(".weight") for name in found}
