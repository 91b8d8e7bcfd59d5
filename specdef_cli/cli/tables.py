"""Tables that several commands show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from specdef_cli.checkpoint.manifest import FoldedPair, ScaledModule
    from specdef_cli.hardening.survey import Outlook, PlanSummary


def layer_table(last: str) -> Table:
    """An empty table of replaced layers and their σ₁."""
    from rich.table import Table

    table = Table("layer")
    table.columns[0].no_wrap = True
    for heading in ("shape", "α", "σ₁ before", "σ₁ after", last):
        table.add_column(heading, justify="right")
    return table


def pairs_table(pairs: Sequence[FoldedPair]) -> Table:
    """Rescaled pairs by kind: how many, and by which powers of two. ``--json`` lists every one."""
    from rich.table import Table

    table = Table("symmetric pairs")
    for heading in ("count", "channels", "factors"):
        table.add_column(heading, justify="right")
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        alike = [pair for pair in pairs if pair.kind == kind]
        exponents = [exponent for pair in alike for exponent in pair.exponents]
        table.add_row(
            kind.replace("_", "/"),
            str(len(alike)),
            str(sum(len(pair.channels) for pair in alike)),
            f"2^{min(exponents)} to 2^{max(exponents)}",
        )
    return table


def scaled_table(modules: Sequence[ScaledModule]) -> Table:
    """Scaled modules by kind: how many, and by which powers of two. ``--json`` lists every one."""
    from rich.table import Table

    table = Table("scaled modules")
    for heading in ("count", "factors"):
        table.add_column(heading, justify="right")
    for kind in dict.fromkeys(module.kind for module in modules):
        alike = [module for module in modules if module.kind == kind]
        exponents = [value for module in alike for side in module.scales.values() for value in side.exponents]
        table.add_row(kind, str(len(alike)), f"2^{min(exponents)} to 2^{max(exponents)}")
    return table


MAX_NAMES = 6
"""Names of what is left alone that are listed."""

FEW = 0.5
"""Below this share of the parameters a recommendation says how little is reached."""


def outlook_lines(outlook: Outlook) -> Iterator[RenderableType]:
    """What every method would do and cost, and which one to take."""
    from specdef_cli.hardening.survey import Obstacle

    for summary in outlook.methods:
        if isinstance(summary, Obstacle):
            yield f"{summary.method}: not possible; {summary.problem}"
        else:
            yield from summary_lines(summary)
        yield ""
    if outlook.recommended is not None:
        yield f"Recommended: {recommendation(outlook.recommended)}"
    else:
        found = outlook.methods[0]
        assert isinstance(found, Obstacle)
        yield f"Recommended: leave it as it is; {found.problem}. {found.hint}"
    yield (
        "Harden if a cost for people who run ordinary recipes is worth something to you. Attackers who know of the "
        "change undo it in one pass over the weights, and `specdef attack` shows which other recipes get through."
    )


def summary_lines(summary: PlanSummary) -> Iterator[RenderableType]:
    """One plan: what it changes, what it leaves, what it costs."""
    from rich.filesize import decimal
    from rich.padding import Padding

    parts = []
    if summary.pairs:
        parts.append(f"{summary.pairs} symmetric pairs rescaled")
    if summary.modules:
        parts.append(f"{summary.modules} modules scaled and compensated in place")
    if summary.layers:
        parts.append(f"{summary.layers} layers replaced by two factors")
    yield f"{summary.method}: {', '.join(parts)}"
    names = ", ".join(f"{name} ×{count}" for name, count in summary.changed.items())
    lines = [
        f"changes tensors with {_share(summary.parameters_changed, summary.parameters)} of the parameters: {names}"
    ]
    left = [f"{name} ({_share(count, summary.parameters)})" for name, count in summary.left.items()]
    more = [f"{len(left) - MAX_NAMES} more"] if len(left) > MAX_NAMES else []
    if left:
        lines.append(f"leaves these, which train as before: {', '.join(left[:MAX_NAMES] + more)}")
    lines.append(f"does not survive: {', '.join(summary.lost)}")
    added = "no parameter added"
    if summary.parameters_added:
        grown = summary.bytes_after - summary.bytes_before
        share = summary.parameters_added / summary.parameters
        added = f"{summary.parameters_added:,} parameters added ({share:+.1%}, {decimal(grown)})"
    lines.append(
        f"costs: {added}; {decimal(summary.bytes_after)} to write, in about the time of copying them; "
        f"{decimal(summary.bytes_before + summary.bytes_after)} of memory to compare the outputs"
    )
    for line in lines:
        yield Padding(line, (0, 0, 0, 2))


def recommendation(summary: PlanSummary) -> str:
    """Why the default plan is the one to take."""
    reasons = {
        "fold": "fold (the default). The outputs stay bit-identical, and whatever loads the architecture loads the "
        "result, in float32 and bfloat16.",
        "scale": "scale, as no symmetric pair is known for this architecture. The outputs stay bit-identical; the "
        "result needs code to load: trust_remote_code=True, or `import specdef_cli`.",
        "factors": "factors. The result needs code to load: trust_remote_code=True, or `import specdef_cli`.",
    }
    reached = summary.parameters_changed / summary.parameters
    caution = f" It reaches tensors with only {reached:.0%} of the parameters." if reached < FEW else ""
    return reasons[summary.method] + caution


def _share(count: int, whole: int) -> str:
    share = count / whole
    return "under 0.1 %" if 0 < share < 0.001 else f"{100 * share:.3g} %"
