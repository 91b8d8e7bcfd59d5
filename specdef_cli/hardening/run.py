"""``specdef harden``: resolve → plan → stream → verify → publish."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef_cli import __version__
from specdef_cli.checkpoint.files import write_durably, write_json
from specdef_cli.checkpoint.headers import TORCH_DTYPES
from specdef_cli.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, BaseCheckpoint, FactoredLayer, Manifest
from specdef_cli.checkpoint.output import require_manifest_place
from specdef_cli.checkpoint.reader import Checkpoint, carry_over
from specdef_cli.checkpoint.resolve import Resolved, remember_base
from specdef_cli.checkpoint.shards import Produced, TensorGroup, TensorSpec
from specdef_cli.checkpoint.stream import Progress
from specdef_cli.dtypes import DTYPES
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.card import collapsed_card, hardened_card, read_card
from specdef_cli.hardening.execute import Written, compute_devices, published
from specdef_cli.hardening.fold import fold_groups, inverse
from specdef_cli.hardening.options import CollapseOptions, Factors, HardenOptions
from specdef_cli.hardening.plan import HardeningPlan, make_plan, plain_group
from specdef_cli.hardening.scale import unscaled_group
from specdef_cli.hardening.survey import PlanSummary, summarize
from specdef_cli.hardening.verify import Loader, is_loadable_here, rehearse, verify
from specdef_cli.model.described import SHIM_SOURCE, unshim_config
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import OpenedModel, open_model, require_attention


@dataclass(frozen=True)
class HardenResult:
    """What :func:`harden` published."""

    out: Path
    manifest: Manifest
    parameters_added: int
    bytes_added: int
    notes: tuple[str, ...]


def _planned(options: HardenOptions, output: Path | None = None) -> tuple[OpenedModel, HardeningPlan, Any]:
    """Open the base, decide what to change, and load the result without its numbers."""
    with process_state(options.device).main_process_first():  # one downloads, and the others find it in the cache
        base = open_model(options, hardened=False, output=output)
    require_attention(base.skeleton)
    plan = make_plan(base, options)
    return base, plan, rehearse(base, plan.config, plan.groups)


def preview(
    options: HardenOptions,
    on_plan: Callable[[HardeningPlan], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> PlanSummary:
    """Say what :func:`harden` would do: all is computed and compared in memory, and nothing is written."""
    base, plan, empty = _planned(options)
    checkpoint = base.checkpoint
    on_plan(plan)
    device = compute_devices(options.device, process_state(options.device))[0]
    fits = options.verify and checkpoint.library.is_transformers and is_loadable_here(2 * plan.nbytes)
    tensors: dict[str, Tensor] = {}
    for group in plan.groups:
        made = dict(group.transform(checkpoint, device).tensors) if group.transform is not None else {}
        for name, rows in group.streamed.items():
            if fits:
                made[name] = rows.whole(checkpoint)
            elif rows.slices:  # what cannot be scaled is refused
                deque(rows.blocks(checkpoint), maxlen=0)
        tensors |= made if fits else {}
        on_progress(Progress(group.label, group.nbytes))
    if fits:

        def load(dtype: torch.dtype | None, device: str | None) -> Any:
            place = {"dtype": dtype or "auto", "device_map": {"": device or "cpu"}}
            return type(empty).from_pretrained(None, config=empty.config, state_dict=tensors, **place)

        _verification(base, plan, options, load)
    return summarize(plan, checkpoint)


def harden(
    options: HardenOptions,
    on_plan: Callable[[HardeningPlan], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> HardenResult | None:
    """Harden a checkpoint and publish the result as ``options.out``.

    Args:
        options: What to do.
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
    with published(
        checkpoint,
        plan.groups,
        options.out,
        plan.fingerprint(checkpoint, base.found.commit),
        max_shard_size=options.max_shard_size,
        device=options.device,
        resume=options.resume,
        on_progress=on_progress,
    ) as written:
        if written is None:
            return None
        manifest = _manifest(base.found, plan, options, written)
        _make_loadable(checkpoint, plan, manifest, written.work)
        hardened = base.beside(written.work)
        if checkpoint.library.is_transformers:
            hardened.load_without_weights()
        manifest = dataclasses.replace(manifest, verification=_verification(base, plan, options, hardened.load))
        _describe(checkpoint, plan, manifest, written.work)
    if base.found.commit is None:
        remember_base(manifest, base.directory)
    if options.manifest_out is not None:
        _move_manifest(options.out, options.manifest_out)
    return HardenResult(options.out, manifest, plan.parameters_added, plan.nbytes - checkpoint.nbytes, plan.notes)


def _manifest(resolved: Resolved, plan: HardeningPlan, options: HardenOptions, written: Written) -> Manifest:
    factored: list[FactoredLayer] = []
    for layer in plan.factored:
        figures = written.figures[layer.site.module]
        factored.append(layer.entry(tuple(figures["singular_values"]), figures["reconstruction_error"]))
    return Manifest(
        format=FORMAT_VERSION,
        specdef_version=__version__,
        method=plan.method,
        # A path need not be UTF-8; JSON is.
        base=BaseCheckpoint(
            resolved.name.encode(errors="replace").decode(),
            resolved.revision,
            resolved.commit,
            options.base_model,
            resolved.subfolder,
        ),
        dtype=plan.dtype,
        seed=options.construction.seed if isinstance(options.construction, Factors) else 0,
        profile=plan.profile,
        folded=plan.folded,
        scaled=plan.scaled,
        factored=tuple(factored),
        shards=dict(written.sha256),
    ).published()


def _move_manifest(directory: Path, path: Path) -> None:
    """Move the manifest out of a hardened directory, which it leaves once it is whole in the other place."""
    own = directory / MANIFEST_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, own.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecDefError(
            f"{path} cannot be written: {error.strerror or error}",
            f"{directory} is complete and holds {MANIFEST_NAME}; move that before you publish.",
        ) from error
    own.unlink()


def _make_loadable(checkpoint: Checkpoint, plan: HardeningPlan, manifest: Manifest, work: Path) -> None:
    """Add what a loader needs beside the weights: companions, ``config.json``, code, and the manifest."""
    carry_over(checkpoint.directory, work, checkpoint.companions.carried)
    write_json(work / "config.json", plan.config)
    if (plan.factored or plan.scaled) and checkpoint.library.is_transformers:
        shutil.copyfile(SHIM_SOURCE, work / SHIM_SOURCE.name)
    write_durably(work / MANIFEST_NAME, manifest.to_json())


def _verification(base: OpenedModel, plan: HardeningPlan, options: HardenOptions, hardened: Loader) -> dict[str, Any]:
    """Figures of the comparison with the base, or why there are none."""
    if not options.verify:
        return {"skipped": "verification was switched off"}
    return verify(
        base,
        hardened,
        max(plan.nbytes, base.checkpoint.nbytes),
        method=plan.method,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        device=options.device,
    )


def _describe(checkpoint: Checkpoint, plan: HardeningPlan, manifest: Manifest, work: Path) -> None:
    """Write the manifest with its verification, and the model card."""
    write_durably(work / MANIFEST_NAME, manifest.to_json())
    text = read_card(checkpoint.directory / "README.md")
    write_durably(work / "README.md", hardened_card(text, manifest, plan.unchanged, plan.one_sided, checkpoint.library))


@dataclass(frozen=True)
class CollapseLayer:
    """The transform that multiplies a pair of factors back into one weight."""

    layer: FactoredLayer
    dtype: str

    def group(self) -> TensorGroup:
        """What the layer becomes on disk."""
        layer = self.layer
        shape = (layer.out_features, layer.in_features)
        outputs = [TensorSpec(layer.tensor, self.dtype, shape[::-1] if layer.transposed else shape)]
        if layer.bias is not None:
            outputs.append(TensorSpec(layer.bias, self.dtype, (layer.out_features,)))
        return TensorGroup(layer.module, tuple(outputs), self)

    def __call__(self, checkpoint: Checkpoint, device: torch.device) -> Produced:
        """Compute W = C·W~, in float64: C W~ cancels a factor of α, and float32 would lose that many digits."""
        layer, stored = self.layer, TORCH_DTYPES[self.dtype]
        compensation = checkpoint.read(layer.compensation_tensor).to(device).double()
        weight = compensation @ checkpoint.read(layer.inflated_tensor).to(device).double()
        tensors = {layer.tensor: (weight.mT.contiguous() if layer.transposed else weight).to(stored)}
        if layer.bias is not None and layer.compensation_bias is not None:
            tensors[layer.bias] = checkpoint.read(layer.compensation_bias)
        return Produced(tensors)


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
    on_progress: Callable[[Progress], None] = lambda _: None,
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

    fingerprint = hashlib.sha256(f"collapse {manifest.to_json()} {options.max_shard_size}".encode()).hexdigest()
    with published(
        checkpoint,
        groups,
        options.out,
        fingerprint,
        max_shard_size=options.max_shard_size,
        device=options.device,
        resume=options.resume,
        on_progress=on_progress,
    ) as written:
        if written is None:
            return None
        _complete(checkpoint, manifest, written.work)
    notes = tuple(filter(None, [checkpoint.companions.note()]))
    return CollapseResult(options.out, manifest, manifest.parameters_added, notes)


def _complete(checkpoint: Checkpoint, manifest: Manifest, work: Path) -> None:
    """Add what belongs to the collapsed model beside its weights."""
    carry_over(checkpoint.directory, work, checkpoint.companions.carried)
    (work / SHIM_SOURCE.name).unlink(missing_ok=True)
    write_json(work / "config.json", unshim_config(checkpoint.config))
    card = checkpoint.directory / "README.md"
    if card.is_file():
        write_durably(work / "README.md", collapsed_card(read_card(card), manifest))


def collapse_groups(checkpoint: Checkpoint, manifest: Manifest) -> tuple[TensorGroup, ...]:
    """The tensors of the original architecture."""
    undone = fold_groups((inverse(pair) for pair in manifest.folded), checkpoint, None)
    by_inflated = {layer.inflated_tensor: layer for layer in manifest.factored}
    consumed = {
        name
        for layer in manifest.factored
        for name in (layer.compensation_tensor, layer.compensation_bias, layer.tensor)
    }
    by_scaled = {module.inflated_tensor: module for module in manifest.scaled if module.tied_to is None}
    for module in manifest.scaled:
        consumed |= {*module.scales, module.tombstone, module.inflated_bias}
    groups = []
    for name, header in checkpoint.tensors.items():
        if name in by_inflated:
            groups.append(CollapseLayer(by_inflated[name], header.dtype).group())
        elif name in by_scaled:
            groups.append(unscaled_group(by_scaled[name], header.dtype))
        elif name in undone:
            groups.append(undone[name])
        elif name not in consumed:
            groups.append(plain_group(name, header.dtype, header.shape, None))
    return tuple(groups)
