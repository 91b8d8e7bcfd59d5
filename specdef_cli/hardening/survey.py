"""``specdef inspect``: the linear layers of a checkpoint, their spectra, and whether they are hardened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdef_cli.architectures.linears import linear_sites
from specdef_cli.architectures.names import match_names, meta_model
from specdef_cli.checkpoint.arriving import DownloadHook, resolving
from specdef_cli.checkpoint.headers import FLOATING_DTYPES
from specdef_cli.checkpoint.manifest import Manifest, is_hardened, read_manifest
from specdef_cli.checkpoint.reader import Checkpoint, open_checkpoint
from specdef_cli.checkpoint.resolve import Resolved
from specdef_cli.checkpoint.stream import Progress
from specdef_cli.hardening.collapse import require_as_described
from specdef_cli.hardening.devices import compute_devices
from specdef_cli.hardening.insert import read_weight
from specdef_cli.hardening.outlook import Outlook, outlook
from specdef_cli.hardening.plan import RESIDUAL_WRITERS, native_config, require_complete
from specdef_cli.hardening.recognise import Recognised, recognise
from specdef_cli.runtime.processes import process_state
from specdef_cli.runtime.shim import ScaledSpec, shim_layers, unshim_config
from specdef_cli.spectral.subspace import layer_seed, top_subspace

EFFECTIVE_RANK_PROBES = 64


@dataclass(frozen=True)
class LayerSurvey:
    """One linear layer.

    Attributes:
        module: Path in the transformers model.
        tensor: Name on disk.
        out_features, in_features: m and n.
        dtype: As stored.
        role: What it writes to.
        sigma: σ₁ of the weight as stored (of the inflated factor, if hardened); ``None`` for a quantized weight, and
            where no spectra were asked for.
        effective_rank: (Σσ²)²/Σσ⁴, estimated; ``None`` likewise.
        alpha: α if the layer is hardened by insert, else ``None``.
        default: Whether ``harden --method insert`` takes it without ``--layers``.
    """

    module: str
    tensor: str
    out_features: int
    in_features: int
    dtype: str
    role: str
    sigma: float | None
    effective_rank: float | None
    alpha: float | None
    default: bool

    @property
    def compensation_parameters(self) -> int:
        """Parameters that hardening this layer by insert adds (or added)."""
        return self.out_features**2


@dataclass(frozen=True)
class Survey:
    """What :func:`survey` found.

    Attributes:
        model: Where the model came from.
        architecture: The model's class.
        parameters: Number of stored elements.
        nbytes: Size of all tensors.
        manifest: If it is hardened.
        layers: Its linear layers.
        outlook: What hardening would do; ``None`` if it is hardened.
        recognised: What the weights show of hardening; ``None`` where they would have to be downloaded to see.
    """

    model: Resolved
    architecture: str
    parameters: int
    nbytes: int
    manifest: Manifest | None
    layers: tuple[LayerSurvey, ...]
    outlook: Outlook | None
    recognised: Recognised | None


def survey(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    spectra: bool = True,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_download: DownloadHook | None = None,
) -> Survey:
    """Look at every linear layer of a checkpoint, one tensor in memory at a time, and at what hardening would do.

    Args:
        model, revision, token: As for :func:`specdef_cli.checkpoint.resolve.resolve`.
        device: Where spectra are computed.
        trust_remote_code: Whether the model's own Python code may run.
        spectra: Whether every layer is read, for its σ₁ and effective rank. Without them headers and a sample are read.
        on_progress: Called after each layer.
        on_download: As for :func:`specdef_cli.harden`.

    Raises:
        SpecDefError: The model cannot be found or read.
    """
    with resolving(model, revision=revision, token=token, on_download=on_download) as (resolved, arriving):
        checkpoint = open_checkpoint(resolved.directory, arriving)
        return _survey(resolved, checkpoint, device, trust_remote_code, spectra, on_progress)


def _survey(
    resolved: Resolved,
    checkpoint: Checkpoint,
    device: str | None,
    trust_remote_code: bool,
    spectra: bool,
    on_progress: Callable[[Progress], None],
) -> Survey:
    manifest = read_manifest(resolved.directory) if is_hardened(resolved.directory) else None
    if manifest is not None:
        require_as_described(checkpoint, manifest)
    original = as_original(checkpoint, manifest)
    native = native_config(original, trust_remote_code=trust_remote_code)
    shapes = {name: header.shape for name, header in original.tensors.items()}
    skeleton = meta_model(native, trust_remote_code=trust_remote_code)
    if "quantization_config" not in original.config:  # packed weights have shapes of their own
        require_complete(skeleton, match_names(skeleton, shapes), shapes)
    inserted = {layer.tensor: layer for layer in manifest.inserted} if manifest else {}
    # A model with inserted layers and without a manifest still says in config.json which layers they are.
    factors = {f"{module}.weight": f"{module}.inflated.weight" for module in shim_layers(checkpoint.config)}
    factors |= {tensor: layer.inflated_tensor for tensor, layer in inserted.items()}
    factors |= {module.tensor: module.inflated_tensor for module in manifest.scaled} if manifest else {}
    place = compute_devices(device, process_state(device))[0]
    layers = []
    for site in linear_sites(native, shapes, model=skeleton, trust_remote_code=trust_remote_code):
        replaced = inserted.get(site.tensor)
        header = checkpoint.tensors[factors.get(site.tensor, site.tensor)]
        sigma = rank = None
        if spectra and header.dtype in FLOATING_DTYPES:
            seed = layer_seed(0, site.tensor)
            if site.tensor in factors:
                weight = checkpoint.read(header.name).to(place).float()
            else:
                weight = read_weight(checkpoint, site, place)
            sigma = float(top_subspace(weight, 1, seed).singular_values[0])
            rank = effective_rank(weight, seed)
        on_progress(Progress(site.module, header.nbytes))
        layers.append(
            LayerSurvey(
                module=site.module,
                tensor=site.tensor,
                out_features=site.out_features,
                in_features=site.in_features,
                dtype=header.dtype,
                role=site.role,
                sigma=sigma,
                effective_rank=rank,
                alpha=replaced.alpha if replaced else None,
                default=site.role in RESIDUAL_WRITERS,
            )
        )
    recognised = None
    if checkpoint.arriving is None or spectra:
        recognised = recognise(checkpoint, native, trust_remote_code=trust_remote_code)
    return Survey(
        model=resolved,
        architecture=type(skeleton).__name__,
        parameters=sum(torch.Size(header.shape).numel() for header in checkpoint.tensors.values()),
        nbytes=checkpoint.nbytes,
        manifest=manifest,
        layers=tuple(layers),
        outlook=None if manifest or factors else outlook(checkpoint, trust_remote_code=trust_remote_code),
        recognised=recognised,
    )


def as_original(checkpoint: Checkpoint, manifest: Manifest | None) -> Checkpoint:
    """The checkpoint as its original architecture describes it: native config, tombstones with the weights' shapes."""
    tensors = dict(checkpoint.tensors)
    if manifest is None:
        for module, spec in shim_layers(checkpoint.config).items():
            if f"{module}.weight" in tensors:
                shape = spec.weight if isinstance(spec, ScaledSpec) else (spec.out_features, spec.in_features)
                tensors[f"{module}.weight"] = replace(tensors[f"{module}.weight"], shape=shape)
        return replace(checkpoint, config=unshim_config(checkpoint.config), tensors=tensors)
    for layer in manifest.inserted:
        shape = (layer.out_features, layer.in_features)
        tombstone = tensors[layer.tensor]
        tensors[layer.tensor] = type(tombstone)(
            **{**vars(tombstone), "shape": shape[::-1] if layer.transposed else shape}
        )
        if layer.bias is not None and layer.compensation_bias is not None:
            tensors[layer.bias] = tensors[layer.compensation_bias]
    for scaled in manifest.scaled:
        if scaled.tied_to is None:
            tensors[scaled.tensor] = replace(tensors[scaled.inflated_tensor], name=scaled.inflated_tensor)
        else:
            tensors.pop(scaled.tombstone, None)
        if scaled.bias is not None and scaled.inflated_bias is not None:
            tensors[scaled.bias] = tensors[scaled.inflated_bias]
    return replace(checkpoint, config=unshim_config(checkpoint.config), tensors=tensors)


def effective_rank(weight: Tensor, seed: int) -> float:
    """(Σσ²)²/Σσ⁴, the participation ratio of the squared singular values, between 1 and the rank.

    Σσ⁴ = ‖W Wᵀ‖_F² is estimated with Gaussian probes (Hutchinson), so that no decomposition is needed; where the
    matrix is no larger than the probes it is exact.

    Args:
        weight: W, shape [m, n].
        seed: Seed of the probes.
    """
    total = weight.double().square().sum()
    rows = weight.shape[0]
    if min(weight.shape) <= EFFECTIVE_RANK_PROBES * 4:
        gram = weight.double() @ weight.double().mT if rows <= weight.shape[1] else weight.double().mT @ weight.double()
        return float(total**2 / gram.square().sum())
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(rows, EFFECTIVE_RANK_PROBES, generator=generator).to(weight.device, weight.dtype)
    fourth = (weight @ (weight.mT @ probes)).double().square().sum() / EFFECTIVE_RANK_PROBES
    return float(total**2 / fourth)
