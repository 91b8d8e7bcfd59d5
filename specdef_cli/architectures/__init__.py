"""Per family: which linear layers exist under which names, and which exact symmetries tie them in pairs.

Everything that other rooms get from here is in terms of the tensor names on disk, because hardening streams shards and
never builds the model with its weights.
"""

from specdef_cli.architectures.linears import LinearSite, linear_sites, require_insertable
from specdef_cli.architectures.names import TensorNames, match_names, meta_model
from specdef_cli.architectures.pairs import (
    Side,
    SymmetricPair,
    Symmetries,
    Unpaired,
    symmetric_pairs,
    symmetries,
    unpaired,
)

__all__ = [
    "LinearSite",
    "Side",
    "SymmetricPair",
    "Symmetries",
    "TensorNames",
    "Unpaired",
    "linear_sites",
    "match_names",
    "meta_model",
    "require_insertable",
    "symmetric_pairs",
    "symmetries",
    "unpaired",
]
