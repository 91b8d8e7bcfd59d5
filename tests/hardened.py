"""Hardened directories, made in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdef_cli.checkpoint.manifest import Manifest, read_manifest
from specdef_cli.hardening.options import Construction, HardenOptions
from specdef_cli.hardening.run import harden
from tests.commands import succeed
from tests.weights import assert_same_bytes, tensors


def harden_to(
    out: Path, base: Path, construction: Construction | None = None, *, verify: bool = False, **options: Any
) -> Manifest:
    """Harden ``base``, by default as a fold; ``verify`` compares the two models, which takes most of the time."""
    chosen: dict[str, Any] = {} if construction is None else {"construction": construction}
    result = harden(HardenOptions(str(base), out, verify=verify, **chosen, **options))
    assert result is not None
    return result.manifest


def given_back(base: Path, root: Path, method: str) -> Manifest:
    """Harden and collapse from the command line, into ``root``: bit-identical outputs, and every byte comes back."""
    succeed("harden", base, "--method", method, "--out", root / "out", "--quiet")
    succeed("collapse", root / "out", "--out", root / "back", "--quiet")
    assert_same_bytes(tensors(root / "back"), tensors(base))
    manifest = read_manifest(root / "out")
    assert manifest.verification["equal"]
    return manifest
