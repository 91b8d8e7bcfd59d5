"""``python -m benchmarks [NAME …]``: print the tables of docs/speed.md."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.attack import attack_table
from benchmarks.gpu import gpu_table
from benchmarks.mistakes import mistakes_table
from benchmarks.stream import sizes_table, stream_table
from benchmarks.subspace import subspace_table

BENCHMARKS = {
    "subspace": lambda _: subspace_table(),
    "attack": lambda _: attack_table(),
    "stream": lambda directory: stream_table(directory),
    "stream-large": lambda directory: sizes_table(stream_table(directory, runs=1, layers=84)),
    "mistakes": lambda directory: mistakes_table(directory),
    "gpu": lambda directory: gpu_table(directory),
}
DEFAULT = ("subspace", "attack", "stream")

if __name__ == "__main__":
    names = sys.argv[1:] or DEFAULT
    if len(names) > 1:
        # Each in a process of its own: what this one has held counts as the peak of the commands that it starts.
        sys.exit(max(subprocess.call([sys.executable, "-m", "benchmarks", name]) for name in names))
    with tempfile.TemporaryDirectory(prefix="specdef-bench-") as temporary:
        print(f"\n### {names[0]}\n", flush=True)
        BENCHMARKS[names[0]](Path(temporary))
