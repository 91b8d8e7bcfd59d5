"""``specdef inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from specdef_cli.checkpoint.check import require_model
from specdef_cli.checkpoint.files import in_subfolder
from specdef_cli.cli.options import Device, Json, Manifest, Model, Quiet, Revision, Subfolder, Token, TrustRemoteCode
from specdef_cli.cli.output import Output
from specdef_cli.cli.startup import settle
from specdef_cli.cli.tables import outlook_lines

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from specdef_cli.hardening.survey import LayerSurvey, Survey


def inspect_command(
    model: Model,
    every_layer: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="List every layer, with σ₁ and effective rank (reads all weights).",
            rich_help_panel="Output",
        ),
    ] = False,
    manifest: Manifest = None,
    device: Device = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say whether and how a model can be hardened and what that would cost; with --layers, list its linear layers.

    Examples:

      specdef inspect ./my-model

      specdef inspect ./my-model --layers

      specdef inspect hardened --json
    """
    model, subfolder = in_subfolder(model, subfolder)
    require_model(model, manifest)
    from rich.console import Group

    from specdef_cli.hardening.survey import survey

    output = Output(as_json, quiet)
    settle(output)
    with output.progress("reading") as bar:
        found = survey(
            model,
            manifest=manifest,
            revision=revision,
            token=token,
            subfolder=subfolder,
            device=device,
            trust_remote_code=trust_remote_code,
            spectra=every_layer or as_json,
            on_progress=lambda event: bar.advance(event.label),
        )
    parts = [survey_summary(found)]
    output.data(found, Group(layers_table(found), *parts) if every_layer else Group(*parts))


def survey_summary(found: Survey) -> Group:
    """One screen: what the model is made of, what each method would do and cost, and what to do."""
    from rich.console import Group
    from rich.filesize import decimal
    from rich.table import Table

    shown = [found.recognised.sentence] if found.recognised.sentence else []
    state = f"hardened ({found.manifest.method})" if found.manifest else "not hardened"
    if shown and not found.manifest:
        state = "hardened, without a manifest"
    dtypes = ", ".join(sorted({layer.dtype for layer in found.layers}))
    headline = (
        f"{found.model.name}: {found.architecture}, {found.parameters:,} parameters, {decimal(found.nbytes)} in "
        f"{dtypes}, {state}"
    )
    table = Table("linear layers")
    for heading in ("count", "shape", "parameters", "σ₁"):
        table.add_column(heading, justify="right")
    for name, layers in by_name(found.layers).items():
        shapes = dict.fromkeys(f"{layer.out_features}×{layer.in_features}" for layer in layers)
        sigmas = [layer.sigma for layer in layers if layer.sigma is not None]
        table.add_row(
            name,
            str(len(layers)),
            ", ".join(shapes) if len(shapes) < 4 else f"{len(shapes)} shapes",
            f"{sum(layer.out_features * layer.in_features for layer in layers):,}",
            f"{min(sigmas):.4g} to {max(sigmas):.4g}" if sigmas else "–",
        )
    if all(layer.sigma is None for layer in found.layers):
        table.caption, table.caption_justify = "σ₁ of every layer: --layers", "left"
    if found.manifest is None and shown:
        what_next = f"`specdef attack {found.model.name} --control BASE` undoes it and says what it is worth."
        return Group(headline, table, "", *shown, what_next)
    if found.outlook is not None:
        return Group(headline, table, "", *outlook_lines(found.outlook))
    return Group(headline, table, "", *_hardened_lines(found))


def by_name(layers: Sequence[LayerSurvey]) -> dict[str, list[LayerSurvey]]:
    """Layers by their name within a block, in order."""
    from specdef_cli.hardening.plan import within_block

    found: dict[str, list[LayerSurvey]] = {}
    for layer in layers:
        found.setdefault(within_block(layer.module), []).append(layer)
    return found


def _hardened_lines(found: Survey) -> Iterable[str]:
    manifest = found.manifest
    assert manifest is not None
    parts = []
    if manifest.folded:
        parts.append(f"{len(manifest.folded)} symmetric pairs were rescaled")
    if manifest.factored:
        added = sum(layer.compensation_parameters for layer in found.layers if layer.alpha is not None)
        parts.append(f"{len(manifest.factored)} layers were replaced, which added {added:,} parameters")
    if manifest.scaled:
        added = sum(module.parameters_added for module in manifest.scaled)
        parts.append(f"{len(manifest.scaled)} modules were scaled, which added {added:,} parameters")
    yield f"Hardened by specdef-cli {manifest.specdef_version} from {manifest.base.name}: {'; '.join(parts)}."
    yield f"`specdef attack {found.model.name}` says what it is worth; `specdef collapse` undoes it."


def layers_table(found: Survey) -> Table:
    """Every linear layer; those that the paper's construction takes by default are marked."""
    from rich.table import Table

    table = Table(caption="•: writes to the residual stream; the paper hardens these", caption_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("")
    for heading in ("shape", "dtype", "σ₁", "effective rank", "α", "m² of a compensation"):
        table.add_column(heading, justify="right")
    for layer in found.layers:
        table.add_row(
            layer.module,
            "•" if layer.default else "",
            f"{layer.out_features}×{layer.in_features}",
            layer.dtype,
            "–" if layer.sigma is None else f"{layer.sigma:.4g}",
            "–" if layer.effective_rank is None else f"{layer.effective_rank:.1f}",
            "" if layer.alpha is None else f"{layer.alpha:g}",
            f"{layer.compensation_parameters:,}",
        )
    return table
