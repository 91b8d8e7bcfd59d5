"""Is a directory what its config.json and its manifest say? Asked before a model of it is loaded.

transformers fills what is missing with random values and casts what is quantized, and only warns. Whoever trains or
measures such a model gets figures, and they mean nothing.
"""

from __future__ import annotations

from pathlib import Path

from specdef_cli.architectures.names import match_names, meta_model
from specdef_cli.checkpoint.library import DIFFUSERS
from specdef_cli.checkpoint.manifest import is_hardened, read_manifest
from specdef_cli.checkpoint.reader import Checkpoint, open_checkpoint
from specdef_cli.errors import SpecDefError
from specdef_cli.hardening.collapse import require_as_described
from specdef_cli.hardening.plan import native_config, require_complete, require_floating, require_hardenable
from specdef_cli.hardening.survey import as_original
from specdef_cli.runtime import load_model, without_progress_bars
from specdef_cli.runtime.shim import ScaledSpec, is_shim, shim_layers


def require_loadable(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a hardened directory that nobody could load. Asked before publication, with ``--no-verify`` too.

    Reads headers only: transformers loads the model on the meta device, as it would load it anywhere.

    Args:
        directory: What is to be published.
        trust_remote_code: Whether code that comes with it may run.

    Raises:
        SpecDefError: A tensor is missing, or the classes are not those that can be replaced.
    """
    checkpoint = open_checkpoint(directory)
    require_as_described(checkpoint, read_manifest(directory))
    if checkpoint.library is DIFFUSERS:  # loads no model without its weights
        return
    with without_progress_bars():
        _, found = load_model(directory, device="meta", output_loading_info=True, trust_remote_code=trust_remote_code)
    lost = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
    if lost:
        raise SpecDefError(
            f"the hardened model would be loaded without {lost[0]}",
            "Leave that layer out (--exclude), or use the other --method; nothing was published.",
        )


def require_sound(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a base or hardened directory that transformers could only load as something else than it is.

    Reads headers only.

    Args:
        directory: The checkpoint.
        trust_remote_code: Whether code that comes with it may run.

    Raises:
        SpecDefError: It is not a model of transformers; a file is missing, corrupt or leaves the directory; a tensor is
            missing, quantized, or of another shape than config.json or the manifest says.
    """
    checkpoint = open_checkpoint(directory)
    if checkpoint.library is DIFFUSERS:
        raise SpecDefError(
            f"{directory} is a model of diffusers, and only models of transformers are attacked and certified",
            "Train it in its pipeline, as examples/reproduce/unet.py does.",
        )
    manifest = read_manifest(directory) if is_hardened(directory) else None
    if manifest is None:
        if is_shim(checkpoint.config):
            _require_factors(checkpoint)
            return
        require_hardenable(checkpoint)
    else:
        require_as_described(checkpoint, manifest)
    original = as_original(checkpoint, manifest)
    config = native_config(original, trust_remote_code=trust_remote_code)
    model = meta_model(config, trust_remote_code=trust_remote_code)
    shapes = {name: header.shape for name, header in original.tensors.items()}
    names = match_names(model, shapes)
    require_complete(model, names, shapes)
    require_floating(model, names, original)


def _require_factors(checkpoint: Checkpoint) -> None:
    """Refuse a model with inserted layers and without a manifest whose factors are not those that config.json names."""
    for module, spec in shim_layers(checkpoint.config).items():
        if isinstance(spec, ScaledSpec):
            scales = {"input_scale": spec.input_scale, "output_scale": spec.output_scale}
            factors: dict[str, tuple[int, ...]] = {
                f"{module}.{name}.weight": (length,) for name, length in scales.items() if length is not None
            }
            factors |= {} if spec.tied_to else {f"{module}.inflated.weight": spec.weight}
        else:
            factors = {
                f"{module}.inflated.weight": (spec.out_features, spec.in_features),
                f"{module}.compensation.weight": (spec.out_features, spec.out_features),
            }
        for name, shape in factors.items():
            header = checkpoint.tensors.get(name)
            if header is None or tuple(header.shape) != shape:
                raise SpecDefError(
                    f"{checkpoint.directory} has no tensor {name} of shape {list(shape)}, which its config.json names",
                    "Restore its files, or harden the base model again.",
                )
