"""``specdef convert-adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdef_cli.cli.options import Json, Manifest, Out, Quiet, Revision, Token, TrustRemoteCode
from specdef_cli.cli.output import Output


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
    from specdef_cli.checkpoint.check import require_hardened
    from specdef_cli.checkpoint.output import require_usable
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
