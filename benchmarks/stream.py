"""Harden a 2.5 GB checkpoint against ``cp -r`` of it: read from disk, not from memory, and flushed to disk.

Python, torch and transformers take seconds to start, whatever the size of the checkpoint. They have a row of their own,
and each ratio is given with them and without.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.synthetic import synthetic_llama


@dataclass(frozen=True)
class Measured:
    """Wall time and processor time in seconds, and peak resident memory in bytes, of one command."""

    seconds: float
    cpu_seconds: float
    peak_rss: int


def measure(command: list[str], output: Path) -> Measured:
    """Run a command that writes ``output``, flush it to disk, and remove it."""
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    flush(output)
    seconds = time.perf_counter() - start
    shutil.rmtree(output, ignore_errors=True)
    rss = usage.ru_maxrss * (1024 if sys.platform != "darwin" else 1)
    return Measured(seconds, usage.ru_utime + usage.ru_stime, rss)


def flush(directory: Path) -> None:
    """fsync every file: what harden does before it publishes, and cp does not."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def evict(directory: Path) -> None:
    """Drop the files of a directory from the page cache, and nothing else: neither Python nor torch."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what is not yet on disk cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@dataclass(frozen=True)
class Rate:
    """How long a command takes: seconds to start, and seconds for each GB of the checkpoint."""

    start: float
    seconds_per_gb: float

    def estimate(self, gigabytes: float) -> str:
        """The time for a checkpoint of another size, with its arithmetic."""
        seconds = self.start + self.seconds_per_gb * gigabytes
        return f"{self.start:.0f} + {gigabytes:.0f} · {self.seconds_per_gb:.1f} s = {seconds / 60:.1f} min"


def sizes_table(rates: Mapping[str, Rate]) -> None:
    """Print what well-known sizes would take on this machine."""
    print("\n| model | GB in bfloat16 |", *(f"{name} |" for name in rates))
    print("|---|---|" + "---|" * len(rates))
    for billions, gigabytes in ((8, 16.1), (70, 141.1), (405, 811.7)):
        print(f"| {billions}B | {gigabytes:.0f} |", *(f"{rate.estimate(gigabytes)} |" for rate in rates.values()))


def stream_table(directory: Path, runs: int = 3, layers: int = 20) -> dict[str, Rate]:
    """Print seconds, ratio to ``cp -r``, and peak memory of fold and factors on a checkpoint of ``layers`` blocks.

    Returns:
        The rates of the commands of one process, by their names in the table.
    """
    arguments = ["-m", "specdef_cli", "harden", "--no-verify", "--quiet"]
    harden = [sys.executable, *arguments]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    started_as_commands_are = "from specdef_cli.process import collect_less_garbage; collect_less_garbage()"
    out = directory / "out"
    source = directory / f"llama-{layers}"
    # In a process of its own: what this one holds counts as the peak of every command that it starts.
    maker = multiprocessing.get_context("spawn").Process(
        target=synthetic_llama, args=(source,), kwargs={"layers": layers}
    )
    maker.start()
    maker.join()
    size = sum(path.stat().st_size for path in source.iterdir())
    commands = {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "start-up": [sys.executable, "-c", f"{started_as_commands_are}; import specdef_cli.hardening.run"],
        "fold": [*harden, str(source), "--out", str(out), "--method", "fold"],
        "factors, k=25": [*harden, str(source), "--out", str(out), "--method", "factors", "--top-k", "25"],
        "factors, two processes": [*launch, str(source), "--out", str(out), "--method", "factors", "--top-k", "25"],
    }
    # Alternate the commands, so that a drift of the machine meets all of them.
    measured: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            evict(source)
            measured[name].append(measure(command, out))
    copied, started = ([result.seconds for result in measured[name]] for name in ("cp -r", "start-up"))
    limit = 4 * 4 * 32000 * 2048 + 0.4e9
    print(f"{size / 1e9:.1f} GB; peak RSS may be 4 × the largest tensor in float32 + 0.4 GB = {limit / 1e9:.2f} GB\n")
    print("| command | seconds (median) | CPU seconds | × cp -r | × cp -r, without start-up | peak RSS |")
    print("|---|---|---|---|---|---|")
    rates = {}
    for name, results in measured.items():
        # A forked cp is counted with the memory of the process that forked it.
        rss = "" if name == "cp -r" else f"{max(result.peak_rss for result in results) / 1e9:.2f} GB"
        seconds = [result.seconds for result in results]
        ratio = statistics.median(own / base for own, base in zip(seconds, copied, strict=True))
        begun = [0.0] * runs if name == "cp -r" else started
        net = statistics.median((own - start) / base for own, start, base in zip(seconds, begun, copied, strict=True))
        print(
            f"| {name} | {statistics.median(seconds):.1f} | {statistics.median(r.cpu_seconds for r in results):.1f} | "
            f"{ratio:.2f} | {net:.2f} | {rss} |"
        )
        if name in {"cp -r", "fold", "factors, k=25"}:
            start = statistics.median(begun)
            rates[name] = Rate(start, (statistics.median(seconds) - start) * 1e9 / size)
    return rates
