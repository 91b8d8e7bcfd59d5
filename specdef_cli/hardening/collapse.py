"""``specdef collapse``: back to the original architecture, from the manifest.

This is the publisher's own way back, and the attacker's: multiplying C·W~ costs one pass over the weights. A folded
checkpoint comes back bit for bit, because its factors are powers of two; factors come back up to the
rounding of the stored factors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from specdef_cli.checkpoint.companions import carry_over
from specdef_cli.checkpoint.durable import write_durably
from specdef_cli.checkpoint.front_matter import read_card
from specdef_cli.checkpoint.headers import TORCH_DTYPES
from specdef_cli.checkpoint.manifest import FactoredLayer, Manifest
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.shards import Produced, TensorGroup, TensorSpec
from specdef_cli.checkpoint.stream import Progress
from specdef_cli.hardening.card import collapsed_card
from specdef_cli.hardening.execute import published, write_json
from specdef_cli.hardening.fold import fold_groups, inverse
from specdef_cli.hardening.options import CollapseOptions
from specdef_cli.hardening.plan import plain_group
from specdef_cli.hardening.scale import unscaled_group
from specdef_cli.model.described import SHIM_SOURCE, unshim_config
from specdef_cli.model.loading import process_state
from specdef_cli.model.opened import open_model


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
        model = open_model(
            options.model, hardened=True, manifest=options.manifest, revision=options.revision, token=options.token
        )
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
