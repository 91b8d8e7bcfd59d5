"""What hardening will change and what it will cost, decided from config.json and the shards' headers alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdef_cli.architectures.linears import LinearSite
from specdef_cli.architectures.scalable import ScalableSite
from specdef_cli.architectures.skeleton import Skeleton
from specdef_cli.checkpoint.headers import FLOATING_DTYPES, SAFETENSORS_DTYPES, TORCH_DTYPES
from specdef_cli.checkpoint.manifest import FoldedPair, Method, Profile, ScaledModule, Schedule, added_parameters
from specdef_cli.checkpoint.other_directories import require_modules
from specdef_cli.checkpoint.reader import Checkpoint
from specdef_cli.checkpoint.shards import Produced, TensorGroup, TensorSpec
from specdef_cli.dtypes import DTYPES, dtype_name
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.choice import DEFAULT_ALPHA, Choice, choose, folds_alone, loaded_dtype, pairs_are
from specdef_cli.hardening.fold import fold_groups
from specdef_cli.hardening.insert import InsertLayer
from specdef_cli.hardening.lost_formats import SCALED_LOADERS, lost_formats, serving_advice
from specdef_cli.hardening.options import HardenOptions
from specdef_cli.hardening.scale import scaled_groups, scaled_spec
from specdef_cli.hardening.soundness import require_code_allows, require_whole
from specdef_cli.hardening.verify import require_comparable
from specdef_cli.runtime.shim import LayerSpec, ScaledSpec, shim_config
from specdef_cli.spectral.limits import check_alpha

DEFAULT_TOP_K = 25
QUANTIZABLE_LIMIT = (
    "The quantizable profile slows queries and keys that are trained alone, and nothing else: in formats that quantize "
    "activations in blocks, whatever trains a block trains at one rate."
)


@dataclass(frozen=True)
class CastTensor:
    """The transform that stores a tensor in another floating dtype."""

    tensor: str
    dtype: str

    def __call__(self, checkpoint: Checkpoint, device: torch.device) -> Produced:
        """Read and cast."""
        return Produced({self.tensor: checkpoint.read(self.tensor).to(TORCH_DTYPES[self.dtype])})


@dataclass(frozen=True)
class HardeningPlan:
    """What will be written.

    Attributes:
        method: What is done.
        schedule: How α varies.
        profile: What the fold leaves intact; ``None`` without a fold.
        dtype: The dtype of changed tensors, as torch names it.
        inserted: Linears to replace.
        folded: Pairs to rescale.
        scaled: Modules to scale, with the vectors that undo it.
        groups: Every output tensor, in the order of the input.
        config: The output's ``config.json``.
        notes: What was decided and why, for the user.
        unchanged: Parameters that stay as they are, the same name once for all blocks.
    """

    method: Method
    schedule: Schedule
    profile: Profile | None
    dtype: str
    inserted: tuple[InsertLayer, ...]
    folded: tuple[FoldedPair, ...]
    scaled: tuple[ScaledModule, ...]
    groups: tuple[TensorGroup, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    unchanged: tuple[str, ...] = ()

    @property
    def parameters_added(self) -> int:
        """Parameters that the compensation layers and the scale vectors add."""
        return added_parameters((layer.site for layer in self.inserted), self.scaled)

    @property
    def nbytes(self) -> int:
        """Size of all output tensors in bytes."""
        return sum(group.nbytes for group in self.groups)

    def fingerprint(self, checkpoint: Checkpoint, commit: str | None) -> str:
        """Identifies this plan on this input, so that ``--resume`` never mixes two.

        Args:
            checkpoint: The input.
            commit: The hash of the commit that it is; ``None`` for a directory, whose files may change.
        """
        described = {
            "groups": [repr(group) for group in self.groups],
            "config": self.config,
            "input": [repr(header) for header in checkpoint.tensors.values()],
            "input_version": commit
            or [(checkpoint.directory / shard).stat().st_mtime_ns for shard in checkpoint.shards],
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def make_plan(checkpoint: Checkpoint, skeleton: Skeleton, options: HardenOptions) -> HardeningPlan:
    """Decide what to change.

    Args:
        checkpoint: The base.
        skeleton: Its model.
        options: What the user asked for.

    Raises:
        SpecDefError: The checkpoint cannot be hardened, or an option does not fit it.
    """
    if options.base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.base_model):
        raise SpecDefError(f"--base-model {options.base_model!r} is no Hub id", "Give it as org/name, or leave it out.")
    require_modules(checkpoint.directory)
    if options.dtype is not None and options.dtype not in DTYPES:
        raise SpecDefError(f"dtype {options.dtype!r} is not known", f"Use one of {', '.join(DTYPES)}.")
    require_whole(skeleton, checkpoint)
    require_code_allows(skeleton, verify=options.verify, adds_code=options.method == "insert" or options.allow_code)
    if options.verify:
        require_comparable(skeleton)
    stored = SAFETENSORS_DTYPES[DTYPES[options.dtype]] if options.dtype else None
    chosen = choose(checkpoint, skeleton, options, stored)
    inserted = tuple(_insert_layer(checkpoint, site, options, skeleton.config) for site in chosen.sites)
    layers: dict[str, LayerSpec | ScaledSpec] = {
        site.module: LayerSpec(site.in_features, site.out_features, site.bias is not None) for site in chosen.sites
    }
    layers |= {module.module: scaled_spec(module) for module in chosen.scaled}
    config = dict(checkpoint.config)
    if checkpoint.library.names_dtype:
        config = _with_dtype(config, options.dtype)
    method: Method = "mixed" if chosen.folded and layers else "fold" if chosen.folded else "insert"
    multiplied = chosen.multiplied
    dtypes = {TORCH_DTYPES[layer.dtype] for layer in inserted}
    dtypes |= {TORCH_DTYPES[stored or checkpoint.tensors[name].dtype] for name in multiplied}
    unchanged = _unchanged(skeleton, multiplied | {site.tensor for site in chosen.sites})
    return HardeningPlan(
        method=method,
        schedule=options.schedule or ("constant" if inserted else "staircase"),
        profile=chosen.profile if chosen.folded else None,
        dtype=", ".join(sorted(map(dtype_name, dtypes))),
        inserted=inserted,
        folded=chosen.folded,
        scaled=chosen.scaled,
        groups=_groups(
            checkpoint,
            inserted,
            {**fold_groups(chosen.folded, checkpoint, stored), **scaled_groups(chosen.scaled, checkpoint, stored)},
            {name for module in chosen.scaled for name in (module.bias, module.tombstone) if name},
            options.dtype,
        ),
        config=shim_config(config, layers) if layers else config,
        notes=(*_notes(checkpoint, options, chosen, unchanged), *_strangers(checkpoint, skeleton)),
        unchanged=unchanged,
    )


def _notes(checkpoint: Checkpoint, options: HardenOptions, chosen: Choice, unchanged: Sequence[str]) -> tuple[str, ...]:
    """What was decided and why, for the user."""
    code = bool(chosen.sites or chosen.scaled)
    notes = [_summary(chosen)] if options.method == "auto" else []
    notes.append(serving_advice(lost_formats(chosen.folded, inserted=code)))
    if chosen.scaled and checkpoint.library.runs_code:
        notes.append(SCALED_LOADERS)
    notes += chosen.reasons
    if chosen.folded and chosen.profile == "quantizable":
        notes.append(QUANTIZABLE_LIMIT)
    if options.schedule == "constant" and chosen.folded:
        exponent = abs(chosen.folded[0].exponents[0])
        notes.append(f"every rescaled channel gets 2**{exponent}, the power of two nearest to alpha")
    if unchanged and not chosen.sites:
        notes.append(f"Left as they are, and trained alone not slowed: {', '.join(unchanged)}.")
    if options.method == "auto" and not folds_alone(options) and not code and chosen.left:
        notes.append(f"--allow-code would scale {_kinds(chosen.left)}; the model then brings code to load.")
    left_out = checkpoint.companions.note()
    return (*notes, left_out) if left_out else tuple(notes)


def _strangers(checkpoint: Checkpoint, skeleton: Skeleton) -> list[str]:
    """A note on tensors that the model has no place for: config.json may be that of a smaller model."""
    known = skeleton.names.parameters.keys() | skeleton.model.state_dict().keys()
    expected = getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = [
        name
        for name in checkpoint.tensors
        if name not in known and not any(re.search(pattern, name) for pattern in expected)
    ]
    if not found:
        return []
    return [
        f"Not part of the model that config.json describes, so carried over unchanged and not protected: {len(found)} "
        f"tensors, {found[0]} for one."
    ]


def _summary(chosen: Choice) -> str:
    folded, sites, scaled = chosen.folded, chosen.sites, chosen.scaled
    parts = [f"fold: {pairs_are(len(folded))} rescaled"] if folded else []
    parts += [f"insert: no symmetric pair is known for these {len(sites)} layers"] if sites else []
    parts += [f"insert: {_kinds(scaled)} are scaled, and undo it themselves"] if scaled else []
    return ", and ".join(parts if sites or scaled else [*parts, "no layer is added"])


def _kinds(sites: Sequence[ScalableSite | ScaledModule]) -> str:
    """In words: ``36 linear layers, 24 norms, the embedding and its head``."""
    words = {"linear": "linear layer", "norm": "norm", "embedding": "embedding", "head": "head"}
    counts = {word: sum(site.kind == kind for site in sites) for kind, word in words.items()}
    return ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for word, count in counts.items() if count)


def _unchanged(skeleton: Skeleton, changed: set[str]) -> tuple[str, ...]:
    """The parameters that the plan does not change, the same name once for all blocks."""
    left = dict.fromkeys(
        re.sub(r"^.*\.\d+\.", "", tensor).removesuffix(".weight")
        for tensor, parameter in skeleton.names.parameters.items()
        if parameter in skeleton.parameters and tensor not in changed
    )
    return tuple(name for name in left if name.removesuffix(".bias") == name or name.removesuffix(".bias") not in left)


def _insert_layer(checkpoint: Checkpoint, site: LinearSite, options: HardenOptions, native: Any) -> InsertLayer:
    stored = checkpoint.tensors[site.tensor].dtype
    dtype = DTYPES[options.dtype] if options.dtype else TORCH_DTYPES[stored]
    alpha = DEFAULT_ALPHA if options.alpha is None else options.alpha
    gauge = options.gauge or "rotated"
    check_alpha(alpha, gauge, dtype)
    loaded = loaded_dtype(native, options)
    if loaded is not None and loaded is not dtype:
        check_alpha(alpha, gauge, loaded, ", in which config.json has the model loaded,")
    top_k = DEFAULT_TOP_K if options.top_k is None else options.top_k
    smallest = min(site.out_features, site.in_features)
    if top_k < 1:
        raise SpecDefError(f"top-k is {top_k}; it must be at least 1", "Give e.g. --top-k 25.")
    if top_k > smallest:
        raise SpecDefError(
            f"top-k {top_k} is more than the rank of {site.module} ({site.out_features}×{site.in_features})",
            f"Use --top-k {smallest} or less, or --exclude '{site.module}'.",
        )
    return InsertLayer(site, alpha, top_k, gauge, SAFETENSORS_DTYPES[dtype], options.seed)


def _groups(
    checkpoint: Checkpoint,
    inserted: Sequence[InsertLayer],
    rescaled: Mapping[str, TensorGroup],
    absorbed: Collection[str],
    dtype: str | None,
) -> tuple[TensorGroup, ...]:
    """The output: ``rescaled`` by the tensor that each takes the place of; ``absorbed`` are part of another group."""
    replaced = {layer.site.tensor: layer for layer in inserted}
    moved_biases = {layer.site.bias for layer in inserted}
    groups = []
    for name, header in checkpoint.tensors.items():
        if name in replaced:
            groups.append(replaced[name].group())
        elif name in rescaled:
            groups.append(rescaled[name])
        elif name not in moved_biases and name not in absorbed:
            groups.append(plain_group(header.name, header.dtype, header.shape, dtype))
    return tuple(groups)


def plain_group(name: str, stored: str, shape: tuple[int, ...], dtype: str | None) -> TensorGroup:
    """A tensor that is carried over, cast if a floating one is wanted in another dtype."""
    wanted = SAFETENSORS_DTYPES[DTYPES[dtype]] if dtype and stored in FLOATING_DTYPES else stored
    cast = CastTensor(name, wanted) if wanted != stored else None
    return TensorGroup(name, (TensorSpec(name, wanted, shape),), cast)


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        for key, part in config.items():  # the text and the vision part of a model may name dtypes of their own
            if isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part):
                config[key] = {k: v for k, v in part.items() if k != "torch_dtype"} | {"dtype": dtype}
    return config
