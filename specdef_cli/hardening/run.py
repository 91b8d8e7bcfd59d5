"""``specdef harden``: resolve → plan → stream → verify → publish."""

from __future__ import annotations

import dataclasses
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef_cli import __version__
from specdef_cli.checkpoint.check import require_manifest_place
from specdef_cli.checkpoint.companions import carry_over
from specdef_cli.checkpoint.durable import write_durably
from specdef_cli.checkpoint.front_matter import read_card
from specdef_cli.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    BaseCheckpoint,
    FactoredLayer,
    Manifest,
    remember_base,
)
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.resolve import Resolved, resolve
from specdef_cli.checkpoint.stream import Progress
from specdef_cli.dtypes import DTYPES
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.card import hardened_card
from specdef_cli.hardening.devices import compute_devices
from specdef_cli.hardening.execute import Written, published, write_json
from specdef_cli.hardening.options import Factors, HardenOptions
from specdef_cli.hardening.outlook import PlanSummary, summarize
from specdef_cli.hardening.plan import HardeningPlan, make_plan
from specdef_cli.hardening.rehearsal import load_empty, rehearse
from specdef_cli.hardening.verify import Loader, is_loadable_here, verify
from specdef_cli.model.described import SHIM_SOURCE
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import OpenedModel, open_found, require_attention


@dataclass(frozen=True)
class HardenResult:
    """What :func:`harden` published."""

    out: Path
    manifest: Manifest
    parameters_added: int
    bytes_added: int
    notes: tuple[str, ...]


def _planned(options: HardenOptions, output: Path | None = None) -> tuple[OpenedModel, HardeningPlan]:
    """Open the base, decide what to change, and load the result without its numbers."""
    with process_state(options.device).main_process_first():  # one downloads, and the others find it in the cache
        found = resolve(
            options.model,
            revision=options.revision,
            token=options.token,
            subfolder=options.subfolder,
            output=output,
        )
    base = open_found(found, hardened=False, trust_remote_code=options.trust_remote_code)
    require_attention(base.skeleton)
    plan = make_plan(base, options)
    rehearse(base, plan)
    return base, plan


def preview(
    options: HardenOptions,
    on_plan: Callable[[HardeningPlan], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> PlanSummary:
    """Say what :func:`harden` would do: all is computed and compared in memory, and nothing is written."""
    base, plan = _planned(options)
    checkpoint = base.checkpoint
    on_plan(plan)
    device = compute_devices(options.device, process_state(options.device))[0]
    fits = options.verify and checkpoint.library.loads_without_weights and is_loadable_here(2 * plan.nbytes)
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
        empty = load_empty(base, plan)

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
    base, plan = _planned(options, options.out)
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
        work = Resolved(written.work, str(written.work))
        hardened = open_found(work, hardened=True, trust_remote_code=options.trust_remote_code)
        if checkpoint.library.loads_without_weights:
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
    if (plan.factored or plan.scaled) and checkpoint.library.runs_code:
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
