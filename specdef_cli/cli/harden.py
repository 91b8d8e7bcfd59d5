"""Make and publish hardened directories: ``specdef harden``, ``collapse``, ``convert-adapter`` and ``push``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from specdef_cli.checkpoint.changes import FoldedPair, ScaledModule
from specdef_cli.checkpoint.check import require_directory, require_hardened, require_not_hardened
from specdef_cli.checkpoint.manifest import MANIFEST_NAME
from specdef_cli.checkpoint.output import require_manifest_place, require_usable
from specdef_cli.cli.inspect import summary_lines
from specdef_cli.cli.options import Model, Upload, takes
from specdef_cli.cli.output import Output, table_of
from specdef_cli.errors import SpecDefError, require_extra
from specdef_cli.hardening.options import CONSTRUCTIONS, CollapseOptions, Construction, HardenOptions
from specdef_cli.option import Source, flag_of, option, options_of
from specdef_cli.process import prefer_huge_pages

if TYPE_CHECKING:
    from specdef_cli.hardening.run import HardenResult


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
            bar.reach(0, plan.nbytes)

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
            back = shlex.join(["specdef", "collapse", str(options.out), "--manifest", str(options.manifest_out)])
            output.note(
                f"Keep {options.manifest_out}: certify, attack and inspect need it (--manifest), and `{back}` gives "
                "the original back."
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
    changed: tuple[tuple[str, Sequence[FoldedPair | ScaledModule]], ...] = (
        ("symmetric pairs", manifest.folded),
        ("scaled modules", manifest.scaled),
    )
    for title, members in changed:
        table = table_of(title, "count", "channels", "scaled by")
        for kind in dict.fromkeys(each.kind for each in members):
            alike = [each.exponents for each in members if each.kind == kind]
            powers = [*chain(*alike)]
            span = f"2^{min(powers)} to 2^{max(powers)}"
            table.add_row(kind.replace("_", "/"), str(len(alike)), str(len(powers)), span)
        parts += [table] if members else []
    return Group(*parts)


@takes(CollapseOptions, without=("trust_remote_code",))
def collapse_command(model: Model, output: Output, **given: Any) -> None:
    """Restore the original architecture: multiply factors, undo folds and scales. Anyone can do this.

    Examples:

      specdef collapse hardened --out original

      specdef collapse org/name --manifest specdef.json --out original
    """
    options = CollapseOptions(model, **given)
    require_hardened(options)
    require_usable(options.out, options.model)
    prefer_huge_pages()

    from specdef_cli.hardening.run import collapse

    with output.progress("collapsing") as bar:
        result = collapse(
            options,
            lambda groups: bar.reach(0, sum(group.nbytes for group in groups)),
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
        done = {
            "pairs of factors multiplied": layers,
            "folded pairs undone": pairs,
            "modules unscaled": modules,
            "parameters removed": result.parameters_removed,
        }
        said = ", ".join(f"{count:,} {what}" for what, count in done.items() if count)
        output.data(summary, Text(f"{result.out}: {said}"), written=options.out)


@dataclass(frozen=True)
class Converted:
    out: Path = option(MISSING, "New directory of the adapter.", "--out", "-o", metavar="DIR", group="Output")


@takes(Source)
def convert_adapter_command(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Directory or Hub id of a LoRA adapter of the base.")
    ],
    hardened: Annotated[
        str, typer.Argument(metavar="HARDENED", help="Directory or Hub id that `specdef harden` made.")
    ],
    converted: Converted,
    output: Output,
    **given: Any,
) -> None:
    """Rewrite a PEFT LoRA adapter of the base so that it does on the hardened model what it did on the base.

    Examples:

      specdef convert-adapter ./my-lora hardened --out hardened-lora
    """
    source, out = Source(hardened, **given), converted.out
    require_hardened(source)
    require_usable(out, adapter)
    place = Path(adapter).expanduser()
    if place.exists() and not (place / "adapter_config.json").is_file():
        raise SpecDefError(f"{adapter} has no adapter_config.json", "Give what PEFT's save_pretrained wrote.")
    require_extra("attack", "adapters")

    from specdef_cli.hardening.adapter import convert_adapter
    from specdef_cli.model.opened import open_model

    model = open_model(source, hardened=True)
    result = convert_adapter(str(place) if place.exists() else adapter, model, out, name=hardened, token=source.token)
    output.data(result, Text(f"{out}: {result.rewritten} of {result.modules} modules rewritten"), written=out)


@dataclass(frozen=True)
class PushFlags(Upload):
    revision: str | None = option(None, "Branch to upload to.", metavar="NAME", shown_default="main", group="Upload")
    no_manifest: bool = option(False, "Leave out specdef.json, which says what was changed.", group="Upload")
    yes: bool = option(False, "Upload a directory that is not hardened too.", "--yes", "-y", group="Upload")


@takes(Source, without=("manifest", "revision", "subfolder", "trust_remote_code"))
def push_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `specdef harden` published.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub; made if it does not exist.")],
    flags: PushFlags,
    output: Output,
    **given: Any,
) -> None:
    """Upload a hardened directory with its card and certificate; run `specdef certify` first.

    Examples:

      specdef push hardened org/name --private

      specdef push hardened org/name --revision hardened --create-pr
    """
    require_directory(directory)

    from specdef_cli.checkpoint.upload import Destination, push, require_writable
    from specdef_cli.hardening.card import has_section
    from specdef_cli.model.opened import open_model

    destination = Destination(
        repository, flags.private, flags.revision, flags.create_pr, Source(directory, **given).token
    )
    model = open_model(directory)  # what is incomplete is not uploaded
    without: tuple[Path, ...] = ()
    if model.manifest is not None or has_section(directory):
        beside = model.checkpoint.companions  # the base's weights, where someone has put them there
        without = tuple(chain.from_iterable(beside.left_out.values()))
        if note := beside.note("uploaded"):
            output.note(note)
    elif not flags.yes:
        _ask(directory, repository)
    require_writable(destination)
    if flags.no_manifest:
        output.note(
            f"{MANIFEST_NAME} was not uploaded: keep it for `specdef collapse --manifest`. "
            "Leaving it out hides little: norms give changed channels away, and names give factors away."
        )
    elif model.manifest is not None:
        there = f"{repository}@{flags.revision}" if flags.revision else repository
        output.note(
            f"{MANIFEST_NAME} is uploaded and names every changed weight: `specdef collapse {there}` gives the "
            "original back. --no-manifest leaves it out, which hides little: norms give changed channels away."
        )
    upload = push(directory, destination, without=(*without, Path(MANIFEST_NAME)) if flags.no_manifest else without)
    if upload.removed:
        output.note(upload.note)
    output.data(
        {"address": upload.address, "repository": repository, "removed": upload.removed},
        Text(f"uploaded: {upload.address}"),
    )


def _ask(directory: Path, repository: str) -> None:
    """Have the user agree to upload weights that anyone can fine-tune."""
    problem = f"{directory} is not hardened: it has neither specdef.json nor the card that `specdef harden` writes"
    if sys.stdin is not None and sys.stdin.isatty():
        print(f"{problem}.", file=sys.stderr)
        if typer.confirm(f"Upload it to {repository} all the same?", err=True):
            return
    raise SpecDefError(problem, "Harden it first, or upload it as it is with --yes.")
