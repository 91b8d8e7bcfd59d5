"""The top-k basis against ``torch.linalg.svd``: time, and how much of the top singular values it finds."""

from __future__ import annotations

import statistics
import time

import torch

from specdef_cli.spectral.subspace import top_subspace


def trained_like(rows: int, columns: int) -> torch.Tensor:
    """A matrix with a bulk and a decaying top, as trained weights have."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) / columns**0.5
    rank = 64
    left, right = torch.randn(rows, rank) / rows**0.5, torch.randn(rank, columns) / columns**0.5
    return weight + left @ torch.diag(6 * torch.arange(1, rank + 1) ** -0.5) @ right


def subspace_table(rows: int = 4096, columns: int = 14336, top_k: int = 25, runs: int = 5) -> None:
    """Print seconds, ratio, share of σ₁ and of the top-k energy."""
    weight = trained_like(rows, columns).bfloat16()
    start = time.perf_counter()
    _, exact, _ = torch.linalg.svd(weight.float(), full_matrices=False)
    full = time.perf_counter() - start
    print(f"| {rows}×{columns}, k={top_k} | seconds | × torch.linalg.svd | σ₁ found / σ₁ | top-k energy |")
    print("|---|---|---|---|---|")
    print(f"| torch.linalg.svd | {full:.1f} | 1 | 1 | 1 |")
    for dtype in (torch.float32, torch.bfloat16):
        stored = weight.to(dtype)
        times = []
        for seed in range(runs):
            start = time.perf_counter()
            found = top_subspace(stored, top_k, seed)
            times.append(time.perf_counter() - start)
        ours = statistics.median(times)
        captured = torch.linalg.svdvals(found.basis.mT @ weight.float())
        energy = float(captured.square().sum() / exact[:top_k].square().sum())
        name = str(dtype).removeprefix("torch.")
        print(
            f"| block Krylov, {name} | {ours:.2f} | {full / ours:.0f}× faster | {captured[0] / exact[0]:.6f} | "
            f"{energy:.4f} |"
        )
