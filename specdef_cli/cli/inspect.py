"""``specdef inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table

from specdef_cli.checkpoint.check import require_model
from specdef_cli.cli.options import Model, takes
from specdef_cli.cli.output import Output, table_of
from specdef_cli.option import Source, option

if TYPE_CHECKING:
    from specdef_cli.hardening.survey import LayerSurvey, Outlook, PlanSummary, Survey


@dataclass(frozen=True)
class Flags:
    every_layer: bool = option(
        False, "List every layer, with σ₁ and effective rank (reads all weights).", "--layers", group="Output"
    )
    device: str | None = option(
        None, "cpu, cuda:0, …", metavar="DEVICE", shown_default="every GPU, else cpu", group="Model"
    )


@takes(Source)
def inspect_command(model: Model, flags: Flags, output: Output, **given: Any) -> None:
    """Say whether and how a model can be hardened and what that would cost; with --layers, list its linear layers.

    Examples:

      specdef inspect ./my-model

      specdef inspect ./my-model --layers

      specdef inspect hardened --json
    """
    source = Source(model, **given)
    require_model(source)

    from specdef_cli.hardening.survey import survey

    with output.progress("reading") as bar:
        found = survey(
            source,
            device=flags.device,
            spectra=flags.every_layer or output.as_json,
            on_progress=lambda event: bar.advance(event.label),
        )
    parts = [survey_summary(found)]
    output.data(found, Group(layers_table(found), *parts) if flags.every_layer else Group(*parts))


def survey_summary(found: Survey) -> Group:
    """One screen: what the model is made of, what each method would do and cost, and what to do."""
    from specdef_cli.hardening.plan import within_block

    shown = [found.recognised.sentence] if found.recognised.sentence else []
    state = f"hardened ({found.manifest.method})" if found.manifest else "not hardened"
    if shown and not found.manifest:
        state = "hardened, without a manifest"
    dtypes = ", ".join(sorted({layer.dtype for layer in found.layers}))
    headline = (
        f"{found.model.name}: {found.architecture}, {found.parameters:,} parameters, {decimal(found.nbytes)} in "
        f"{dtypes}, {state}"
    )
    measured = any(layer.sigma is not None for layer in found.layers)
    table = table_of("linear layers", "count", "shape", "parameters", *["σ₁"] * measured)
    named: dict[str, list[LayerSurvey]] = {}
    for layer in found.layers:
        named.setdefault(within_block(layer.module), []).append(layer)
    for name, layers in named.items():
        shapes = dict.fromkeys(f"{layer.out_features}×{layer.in_features}" for layer in layers)
        sigmas = [layer.sigma for layer in layers if layer.sigma is not None]
        table.add_row(
            name,
            str(len(layers)),
            ", ".join(shapes) if len(shapes) < 4 else f"{len(shapes)} shapes",
            f"{sum(layer.out_features * layer.in_features for layer in layers):,}",
            *[f"{min(sigmas):.4g} to {max(sigmas):.4g}" if sigmas else "–"] * measured,
        )
    if not measured:
        table.caption, table.caption_justify = "--layers lists σ₁ too", "left"
    if found.manifest is None and shown:
        what_next = f"`specdef attack {found.model.name} --control BASE` undoes it and says what it is worth."
        return Group(headline, table, "", *shown, what_next)
    if found.outlook is not None:
        return Group(headline, table, "", *outlook_lines(found.outlook))
    return Group(headline, table, "", *_hardened_lines(found))


def _hardened_lines(found: Survey) -> Iterable[str]:
    manifest = found.manifest
    assert manifest is not None
    changed = (
        (len(manifest.folded), "symmetric pairs were rescaled"),
        (len(manifest.factored), "layers were replaced"),
        (len(manifest.scaled), "modules were scaled"),
    )
    parts = [f"{count} {what}" for count, what in changed if count]
    if manifest.parameters_added:
        parts[-1] += f", which added {manifest.parameters_added:,} parameters"
    yield f"Hardened by specdef-cli {manifest.specdef_version} from {manifest.base.name}: {'; '.join(parts)}."
    yield f"`specdef attack {found.model.name}` says what it is worth; `specdef collapse` undoes it."


def layers_table(found: Survey) -> Table:
    """Every linear layer; those that the paper's construction takes by default are marked."""
    headings = ("", "shape", "dtype", "σ₁", "effective rank", "α", "m² of a compensation")
    marks = "•: writes to the residual stream; the paper hardens these"
    table = table_of("layer", *headings, caption=marks, caption_justify="left")
    for layer in found.layers:
        table.add_row(
            layer.module,
            "•" if layer.default else "",
            f"{layer.out_features}×{layer.in_features}",
            layer.dtype,
            "–" if layer.sigma is None else f"{layer.sigma:.4g}",
            "–" if layer.effective_rank is None else f"{layer.effective_rank:.1f}",
            "" if layer.alpha is None else f"{layer.alpha:g}",
            f"{layer.parameters_added:,}",
        )
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
        yield f"Recommended: {recommendation(outlook, outlook.recommended)}"
    else:
        found = outlook.methods[0]
        assert isinstance(found, Obstacle)
        way = "harden it with --dtype bfloat16" if "--dtype bfloat16" in found.hint else "leave it as it is"
        yield f"Recommended: {way}; {found.problem}. {found.hint}"
    yield (
        "Harden if a hurdle for ordinary recipes is worth something to you. Attackers who know about the change undo "
        "it in one pass over the weights; `specdef attack` shows which recipes get through without knowing."
    )


def summary_lines(summary: PlanSummary) -> Iterator[RenderableType]:
    """One plan: what it changes, what it leaves, what it costs."""
    changes = (
        (summary.pairs, "symmetric pairs rescaled"),
        (summary.modules, "modules scaled, with vectors beside them that undo it"),
        (summary.layers, "layers, each replaced by two factors"),
    )
    yield f"{summary.method}: {', '.join(f'{count} {what}' for count, what in changes if count)}"
    names = ", ".join(f"{name} ×{count}" for name, count in summary.changed.items())
    lines = [
        f"changes tensors with {_share(summary.parameters_changed, summary.parameters)} of the parameters: {names}"
    ]
    left = [f"{name} ({_share(count, summary.parameters)})" for name, count in summary.left.items()]
    more = [f"{len(left) - MAX_NAMES} more"] if len(left) > MAX_NAMES else []
    if left:
        lines.append(f"leaves alone, to train as before: {', '.join(left[:MAX_NAMES] + more)}")
    lines.append(f"does not survive: {', '.join(summary.lost)}")
    added = "no parameters added"
    if summary.parameters_added:
        grown = summary.bytes_after - summary.bytes_before
        share = summary.parameters_added / summary.parameters
        added = f"{summary.parameters_added:,} parameters added ({share:+.1%}, {decimal(grown)})"
    lines.append(
        f"costs: {added}; {decimal(summary.bytes_after)} to write, in about the time that copying takes; "
        f"{decimal(summary.bytes_before + summary.bytes_after)} of memory to compare the outputs"
    )
    for line in lines:
        yield Padding(line, (0, 0, 0, 2), expand=False)


def recommendation(outlook: Outlook, summary: PlanSummary) -> str:
    """Why a plan is the one to take."""
    found = outlook.methods[0]
    weak = getattr(found, "weak", False)
    why = "no norm inside the blocks can be folded" if weak else "no symmetric pair is known for this architecture"
    code = "needs code to load: trust_remote_code=True, or `import specdef_cli`"
    reasons = {
        "fold": "fold (the default). The outputs stay bit-identical, and anything that loads the architecture loads "
        "the result, in float32 and bfloat16.",
        "scale": f"scale, as {why}. The outputs stay bit-identical; the result {code}.",
        "factors": f"factors. The result {code}.",
    }
    if weak and summary.method == "scale":
        return reasons["scale"] + " Without code, the fold slows recipes less."
    reached = summary.parameters_changed / summary.parameters
    caution = f" It reaches tensors with only {reached:.0%} of the parameters." if reached < FEW else ""
    return reasons[summary.method] + caution


def _share(count: int, whole: int) -> str:
    share = count / whole
    return "under 0.1 %" if 0 < share < 0.001 else f"{100 * share:.3g} %"
