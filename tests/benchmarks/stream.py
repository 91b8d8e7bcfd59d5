"""Harden a 2.5 GB checkpoint against ``cp -r`` of it, both flushed to disk, with caches dropped before."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.synthetic import synthetic_llama


@dataclass(frozen=True)
class Measured:
    """Wall time in seconds and peak resident memory in bytes of one command."""

    seconds: float
    peak_rss: int


def measure(command: list[str], output: Path) -> Measured:
    """Run a command that writes ``output``, flush it to disk, and remove it."""
    shutil.rmtree(output, ignore_errors=True)
    drop_caches()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    flush(output)
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return Measured(seconds, usage.ru_maxrss * (1024 if sys.platform != "darwin" else 1))


def flush(directory: Path) -> None:
    """fsync every file: what harden does before it publishes, and cp does not."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def drop_caches() -> None:
    """Read from disk, not from memory, where the system lets us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("(caches could not be dropped: warm reads)", file=sys.stderr)


def stream_table(directory: Path, runs: int = 3, layers: tuple[int, ...] = (20,)) -> None:
    """Print, for each size: seconds of cp, and ratio and peak memory of fold and insert."""
    harden = [sys.executable, "-m", "specdef_cli", "harden", "--no-verify", "--quiet"]
    out = directory / "out"
    print("| checkpoint | command | seconds (median) | × cp -r | peak RSS | 4 × largest tensor + 0.4 GB |")
    print("|---|---|---|---|---|---|")
    for count in layers:
        source = synthetic_llama(directory / f"llama-{count}", layers=count)
        size = sum(path.stat().st_size for path in source.iterdir())
        commands = {
            "cp -r": ["cp", "-r", str(source), str(out)],
            "fold": [*harden, str(source), "--out", str(out), "--method", "fold"],
            "insert, k=25": [*harden, str(source), "--out", str(out), "--method", "insert"],
        }
        # Alternate the commands, so that a drift of the machine meets all of them.
        measured = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                measured[name].append(measure(command, out))
        limit = 4 * 4 * 32000 * 2048 + 0.4e9
        for name, results in measured.items():
            ratio = statistics.median(
                result.seconds / base.seconds for result, base in zip(results, measured["cp -r"], strict=True)
            )
            seconds = statistics.median(result.seconds for result in results)
            rss = max(result.peak_rss for result in results)
            print(
                f"| {size / 1e9:.1f} GB | {name} | {seconds:.1f} | {ratio:.2f} | {rss / 1e9:.2f} GB | "
                f"{limit / 1e9:.2f} GB |"
            )
