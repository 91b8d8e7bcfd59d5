"""``specdef collapse``."""

from __future__ import annotations

from specdef_cli.checkpoint.check import require_hardened
from specdef_cli.checkpoint.output import require_usable
from specdef_cli.cli.options import Device, Json, Manifest, MaxShardSize, Model, Out, Quiet, Resume, Revision, Token
from specdef_cli.cli.output import Output
from specdef_cli.cli.startup import prefer_huge_pages, settle
from specdef_cli.hardening.options import CollapseOptions
from specdef_cli.parse import parse_size


def collapse_command(
    model: Model,
    out: Out,
    manifest: Manifest = None,
    max_shard_size: MaxShardSize = "5GB",
    device: Device = None,
    revision: Revision = None,
    token: Token = None,
    resume: Resume = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give back the original architecture: multiply factors, undo folds and scales. Anyone can do this.

    Examples:

      specdef collapse hardened --out original

      specdef collapse org/name --manifest specdef.json --out original
    """
    options = CollapseOptions(model, out, manifest, parse_size(max_shard_size), device, revision, token, resume)
    require_hardened(model, manifest)
    require_usable(out, model)
    prefer_huge_pages()

    from rich.text import Text

    from specdef_cli.hardening.run import collapse

    output = Output(as_json, quiet)
    settle(output)
    with output.progress("collapsing") as bar:
        result = collapse(
            options,
            lambda groups: bar.start(sum(group.nbytes for group in groups)),
            lambda event: bar.advance(event.label, event.nbytes),
        )
    if result is not None:
        for text in result.notes:
            output.note(text)
        layers, pairs, modules = map(len, (result.manifest.factored, result.manifest.folded, result.manifest.scaled))
        summary = {
            "out": result.out,
            "base": result.manifest.base.name,
            "layers_multiplied": layers,
            "pairs_unfolded": pairs,
            "modules_unscaled": modules,
            "parameters_removed": result.parameters_removed,
        }
        output.data(
            summary,
            Text(
                f"{result.out}: {layers} pairs of factors multiplied, {pairs} folded pairs undone, "
                f"{modules} modules unscaled, "
                f"{result.parameters_removed:,} parameters removed"
            ),
            written=out,
        )
