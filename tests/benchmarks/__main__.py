"""``python -m tests.benchmarks [NAME …]``: print the tables of the README."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.benchmarks.attack import attack_table
from tests.benchmarks.stream import stream_table
from tests.benchmarks.subspace import subspace_table

BENCHMARKS = {
    "subspace": lambda _: subspace_table(),
    "attack": lambda _: attack_table(),
    "stream": lambda directory: stream_table(directory),
    "stream-large": lambda directory: stream_table(directory, runs=1, layers=84),
}
DEFAULT = ("subspace", "attack", "stream")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="specdef-bench-") as temporary:
        for name in sys.argv[1:] or DEFAULT:
            print(f"\n### {name}\n", flush=True)
            BENCHMARKS[name](Path(temporary))
