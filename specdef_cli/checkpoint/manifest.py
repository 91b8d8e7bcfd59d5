"""``specdef.json``: what was done to a hardened directory, and to what.

The manifest is the only thing that ``collapse``, ``certify`` and ``attack`` need to know about a hardened directory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from specdef_cli.checkpoint.changes import Changed, FactoredLayer, FoldedPair, Method, ScaledModule
from specdef_cli.errors import SpecDefError, first_violation

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

MANIFEST_NAME = "specdef.json"
FORMAT_VERSION: Final = 2


@dataclass(frozen=True)
class BaseCheckpoint:
    """Where the hardened weights came from."""

    name: str
    """Hub id (``org/name``) or the last part of a directory's path."""
    revision: str | None = None
    """The revision asked for; ``None`` for a directory."""
    commit: str | None = None
    """The commit hash that the revision resolved to; ``None`` for a directory."""
    hub_id: str | None = None
    """Where a directory's weights are on the Hub, if the user said so."""
    subfolder: str | None = None
    """The folder of the Hub's repository that they are in; ``None`` at its root, and for a directory."""

    @property
    def hub_name(self) -> str | None:
        """The Hub id under which others find it; ``None`` where none is known."""
        return self.name if self.commit else self.hub_id

    @property
    def public_name(self) -> str:
        """The Hub id, or the last part of a directory's path: what others may read."""
        return self.hub_name or last_part(Path(self.name))


@dataclass(frozen=True)
class Manifest(Changed):
    """Everything that is known about a hardened directory."""

    __pydantic_config__: ClassVar[ConfigDict] = {"strict": True, "extra": "forbid"}

    format: Literal[2]
    """Version of the file's shape, :data:`FORMAT_VERSION`."""
    specdef_version: str
    """The version of this package that wrote it."""
    method: Method
    """``fold``, ``scale`` or ``factors``."""
    base: BaseCheckpoint
    """The checkpoint that was hardened."""
    dtype: str
    """The dtype the changed tensors are stored in, as torch names it (``bfloat16``)."""
    seed: int
    """Seed of the randomized basis."""
    profile: str | None = None
    """The fold's profile; ``None`` without a fold."""
    folded: tuple[FoldedPair, ...] = ()
    """The rescaled pairs."""
    scaled: tuple[ScaledModule, ...] = ()
    """The modules that undo a scale of their own weight."""
    factored: tuple[FactoredLayer, ...] = ()
    """The linears that were replaced by two factors."""
    shards: dict[str, str] = field(default_factory=dict)
    """sha256 of every safetensors file."""
    verification: dict[str, Any] = field(default_factory=dict)
    """Figures of the verification before publication; empty when it was skipped."""

    @property
    def largest_alpha(self) -> float:
        """The largest factor by which any layer or channel was inflated."""
        powers = [pair.exponents for pair in self.folded] + [module.exponents for module in self.scaled]
        largest = max((abs(exponent) for exponents in powers for exponent in exponents), default=0)
        return max(2.0**largest, *(layer.alpha for layer in self.factored), 1.0)

    def published(self) -> Manifest:
        """The manifest as it leaves this machine: a base that was a directory keeps the last part of its path."""
        return dataclasses.replace(self, base=dataclasses.replace(self.base, name=self.base.public_name))

    def to_json(self) -> str:
        return json.dumps(manifest_record().dump_python(self, mode="json"), indent=1) + "\n"

    @staticmethod
    def from_json(text: str, origin: str = MANIFEST_NAME) -> Manifest:
        from pydantic import ValidationError

        try:
            return manifest_record().validate_json(_in_this_format(text))
        except ValidationError as error:
            first = error.errors()[0]
            if first["loc"] == ("format",) and first["type"] == "literal_error":
                raise SpecDefError(
                    f"{origin} has format {first['input']!r}; this version reads formats 1 and {FORMAT_VERSION}",
                    "Install the release of specdef-cli that wrote it.",
                ) from error
            raise SpecDefError(
                f"{origin} is not a valid manifest: {first_violation(error)}",
                "Harden the base model again, or restore the file.",
            ) from error


def _in_this_format(text: str) -> str:
    """A manifest of format 1, in which methods and profiles had other names, as one of this format; others as is."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not (isinstance(read, dict) and type(read.get("format")) is int and read["format"] == 1):
        return text
    record = {name: value for name, value in read.items() if name != "schedule"}
    record |= {"format": FORMAT_VERSION, "factored": record.pop("inserted", [])}
    if record.get("config_changes") == []:  # of early ones, where it is always so
        del record["config_changes"]
    if record.get("method") in ("insert", "mixed"):
        record["method"] = "factors" if record["factored"] else "scale"
    if record.get("profile") == "coverage":
        record["profile"] = "float16-cache"
    return json.dumps(record)


@functools.cache
def manifest_record() -> TypeAdapter[Manifest]:
    """Reads and writes a manifest as JSON data."""
    from pydantic import TypeAdapter  # here: `specdef --help` names methods and schedules, and reads no manifest

    return TypeAdapter(Manifest)


def find_manifest(directory: Path, elsewhere: Path | None = None) -> Path | None:
    """Find the manifest of a directory, in it or ``elsewhere`` (``--manifest``); ``None`` where it has none."""
    own = directory / MANIFEST_NAME
    if elsewhere is None:
        return own if own.is_file() else None
    if not elsewhere.is_file():
        raise SpecDefError(f"--manifest {elsewhere} is not a file", "Give what `specdef harden --manifest-out` wrote.")
    if own.is_file() and not own.samefile(elsewhere):
        raise SpecDefError(f"{directory} has a {MANIFEST_NAME} of its own", "Leave --manifest out, or remove that one.")
    return elsewhere


def manifest_of(directory: Path, elsewhere: Path | None = None) -> Manifest | None:
    """The manifest of a directory; ``None`` where it has none."""
    path = find_manifest(directory, elsewhere)
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        hint = "Give the file that `specdef harden` wrote."
        raise SpecDefError(f"{path} is not a valid manifest: {error}", hint) from error
    return Manifest.from_json(text, str(path))


def read_manifest(directory: Path, elsewhere: Path | None = None) -> Manifest:
    """The manifest of a directory that has to have one."""
    manifest = manifest_of(directory, elsewhere)
    if manifest is None:
        raise SpecDefError(
            f"{directory} has no {MANIFEST_NAME}, which says how a model was hardened",
            f"Give a directory that `specdef harden` wrote. A {MANIFEST_NAME} that lies elsewhere is named with "
            "--manifest; after save_pretrained, copy it along.",
        )
    return manifest


def last_part(directory: Path) -> str:
    """The public name of a directory, even of ``..``."""
    return Path(os.path.abspath(directory.expanduser())).name or "model"  # noqa: PTH100 - a link keeps its own name
