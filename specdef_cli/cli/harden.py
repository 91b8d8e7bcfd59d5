"""``specdef harden``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Group, RenderableType

from specdef_cli.checkpoint.check import require_not_hardened
from specdef_cli.checkpoint.manifest import FoldedPair, ScaledModule
from specdef_cli.checkpoint.output import require_manifest_place, require_usable
from specdef_cli.cli.inspect import summary_lines
from specdef_cli.cli.options import Model, Upload, takes
from specdef_cli.cli.output import Output, table_of
from specdef_cli.hardening.options import CONSTRUCTIONS, Construction, HardenOptions
from specdef_cli.option import flag_of, option, options_of
from specdef_cli.process import prefer_huge_pages

if TYPE_CHECKING:
    from specdef_cli.hardening.run import HardenResult

Kinded = TypeVar("Kinded", FoldedPair, ScaledModule)


@dataclass(frozen=True)
class Flags(Upload):
    push_to_hub: str | None = option(
        None, "Upload the published directory to org/name.", metavar="REPO", group="Upload"
    )
    push_revision: str | None = option(
        None, "Branch to upload to.", metavar="NAME", shown_default="main", group="Upload"
    )
    dry_run: bool = option(False, "Say what would change, and write nothing.", group="Output")


@takes(HardenOptions, *CONSTRUCTIONS.values(), without=("manifest",))
def harden_command(model: Model, flags: Flags, output: Output, **given: Any) -> None:
    """Harden a checkpoint against fine-tuning without changing what it computes.

    Examples:

      specdef harden meta-llama/Llama-3.1-8B-Instruct --out hardened

      specdef harden ./my-model --out hardened --method scale

      specdef harden ./my-model --method factors --layers '*.o_proj' --dry-run
    """
    construction = _construction(given)
    options = HardenOptions(model, construction=construction, **given)
    require_not_hardened(options)
    if not flags.dry_run:
        require_usable(options.out, options.model)
    if options.manifest_out is not None:
        require_manifest_place(options.manifest_out, options.out, options.model)
    prefer_huge_pages()

    from specdef_cli.checkpoint.stream import Progress
    from specdef_cli.checkpoint.upload import Destination, push, require_writable
    from specdef_cli.hardening.plan import HardeningPlan
    from specdef_cli.hardening.run import harden, preview

    destination = None
    if flags.push_to_hub is not None:
        destination = Destination(flags.push_to_hub, flags.private, flags.push_revision, flags.create_pr, options.token)
        if not flags.dry_run:
            require_writable(destination)
    elif flags.private or flags.create_pr or flags.push_revision is not None:
        raise typer.BadParameter("--private, --push-revision and --create-pr need --push-to-hub")
    with output.progress("planning" if flags.dry_run else "hardening") as bar:

        def begin(plan: HardeningPlan) -> None:
            for text in plan.notes:
                output.note(text)
            bar.start(plan.nbytes)

        def advance(event: Progress) -> None:
            bar.advance(event.label, event.nbytes)

        if flags.dry_run:
            shown = preview(options, begin, advance)
        else:
            result = harden(options, begin, advance)
    if flags.dry_run:
        output.data(shown, Group(*summary_lines(shown), "nothing was written"))
    elif result is not None:
        output.data(result, result_tables(result), written=options.out)
        if options.manifest_out is not None:
            output.note(
                f"Keep {options.manifest_out}: certify, attack and inspect need it (--manifest), and `specdef collapse "
                f"{options.out} --manifest {options.manifest_out}` gives the original back."
            )
        if destination is not None:
            upload = push(options.out, destination)
            output.note(f"uploaded: {upload.address}")
            if upload.removed:
                output.note(upload.note)


def _construction(given: dict[str, Any]) -> Construction:
    """Take the construction and its options out of ``given``; an option of another construction is wrong usage."""
    method = given.pop("construction", "fold")
    owners = {name: kind for kind in CONSTRUCTIONS.values() for name in options_of(kind)}
    own = {name: given.pop(name) for name in tuple(given) if name in owners}
    for name in own:
        if owners[name].method != method:
            raise typer.BadParameter(
                f"{flag_of(owners[name], name)} is an option of --method {owners[name].method}, not of {method}"
            )
    return CONSTRUCTIONS[method](**own)


def result_tables(result: HardenResult) -> Group:
    """The published directory as the terminal shows it."""
    manifest = result.manifest
    figures = manifest.verification
    if "skipped" in figures:
        verified = f"outputs not compared: {figures['skipped']}"
    elif figures["equal"]:
        verified = "outputs bit-identical to the base's"
    else:
        verified = f"outputs within {figures['relative']:.1e} of the base's"
    parts: list[RenderableType] = [
        f"{result.out}: {manifest.method}, {result.parameters_added:,} parameters added; {verified}"
    ]
    if manifest.factored:
        layers = table_of("layer", "shape", "α", "σ₁ before", "σ₁ after", "error")
        for layer in manifest.factored:
            sigma = layer.singular_values[0]
            layers.add_row(
                layer.module,
                f"{layer.out_features}×{layer.in_features}",
                f"{layer.alpha:g}",
                *(f"{value:.4g}" for value in (sigma, sigma * layer.alpha)),
                f"{layer.reconstruction_error:.1e}",
            )
        parts.append(layers)
    if manifest.folded:
        pairs = table_of("symmetric pairs", "count", "channels", "scaled by")
        for kind, folded in _by_kind(manifest.folded):
            channels = sum(len(pair.channels) for pair in folded)
            powers = _powers(exponent for pair in folded for exponent in pair.exponents)
            pairs.add_row(kind.replace("_", "/"), str(len(folded)), str(channels), powers)
        parts.append(pairs)
    if manifest.scaled:
        modules = table_of("scaled modules", "count", "scaled by")
        for kind, scaled in _by_kind(manifest.scaled):
            sides = [side for module in scaled for side in module.scales.values()]
            modules.add_row(kind, str(len(scaled)), _powers(value for side in sides for value in side.exponents))
        parts.append(modules)
    return Group(*parts)


def _by_kind(changed: Sequence[Kinded]) -> Iterator[tuple[str, list[Kinded]]]:
    for kind in dict.fromkeys(each.kind for each in changed):
        yield kind, [each for each in changed if each.kind == kind]


def _powers(exponents: Iterable[int]) -> str:
    found = list(exponents)
    return f"2^{min(found)} to 2^{max(found)}"
