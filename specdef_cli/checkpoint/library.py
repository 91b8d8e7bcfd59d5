"""Which library a checkpoint directory belongs to: that decides how its files are named and who can load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdef_cli.errors import MissingExtraError, SpecDefError


@dataclass(frozen=True)
class Library:
    """A library that writes checkpoint directories.

    Attributes:
        has_model_types: Whether ``config.json`` names a model type, for which the library has a config class.
        names_dtype: Whether ``config.json`` names the dtype that a model is loaded in.
        is_attacked: Whether ``attack`` and ``certify`` know how to train its models.
    """

    name: str
    weights: str
    single_file_first: bool
    has_model_types: bool
    runs_code: bool
    names_dtype: bool
    loads_without_weights: bool
    has_logits: bool
    is_attacked: bool

    @property
    def single_file(self) -> str:
        """The file that holds all weights, where there is only one."""
        return f"{self.weights}.safetensors"

    @property
    def index_file(self) -> str:
        """The file that says which shard holds which tensor."""
        return f"{self.weights}.safetensors.index.json"

    def shard_file(self, number: int, count: int) -> str:
        """The name of shard ``number`` of ``count``, counted from 1."""
        return f"{self.weights}-{number:05d}-of-{count:05d}.safetensors"


TRANSFORMERS = Library(
    name="transformers",
    weights="model",
    single_file_first=True,
    has_model_types=True,
    runs_code=True,
    names_dtype=True,
    loads_without_weights=True,
    has_logits=True,
    is_attacked=True,
)
DIFFUSERS = Library(
    name="diffusers",
    weights="diffusion_pytorch_model",
    single_file_first=False,
    has_model_types=False,
    runs_code=False,
    names_dtype=False,
    loads_without_weights=False,
    has_logits=False,
    is_attacked=False,
)


def diffusers_missing(what: object) -> SpecDefError:
    """What to say of a model of diffusers where diffusers is not installed."""
    return MissingExtraError(f"{what} and other models of diffusers", "diffusion")


def library_of(config: Mapping[str, Any]) -> Library:
    """The library that wrote a ``config.json``: diffusers names its classes there, transformers its model types."""
    return DIFFUSERS if "_class_name" in config and "model_type" not in config else TRANSFORMERS
