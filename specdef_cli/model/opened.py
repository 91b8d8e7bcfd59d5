"""A model that is open: found, its headers read, its manifest held against them. It travels; its path does not.

transformers fills what is missing with random values and casts what is quantized, and only warns. Figures measured on
such a model would mean nothing, so a directory is asked here, once, whether it is what it says.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from specdef_cli.checkpoint.check import base_missing, hardened_already, no_base, require_undefended
from specdef_cli.checkpoint.files import FLOATING_DTYPES
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, Manifest, find_manifest, manifest_of, read_manifest
from specdef_cli.checkpoint.reader import Checkpoint, open_checkpoint
from specdef_cli.checkpoint.resolve import Resolved, base_of, resolve
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.model import load_model, load_tokenizer, without_progress_bars
from specdef_cli.model.configuration_specdef import AUTO_MAP, MODEL_TYPE
from specdef_cli.model.described import SHIM_SOURCE, as_original, is_shim, require_its_own, transposed_back
from specdef_cli.model.skeleton import Skeleton
from specdef_cli.option import Source


@dataclass(frozen=True)
class OpenedModel:
    """A base or hardened model whose files are there and agree with each other.

    Attributes:
        found: Where it lies, and what it is called.
        checkpoint: Its configuration and headers, as stored.
        manifest: What was done to it; ``None`` for a base, or where no manifest is known.
        trust_remote_code: Whether Python code that comes with it may run.
    """

    found: Resolved
    checkpoint: Checkpoint = field(compare=False)
    manifest: Manifest | None = field(default=None, compare=False)
    trust_remote_code: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Its fields alone: a worker builds the skeleton anew."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def directory(self) -> Path:
        return self.found.directory

    @property
    def hardening(self) -> Manifest:
        """The manifest of a model that was opened as a hardened one."""
        assert self.manifest is not None
        return self.manifest

    @cached_property
    def original(self) -> Checkpoint:
        """The checkpoint as its original architecture describes it."""
        return as_original(self.checkpoint)

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model of its original architecture, without weights."""
        return transposed_back(Skeleton.read(self.original, trust_remote_code=self.trust_remote_code))

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when its weights or its configuration do.

        A manifest names the hash of every shard; elsewhere names, sizes and times of weight files stand for contents,
        because to hash tens of gigabytes would cost more than many a run that is looked up by it.
        """
        digest = hashlib.sha256()
        if self.manifest is not None:
            digest.update(f"{MANIFEST_NAME}\0{self.manifest.to_json()}".encode())
        digest.update(b"config.json\0" + (self.directory / "config.json").read_bytes())
        if self.manifest is None:
            for path in sorted(self.directory.glob("*.safetensors")):
                stat = path.stat()
                digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:16]

    def here(self) -> OpenedModel:
        """Make the path absolute; on a machine without the directory, fetch it from the Hub if it came from there."""
        found = self.found
        if found.commit is not None and not found.directory.is_dir():
            found = resolve(found.name.partition("@")[0], revision=found.commit, subfolder=found.subfolder)
        found = dataclasses.replace(found, directory=found.directory.absolute())
        return dataclasses.replace(
            self, found=found, checkpoint=dataclasses.replace(self.checkpoint, directory=found.directory)
        )

    def load(self, **arguments: Any) -> Any:
        return load_model(self.directory, trust_remote_code=self.trust_remote_code, **arguments)

    @contextmanager
    def loaded(self, **arguments: Any) -> Iterator[Any]:
        """Load the model for the block, in evaluation mode; its memory is free again afterwards."""
        with without_progress_bars():
            model = self.load(**arguments).eval()
        try:
            yield model
        finally:
            del model
            gc.collect()

    def load_without_weights(self) -> Any:
        """Load on the meta device; a model that would lose a tensor is refused."""
        with without_progress_bars():
            model, found = self.load(device="meta", output_loading_info=True)
        lost = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))
        if lost:
            raise SpecDefError(
                f"the hardened model would be loaded without {lost[0]}",
                "Leave that layer out (--exclude), or use another --method; nothing was published.",
            )
        return model

    def beside(self, directory: Path) -> OpenedModel:
        """Open another directory, whose code may run if this one's may."""
        return open_found(Resolved(directory, str(directory)), trust_remote_code=self.trust_remote_code)

    @property
    def code_may_run(self) -> bool:
        """Whether a process may run its code: if the user allows it, or if it is the file that this release writes."""
        if self.trust_remote_code or self.checkpoint.config.get("model_type") != MODEL_TYPE:
            return self.trust_remote_code
        shim = self.directory / SHIM_SOURCE.name
        known = shim.is_file() and shim.read_bytes() == SHIM_SOURCE.read_bytes()
        if self.checkpoint.config.get("auto_map") != AUTO_MAP or not known:
            raise SpecDefError(
                f"{self.directory} brings code of its own: its {shim.name} is not the one that this release writes",
                "Read that code, then pass --trust-remote-code; or harden the base again.",
            )
        return True

    def tokenizer(self) -> Any:
        """Its tokenizer; ``None`` where it has none."""
        return load_tokenizer(self.directory, trust_remote_code=self.trust_remote_code)


def open_model(model: str | Path | Source, *, hardened: bool | None = None, output: Path | None = None) -> OpenedModel:
    """Find a model and open it.

    Args:
        hardened: Whether it has to have a manifest (``True``), must not be hardened (``False``), or may be either.
        output: Where as much will be written once more.
    """
    source = model if isinstance(model, Source) else Source(model)
    found = resolve(
        str(source.model), revision=source.revision, token=source.token, subfolder=source.subfolder, output=output
    )
    return open_found(found, hardened=hardened, manifest=source.manifest, trust_remote_code=source.trust_remote_code)


def open_found(
    found: Resolved,
    *,
    hardened: bool | None = None,
    manifest: Path | None = None,
    trust_remote_code: bool = False,
) -> OpenedModel:
    """Open a model that is on this disk."""
    directory = found.directory
    try:
        if hardened is False and (manifest is not None or find_manifest(directory) is not None):
            raise hardened_already(directory)
        described = (read_manifest if hardened else manifest_of)(directory, manifest)
        checkpoint = open_checkpoint(directory)
        if hardened is False:
            if is_shim(checkpoint.config):
                raise hardened_already(directory)
            require_unquantized(checkpoint)
        if described is not None:
            require_its_own(checkpoint, described)
    except SpecDefError as error:
        if found.commit:  # a user knows the id, not where the cache keeps it
            name = "/".join(filter(None, (found.name, found.subfolder)))
            error.problem, error.hint = (text.replace(str(directory), name) for text in (error.problem, error.hint))
        raise
    return OpenedModel(found, checkpoint, described, trust_remote_code)


def open_base(
    model: OpenedModel,
    given: str | Path | None,
    option: str,
    *,
    token: str | None = None,
    subfolder: str | None = None,
) -> OpenedModel:
    """The undefended model that another one is compared with.

    Args:
        given: What ``option`` names; ``None`` is the base that the manifest names.
        option: ``--base`` or ``--control``.
        subfolder: The folder of what is given that it is in; the manifest says it of its own base.
    """
    if given is not None:
        base = Source(given, token=token, subfolder=subfolder)
        found = resolve(str(base.model), token=base.token, subfolder=base.subfolder)
        require_undefended(found.directory, option)
        found = dataclasses.replace(found, name=str(base.model))
    elif model.manifest is None:
        raise no_base(model.found.name, option)
    else:
        name, revision = base_of(model.manifest, model.directory)
        try:
            found = resolve(name, revision=revision, token=token, subfolder=model.manifest.base.subfolder)
        except SpecDefError as error:
            raise base_missing(model.manifest.base.name, model.directory, option, error) from error
        found = dataclasses.replace(found, name=model.manifest.base.name)
    return open_found(found, hardened=False, trust_remote_code=model.trust_remote_code)


def require_sound(model: OpenedModel) -> None:
    """Refuse a model that transformers would load as another one. Reads headers only."""
    if not model.checkpoint.library.is_transformers:
        raise SpecDefError(
            f"{model.directory} is a model of diffusers, and only models of transformers are attacked and certified",
            "Train it in its pipeline, as examples/reproduce/unet.py does.",
        )
    if model.manifest is None and is_shim(model.checkpoint.config):
        model.load_without_weights()
        return
    if model.manifest is None:
        require_unquantized(model.checkpoint)
    require_attention(model.skeleton)
    require_whole(model.skeleton, model.original)


def require_attention(skeleton: Skeleton) -> None:
    """Refuse a config.json that asks for an attention kernel that is not here: nothing could load what comes of it."""
    kernel = getattr(skeleton.config, "_attn_implementation", None)
    if kernel in (None, "eager", "sdpa"):
        return
    model_class: Any = type(skeleton.model)
    try:
        with torch.device("meta"):
            model_class._from_config(copy.deepcopy(skeleton.config))
    except Exception as error:  # ImportError, ValueError and what packages of kernels raise
        raise SpecDefError(
            f"config.json asks for the attention kernel {kernel}, which cannot be used here: {first_line(error)}",
            "Install what it needs, or take attn_implementation out of config.json.",
        ) from error


def require_whole(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that lacks a parameter, or stores one as integers or in eight bits."""
    skeleton.require_complete()
    for tensor, parameter in skeleton.names.parameters.items():
        dtype = checkpoint.tensors[tensor].dtype
        if parameter in skeleton.parameters and dtype not in FLOATING_DTYPES:
            raise SpecDefError(
                f"{tensor} is stored as {dtype}", "Harden the unquantized checkpoint, and quantize the result."
            )


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Refuse packed weights, which have no channels to scale."""
    parts = (checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict)))
    quantized = next(filter(None, (part.get("quantization_config") for part in parts)), None)
    if quantized:
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise SpecDefError(
            f"{checkpoint.directory} is quantized ({method})",
            "Harden the unquantized checkpoint, and quantize the result.",
        )
