"""Per family: which linear layers exist under which names, and which exact symmetries tie them in pairs.

Everything that other rooms get from here is in terms of the tensor names on disk, because hardening streams shards and
never builds the model with its weights.
"""

from specdef_cli.architectures.linears import LinearSite, linear_sites, require_factorable
from specdef_cli.architectures.pairs import Side, SymmetricPair, Symmetries, Unpaired
from specdef_cli.architectures.skeleton import Skeleton
from specdef_cli.architectures.symmetries import symmetric_pairs, symmetries

__all__ = [
    "LinearSite",
    "Side",
    "Skeleton",
    "SymmetricPair",
    "Symmetries",
    "Unpaired",
    "linear_sites",
    "require_factorable",
    "symmetric_pairs",
    "symmetries",
]
