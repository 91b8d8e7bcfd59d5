"""What is done with a hardened directory: ``specdef collapse``, ``convert-adapter`` and ``push``."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from specdef_cli.checkpoint.check import require_directory, require_hardened
from specdef_cli.checkpoint.manifest import MANIFEST_NAME
from specdef_cli.checkpoint.output import require_usable
from specdef_cli.cli.options import Model, Upload, takes
from specdef_cli.cli.output import Output
from specdef_cli.errors import SpecDefError, require_extra
from specdef_cli.hardening.options import CollapseOptions
from specdef_cli.option import Source, option
from specdef_cli.process import prefer_huge_pages


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
            written=options.out,
        )


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
class Flags(Upload):
    revision: str | None = option(None, "Branch to upload to.", metavar="NAME", shown_default="main", group="Upload")
    no_manifest: bool = option(False, "Leave out specdef.json, which says what was changed.", group="Upload")
    yes: bool = option(False, "Upload a directory that is not hardened too.", "--yes", "-y", group="Upload")


@takes(Source, without=("manifest", "revision", "subfolder", "trust_remote_code"))
def push_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `specdef harden` published.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub; made if it does not exist.")],
    flags: Flags,
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
