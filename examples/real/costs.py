"""What hardening costs: parameters, bytes, how far the logits are from the base's, and the time of a token.

    python examples/real/costs.py models/smollm2-135m-instruct models/hardened/smollm2-135m-instruct-factors

compares each hardened directory with the base, and prints a Markdown table. It takes the accelerator that is there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from specdef_cli import load_model
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.hardening.verify import compare_outputs
from specdef_cli.model.inputs import model_outputs

HEADER = ("hardened", "parameters added", "size", "logits, float32", "logits, bfloat16", "one token, base → hardened")


def seconds_per_token(model: Any, repeats: int = 20) -> float:
    """Seconds of a forward pass of one token; the least of some."""
    token = torch.tensor([[7]], device=model.device)
    taken = []
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.perf_counter()
            model(input_ids=token)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
    return min(taken)


def cost(base: Path, hardened: Path) -> tuple[str, ...]:
    """A row of the table; times are of float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    differences, times = [], []
    for dtype in (torch.float32, torch.bfloat16):
        outputs = []
        for directory in (base, hardened):
            model = load_model(directory, dtype=dtype, device=device).eval()
            outputs.append(model_outputs(model))
            if dtype == torch.float32:
                times.append(seconds_per_token(model))
            del model
        compared = compare_outputs(*outputs)
        differences.append("equal" if compared.equal else f"{compared.relative:.1e}")
    size = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (base, hardened)]
    return (
        hardened.name,
        f"{read_manifest(hardened).parameters_added:,}",
        f"{(size[1] - size[0]) / 1e6:+.1f} MB",
        *differences,
        f"{1e3 * times[0]:.1f} → {1e3 * times[1]:.1f} ms",
    )


def main() -> None:
    """Compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path, help="directory of the base model")
    parser.add_argument("hardened", type=Path, nargs="+", help="directories of what was made of it")
    given = parser.parse_args()
    rows = [HEADER, ("---",) * len(HEADER), *(cost(given.base, hardened) for hardened in given.hardened)]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
