"""Hardened directories, made in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdef_cli.checkpoint.manifest import Manifest
from specdef_cli.hardening.options import Construction, HardenOptions
from specdef_cli.hardening.run import harden


def harden_to(
    out: Path, base: Path, construction: Construction | None = None, *, verify: bool = False, **options: Any
) -> Manifest:
    """Harden ``base``, by default as a fold; ``verify`` compares the two models, which takes most of the time."""
    chosen: dict[str, Any] = {} if construction is None else {"construction": construction}
    result = harden(HardenOptions(str(base), out, verify=verify, **chosen, **options))
    assert result is not None
    return result.manifest
