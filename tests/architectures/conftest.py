"""One set of tiny checkpoints for all tests of this directory: writing them is most of the tests' time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_families import CASES, write_case


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directory of every case of ``tiny_families.CASES``; not to be written to."""
    root = tmp_path_factory.mktemp("families")
    return {case: write_case(case, root / case) for case in CASES}
