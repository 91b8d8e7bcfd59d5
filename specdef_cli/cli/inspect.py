"""``specdef inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdef_cli.cli.options import Device, Json, Model, Quiet, Revision, Token, TrustRemoteCode
from specdef_cli.cli.output import Output

if TYPE_CHECKING:
    from rich.table import Table

    from specdef_cli.hardening.survey import Survey


def inspect_command(
    model: Model,
    device: Device = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List a model's linear layers, their σ₁ and effective rank, whether they are hardened, and what that would cost.

    Examples:

      specdef inspect ./my-model

      specdef inspect hardened --json
    """
    from specdef_cli.hardening.survey import survey

    output = Output(as_json, quiet)
    with output.progress("reading") as bar:
        found = survey(
            model,
            revision=revision,
            token=token,
            device=device,
            trust_remote_code=trust_remote_code,
            on_progress=lambda event: bar.advance(event.label),
            on_download=bar.downloaded,
        )
    output.data(found, survey_table(found))


def survey_table(found: Survey) -> Table:
    """The survey as the terminal shows it; layers that ``harden`` takes by default are marked."""
    from rich.table import Table

    state = f"hardened ({found.manifest.method})" if found.manifest else "not hardened"
    cost = sum(layer.compensation_parameters for layer in found.layers if layer.default)
    table = Table(
        title=f"{found.model.name}: {found.architecture}, {found.parameters:,} parameters, {state}",
        title_justify="left",
        caption="• taken by `specdef harden --method insert` without --layers: "
        + (f"{cost:,} parameters of compensation ({cost / found.parameters:+.1%})" if not found.manifest else "done"),
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    table.add_column("")
    for heading in ("shape", "dtype", "σ₁", "effective rank", "α", "cost of insert"):
        table.add_column(heading, justify="right")
    for layer in found.layers:
        table.add_row(
            layer.module,
            "•" if layer.default else "",
            f"{layer.out_features}×{layer.in_features}",
            layer.dtype,
            "—" if layer.sigma is None else f"{layer.sigma:.4g}",
            "—" if layer.effective_rank is None else f"{layer.effective_rank:.1f}",
            "" if layer.alpha is None else f"{layer.alpha:g}",
            f"{layer.compensation_parameters:,}",
        )
    return table
