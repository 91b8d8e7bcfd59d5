"""What exactly was measured, when and with what, so that others can find out whether they hold the same files."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.checkpoint.stream import file_sha256
from specdef_cli.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "peft", "pytorch_optimizer")


@dataclass(frozen=True)
class Provenance:
    """Where figures come from. Hashes are sha256, in hexadecimal.

    Attributes:
        date: When the measurement ended, UTC, ISO 8601.
        versions: Of Python, of this package and of the libraries that compute, by name.
        platform: The machine's kind, e.g. ``Linux-x86_64``.
        device: Where curvature and formats were measured; the function is compared on the CPU.
        seed: Seed of the hardening.
        hardened, base: Hashes of ``config.json``, of every safetensors file and of the code that it brings, by name.
        manifest: Hash of the manifest as it is published (:meth:`specdef_cli.checkpoint.manifest.Manifest.published`).
        text: Hash of the text that loss was measured on; ``None`` for a model without tokens.
        attack_report: Hash of ``report.json``, which names its own data, budget and seeds.
    """

    date: str
    versions: dict[str, str]
    platform: str
    device: str
    seed: int
    hardened: dict[str, str] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    manifest: str = ""
    text: str | None = None
    attack_report: str | None = None


def provenance(hardened: Path, base: Path, *, device: str, text: str | None, attack_report: Path) -> Provenance:
    """Hash everything that a measurement was based on.

    Args:
        hardened, base: The directories.
        device: Where figures were computed.
        text: The text that loss was measured on.
        attack_report: The ``report.json`` that the certificate quotes.
    """
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        platform=f"{platform.system()}-{platform.machine()}",
        device=device,
        seed=read_manifest(hardened).seed,
        hardened=file_hashes(hardened),
        base=file_hashes(base),
        manifest=manifest_sha256(hardened),
        text=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        attack_report=file_sha256(attack_report),
    )


def file_hashes(directory: Path) -> dict[str, str]:
    """sha256 of what decides the function of a checkpoint, by name.

    That is ``config.json``, every safetensors file and, where the configuration names code to load, every Python file.
    """
    config = directory / "config.json"
    brings_code = config.is_file() and b'"auto_map"' in config.read_bytes()
    code = sorted(directory.glob("*.py")) if brings_code else []
    files = [config, *sorted(directory.glob("*.safetensors")), *code]
    return {path.name: file_sha256(path) for path in files if path.is_file()}


def manifest_sha256(hardened: Path) -> str:
    """sha256 of a directory's manifest as it is published."""
    return hashlib.sha256(read_manifest(hardened).published().to_json().encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "specdef-cli": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree on the path, without metadata
            continue
    return found
