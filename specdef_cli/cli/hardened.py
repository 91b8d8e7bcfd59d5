"""What is done with a hardened directory: ``specdef collapse``, ``convert-adapter`` and ``push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from specdef_cli.checkpoint.check import require_hardened, require_usable
from specdef_cli.cli.options import (
    CreatePr,
    Device,
    Json,
    Manifest,
    MaxShardSize,
    Model,
    Out,
    Private,
    Quiet,
    Resume,
    Revision,
    Token,
    TrustRemoteCode,
)
from specdef_cli.cli.output import Output, settle
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.options import CollapseOptions
from specdef_cli.option import parse_size
from specdef_cli.process import prefer_huge_pages


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

    from specdef_cli.hardening.collapse import collapse

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


def convert_adapter_command(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Directory or Hub id of a LoRA adapter of the base.")
    ],
    hardened: Annotated[
        str, typer.Argument(metavar="HARDENED", help="Directory or Hub id that `specdef harden` made.")
    ],
    out: Out,
    manifest: Manifest = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite a PEFT LoRA adapter of the base so that it does on the hardened model what it did on the base.

    Examples:

      specdef convert-adapter ./my-lora hardened --out hardened-lora
    """
    from specdef_cli.checkpoint.check import require_hardened, require_usable
    from specdef_cli.errors import SpecDefError, require_extra

    require_hardened(hardened, manifest)
    require_usable(out, adapter)
    place = Path(adapter).expanduser()
    if place.exists() and not (place / "adapter_config.json").is_file():
        raise SpecDefError(f"{adapter} has no adapter_config.json", "Give what PEFT's save_pretrained wrote.")
    require_extra("attack", "adapters")

    from rich.text import Text

    from specdef_cli.hardening.adapter import convert_adapter
    from specdef_cli.model.opened import open_model

    output = Output(as_json, quiet)
    model = open_model(
        hardened, hardened=True, manifest=manifest, revision=revision, token=token, trust_remote_code=trust_remote_code
    )
    result = convert_adapter(str(place) if place.exists() else adapter, model, out, name=hardened, token=token)
    output.data(result, Text(f"{out}: {result.rewritten} of {result.modules} modules rewritten"), written=out)


def push_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `specdef harden` published.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub; made if it does not exist.")],
    private: Private = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch to upload to.", show_default="main", rich_help_panel="Upload"),
    ] = None,
    create_pr: CreatePr = False,
    no_manifest: Annotated[
        bool,
        typer.Option(
            "--no-manifest", help="Leave out specdef.json, which says what was changed.", rich_help_panel="Upload"
        ),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Upload a directory that is not hardened too.", rich_help_panel="Upload")
    ] = False,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a hardened directory with its card and certificate: after `specdef certify`, not before.

    Examples:

      specdef push hardened org/name --private

      specdef push hardened org/name --revision hardened --create-pr
    """
    from specdef_cli.checkpoint.check import require_directory

    require_directory(directory)
    from rich.text import Text

    from specdef_cli.checkpoint.manifest import MANIFEST_NAME
    from specdef_cli.checkpoint.resolve import Resolved
    from specdef_cli.checkpoint.upload import Destination, push, require_writable
    from specdef_cli.hardening.card import has_section
    from specdef_cli.model.opened import open_found

    output = Output(as_json, quiet)
    destination = Destination(repository, private, revision, create_pr, token)
    model = open_found(Resolved(directory, str(directory)))  # what is incomplete is not uploaded
    if model.manifest is None and not has_section(directory) and not yes:
        _ask(directory, repository)
    require_writable(destination)
    if no_manifest:
        output.note(
            f"{MANIFEST_NAME} was not uploaded: keep it for `specdef collapse --manifest`. "
            "Leaving it out hides little: norms give changed channels away, and names give factors away."
        )
    elif model.manifest is not None:
        output.note(
            f"{MANIFEST_NAME} is uploaded and names every changed weight: `specdef collapse {repository}` gives the "
            "original back. --no-manifest leaves it out, which hides little: norms give changed channels away."
        )
    upload = push(directory, destination, manifest=not no_manifest)
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
