"""What the fault tests share: a hardened directory and an attack that takes a fraction of a second."""

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


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty paragraphs of forty words that the tiny models know."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(f"w{(7 * row + word) % 90 + 3}" for word in range(40)) for row in range(40)))
    return path
