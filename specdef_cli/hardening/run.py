"""``specdef harden`` (open → plan → stream → verify → publish) and ``specdef collapse``, its way back.

Collapsing is the publisher's own way back, and the attacker's: it costs one pass over the weights. Powers of two come
back bit for bit; factors come back up to the rounding of what is stored.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef_cli import __version__
from specdef_cli.checkpoint.changes import FactoredLayer
from specdef_cli.checkpoint.files import write_durably, write_json
from specdef_cli.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, BaseCheckpoint, Manifest
from specdef_cli.checkpoint.output import require_manifest_place
from specdef_cli.checkpoint.reader import Checkpoint, carry_over
from specdef_cli.checkpoint.resolve import Resolved, remember_base
from specdef_cli.checkpoint.shards import TensorGroup, plain_group
from specdef_cli.checkpoint.stream import Progress, changed_files
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.card import collapsed_card, hardened_card, read_card
from specdef_cli.hardening.execute import Written, compute_devices, published
from specdef_cli.hardening.factors import CollapseLayer
from specdef_cli.hardening.fold import fold_groups, inverse
from specdef_cli.hardening.options import CollapseOptions, HardenOptions
from specdef_cli.hardening.plan import HardeningPlan, make_plan
from specdef_cli.hardening.recognise import recognise
from specdef_cli.hardening.scale import unscaled_group
from specdef_cli.hardening.survey import PlanSummary, summarize
from specdef_cli.hardening.verify import Loader, is_loadable_here, rehearse, verify
from specdef_cli.model.described import SHIM_SOURCE, unshim_config
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import OpenedModel, open_model, require_attention

OnPlan = Callable[[HardeningPlan], None]
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class HardenResult:
    """What :func:`harden` published."""

    out: Path
    manifest: Manifest
    parameters_added: int
    bytes_added: int
    notes: tuple[str, ...]


def _planned(options: HardenOptions, output: Path | None = None) -> tuple[OpenedModel, HardeningPlan, Loader | None]:
    """Open the base, decide what to change, and load the result without its numbers."""
    with process_state(options.device).main_process_first():  # one downloads, and the others find it in the cache
        base = open_model(options, hardened=False, output=output)
    require_attention(base.skeleton)
    plan = make_plan(base, options)
    return base, plan, rehearse(base, plan.config, plan.groups)


def preview(
    options: HardenOptions, on_plan: OnPlan = lambda _: None, on_progress: OnProgress = lambda _: None
) -> PlanSummary:
    """Say what :func:`harden` would do: all is computed and compared in memory, and nothing is written."""
    base, plan, make = _planned(options)
    checkpoint = base.checkpoint
    on_plan(plan)
    device = compute_devices(options.device, process_state(options.device))[0]
    make = make if options.verify and is_loadable_here(2 * plan.nbytes) else None
    tensors: dict[str, Tensor] = {}
    for group in plan.groups:
        made = dict(group.transform(checkpoint, device).tensors) if group.transform is not None else {}
        for name, rows in group.streamed.items():
            if make is not None:
                made[name] = rows.whole(checkpoint)
            elif rows.slices:  # what cannot be scaled is refused
                deque(rows.blocks(checkpoint), maxlen=0)
        tensors |= {} if make is None else made
        on_progress(Progress(group.label, group.nbytes))
    if make is not None:

        def load(dtype: torch.dtype | None, device: str | None) -> Any:
            return make(state_dict=tensors, dtype=dtype or "auto", device_map={"": device or "cpu"})

        verify(base, load, plan.nbytes, options)
    return summarize(plan, checkpoint)


def harden(
    options: HardenOptions, on_plan: OnPlan = lambda _: None, on_progress: OnProgress = lambda _: None
) -> HardenResult | None:
    """Harden a checkpoint and publish the result as ``options.out``.

    Args:
        on_plan: Called with the plan before anything is written.
        on_progress: Called from worker threads after each group of tensors.

    Returns:
        What was published; ``None`` in all but the main process of a distributed run.
    """
    if options.manifest_out is not None:
        require_manifest_place(options.manifest_out, options.out, options.model)
    base, plan, _ = _planned(options, options.out)
    checkpoint = base.checkpoint
    on_plan(plan)
    with published(base, plan.groups, options, on_progress) as written:
        if written is None:
            return None
        work = written.work
        carry_over(checkpoint.directory, work, checkpoint.companions.carried)
        write_json(work / "config.json", plan.config)
        if plan.replaced and checkpoint.library.is_transformers:
            shutil.copyfile(SHIM_SOURCE, work / SHIM_SOURCE.name)
        manifest = _manifest(base.found, plan, options, written)
        write_durably(work / MANIFEST_NAME, manifest.to_json())
        hardened = base.beside(work)
        if checkpoint.library.is_transformers:
            hardened.load_without_weights()
        manifest = replace(manifest, verification=verify(base, hardened.load, plan.nbytes, options))
        write_durably(work / MANIFEST_NAME, manifest.to_json())
        card = read_card(checkpoint.directory / "README.md")
        card = hardened_card(card, manifest, plan.unchanged, plan.one_sided, checkpoint.library)
        write_durably(work / "README.md", card)
    if base.found.commit is None:
        remember_base(manifest, base.directory)
    if options.manifest_out is not None:
        _move_manifest(options.out, options.manifest_out)
    return HardenResult(options.out, manifest, plan.parameters_added, plan.nbytes - checkpoint.nbytes, plan.notes)


def _manifest(found: Resolved, plan: HardeningPlan, options: HardenOptions, written: Written) -> Manifest:
    def computed(layer: FactoredLayer) -> FactoredLayer:
        figures = written.figures[layer.module]
        values = tuple(figures["singular_values"])
        return replace(layer, singular_values=values, reconstruction_error=figures["reconstruction_error"])

    name = found.name.encode(errors="replace").decode()  # a path need not be UTF-8; JSON is
    return Manifest(
        format=FORMAT_VERSION,
        specdef_version=__version__,
        method=plan.method,
        base=BaseCheckpoint(name, found.revision, found.commit, options.base_model, found.subfolder),
        dtype=plan.dtype,
        seed=plan.seed,
        profile=plan.profile,
        folded=plan.folded,
        scaled=plan.scaled,
        factored=tuple(map(computed, plan.factored)),
        shards=dict(written.sha256),
    ).published()


def _move_manifest(directory: Path, path: Path) -> None:
    """Move the manifest out of a hardened directory, which it leaves once it is whole in the other place."""
    own = directory / MANIFEST_NAME
    try:
        write_durably(path, own.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecDefError(
            f"{path} cannot be written: {error.strerror or error}",
            f"{directory} is complete and holds {MANIFEST_NAME}; move that before you publish.",
        ) from error
    own.unlink()


@dataclass(frozen=True)
class CollapseResult:
    """What :func:`collapse` published."""

    out: Path
    manifest: Manifest
    parameters_removed: int
    notes: tuple[str, ...] = ()


def collapse(
    options: CollapseOptions,
    on_plan: Callable[[Sequence[TensorGroup]], None] = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> CollapseResult | None:
    """Undo a hardening and publish the result as ``options.out``.

    Returns:
        What was published; ``None`` in all but the main process of a distributed run.
    """
    with process_state(options.device).main_process_first():
        model = open_model(options, hardened=True)
    manifest, checkpoint = model.hardening, model.checkpoint
    groups = collapse_groups(checkpoint, manifest)
    on_plan(groups)
    with published(model, groups, options, on_progress) as written:
        if written is None:
            return None
        carry_over(checkpoint.directory, written.work, checkpoint.companions.carried)
        (written.work / SHIM_SOURCE.name).unlink(missing_ok=True)
        write_json(written.work / "config.json", unshim_config(checkpoint.config))
        card = checkpoint.directory / "README.md"
        if card.is_file():
            write_durably(written.work / "README.md", collapsed_card(read_card(card), manifest))
        note = _undone(model, written.work)
    notes = tuple(filter(None, [note, checkpoint.companions.note()]))
    return CollapseResult(options.out, manifest, manifest.parameters_added, notes)


def _undone(model: OpenedModel, work: Path) -> str | None:
    """What to say where the weights are not those that the manifest was written of; a fold that is left is refused."""
    changed = changed_files(model.directory, model.hardening.shards)
    if not changed:
        return None
    left = recognise(model.beside(work).checkpoint, model.skeleton)
    if model.hardening.folded and left.folded:
        raise SpecDefError(
            f"{changed[0]} is not the file that {MANIFEST_NAME} was written of, and what that undoes leaves a fold: "
            f"{len(left.folded)} symmetric pairs have channels scaled by up to 2^{left.octaves}",
            f"Give the {MANIFEST_NAME} that belongs to these weights.",
        )
    return f"{changed[0]} is not the file that {MANIFEST_NAME} was written of. Compare the result with the base."


def collapse_groups(checkpoint: Checkpoint, manifest: Manifest) -> tuple[TensorGroup, ...]:
    """The tensors of the original architecture."""
    tensors = checkpoint.tensors
    undone = fold_groups((inverse(pair) for pair in manifest.folded), checkpoint, None)
    for layer in manifest.factored:
        undone[layer.inflated_tensor] = CollapseLayer(layer, tensors[layer.inflated_tensor].dtype).group()
    for module in manifest.scaled:
        if module.tied_to is None:
            undone[module.inflated_tensor] = unscaled_group(module, tensors[module.inflated_tensor].dtype)
    consumed = {name for layer in manifest.replaced for name in layer.stored}
    return tuple(
        undone[name] if name in undone else plain_group(header, None)
        for name, header in tensors.items()
        if name in undone or name not in consumed
    )
