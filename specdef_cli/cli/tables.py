"""Tables that several commands show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from specdef_cli.checkpoint.manifest import FoldedPair

# A large model has thousands of pairs, all alike; --json has them all.
MOST_PAIRS = 40


def layer_table(last: str) -> Table:
    """An empty table of replaced layers and their σ₁."""
    from rich.table import Table

    table = Table("layer")
    table.columns[0].no_wrap = True
    for heading in ("shape", "α", "σ₁ before", "σ₁ after", last):
        table.add_column(heading, justify="right")
    return table


def folded_table(pairs: Sequence[FoldedPair]) -> Table:
    """Rescaled pairs: where, and by which powers of two."""
    from rich.table import Table

    table = Table("pair", "kind", "channels", "factors")
    table.columns[0].no_wrap = True
    for pair in pairs[:MOST_PAIRS]:
        channels = ", ".join(map(str, pair.channels))
        table.add_row(pair.name, pair.kind, channels, ", ".join(f"2^{exponent}" for exponent in pair.exponents))
    if len(pairs) > MOST_PAIRS:
        table.caption = f"and {len(pairs) - MOST_PAIRS} more; --json lists all"
    return table
