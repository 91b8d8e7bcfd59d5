"""On a machine with a GPU: results against the CPU's, the basis, harden against ``cp -r``, an attack in bfloat16."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.stream import stream_table
from benchmarks.subspace import trained_like
from specdef_cli.spectral.subspace import top_subspace

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY / "models" / "smollm2-135m-instruct"
TINY = REPOSITORY / "examples" / "tiny_llama" / "model"


def gpu_table(directory: Path) -> None:
    """Print the tables; what is attacked is SmolLM2-135M-Instruct where `make real-models` has left it.

    Args:
        directory: For what is written meanwhile.

    Raises:
        SystemExit: There is no GPU, or a command fails.
    """
    if not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU\nhint: Run this on a machine with one, with a CUDA build of torch.")
    count = torch.cuda.device_count()
    print(f"{count} × {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    distances_table("cuda")
    basis_table(torch.device("cuda"))
    stream_table(directory)
    attack_table(directory, REAL if REAL.is_dir() else TINY, count)


def distances_table(device: str) -> None:
    """Print how far what a device computes is from what the CPU computes."""
    done = _python("-m", "tests.hardening.on_another_device", str(TINY), device)
    print("| computed on the GPU | largest difference from the CPU |\n|---|---|")
    for name, distance in json.loads(done.splitlines()[-1]).items():
        print(f"| {name} | {distance:.1e} |")


def basis_table(device: torch.device, rows: int = 4096, columns: int = 14336, top_k: int = 25, runs: int = 5) -> None:
    """Print the seconds of the top-k basis on a device and on the CPU."""
    weight = trained_like(rows, columns).bfloat16()
    print(f"\n| basis of {rows}×{columns}, k={top_k} | seconds (median) |\n|---|---|")
    for place in (torch.device("cpu"), device):
        stored, times = weight.to(place), []
        for seed in range(runs):
            began = time.perf_counter()
            top_subspace(stored, top_k, seed).singular_values.tolist()  # which waits for the device
            times.append(time.perf_counter() - began)
        print(f"| {place.type} | {statistics.median(times):.3f} |")
    print()


def attack_table(directory: Path, model: Path, processes: int) -> None:
    """Print what an attack in bfloat16 on a fold takes, in one process and in one a GPU."""
    hardened = directory / "hardened"
    _python("-m", "specdef_cli", "harden", str(model), "--method", "fold", "--out", str(hardened), "--quiet")
    print(f"\n| attack on the fold of {model.name}, bfloat16 | seconds | verdict |\n|---|---|---|")
    for number in sorted({1, processes}):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)] if number > 1 else []
        out = directory / f"attack-{number}"
        began = time.perf_counter()
        _python(
            *launch, "-m", "specdef_cli", "attack", str(hardened), "--control", str(model), "--training", "full",
            "--lr", "1e-4", "--dtype", "bfloat16", "--steps", "10", "--batch-size", "8", "--sequence-length", "128",
            "--retained", "none", "--out", str(out), "--quiet",
        )  # fmt: skip
        seconds = time.perf_counter() - began
        verdict = json.loads((out / "report.json").read_text(encoding="utf-8"))["summary"][0]
        print(f"| {number} processes | {seconds:.0f} | {verdict} |")


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout
