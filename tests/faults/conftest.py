"""What the fault tests share: a hardened directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import succeed


@pytest.fixture(scope="session")
def hardened(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with inserted layers."""
    out = tmp_path_factory.mktemp("hardened") / "out"
    succeed("harden", tiny_model("llama"), "--out", out, "--method", "factors", "--top-k", "4", "--quiet")
    return out
