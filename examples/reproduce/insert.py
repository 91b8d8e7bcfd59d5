"""What insert resists, by construction: shares of the control's progress at the best learning rate, on any model.

Each model is hardened in several ways, and each result is attacked with every training, its rate searched. A row is
what was trained, a column is how the model was hardened. What hardening costs stands in a second table: parameters,
bytes, how far the logits are from the base's, and the time of a forward pass of one token.

    python examples/reproduce/insert.py examples/tiny_llama/model --out insert
    python examples/reproduce/insert.py path/to/SmolLM2-135M-Instruct path/to/gemma-3-270m --out insert --real

Finished hardenings and runs are kept under ``--out``: the same command goes on where it was interrupted, with more
trainings or constructions too. It takes the accelerator that is there. ``--minutes`` ends it in time, with the table of
what is finished.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from setting import markdown
from transformers import AutoConfig

from specdef_cli import HardenOptions, harden, load_model
from specdef_cli.attack import AttackOptions, attack
from specdef_cli.attack.suite import AttackTable, Suite
from specdef_cli.attack.trainings.table import Training
from specdef_cli.checkpoint.manifest import read_manifest
from specdef_cli.hardening.verify import compare_outputs
from specdef_cli.runtime.fixed_batch import model_outputs

CONSTRUCTIONS: Mapping[str, dict[str, Any]] = {
    "fold": {"method": "fold"},
    "fold-scales": {"method": "auto", "allow_code": True},
    "insert": {"method": "insert"},
    "insert-paper": {"method": "insert", "schedule": "constant", "alpha": 1e4, "top_k": 25},
}
BUDGETS: Mapping[bool, dict[str, Any]] = {
    False: {"steps": 30, "batch_size": 8, "sequence_length": 64, "eval_every": 15, "eval_sequences": 64},
    True: {"steps": 10, "batch_size": 4, "sequence_length": 96, "eval_every": 5, "eval_sequences": 24},
}
"""By whether the model is a real one."""


def trainings(layers: int) -> dict[str, Training]:
    """What is trained, by the name that ``--trained`` takes.

    Args:
        layers: Blocks of the model.
    """
    last = tuple(f"*layers.{layer}.*" for layer in range(layers // 2, layers))
    later = tuple(f"*layers.{layer}.*" for layer in range(1, layers))
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {
        "full": Training("full"),
        "lora": Training("lora", 16),
        "lora-default": Training("lora-default", 16),
        "last-half": Training("full", where=last, name="the last half of the layers"),
        "all-but-first": Training("full", where=later, name="all layers but the first"),
        "embeddings": Training("full", where=("*embed_tokens.weight",), name="embeddings alone"),
        "norms": Training("full", where=("*norm.weight",), name="norms alone"),
        **{part: Training("full", where=(f"*.{part}.weight",), name=f"{part} alone") for part in parts},
        "ia3": Training("ia3"),
    }


def hardened(model: Path, name: str, out: Path) -> Path:
    """The model hardened in one way; made once."""
    directory = out / f"{model.name}-{name}"
    if not directory.is_dir():
        harden(HardenOptions(str(model), directory, **CONSTRUCTIONS[name]))
    return directory


def shares(model: Path, directory: Path, name: str, training: Training, out: Path, real: bool) -> tuple[str, str]:
    """How far one training gets, as a share of the same training's on the control, and its best rate."""
    data = {}
    if real:  # no text of ours: a model of programs and one of prose both have this to learn
        text = out / "topics.txt"
        if not text.exists():
            text.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
        data = {"dataset": str(text)}
    options = AttackOptions(
        model=directory,
        control=model,
        out=out / "reports" / f"{model.name}-{name}",
        runs=out / "runs",
        suite=Suite("insert", (AttackTable((training,), learning_rates="search"),)),
        retained="none",
        **data,
        **BUDGETS[real],
    )
    report = attack(options)
    found = next(attack for attack in report.attacks if attack.subject == "model")
    return f"{report.share(found) or 0.0:.1%}", f"{found.best_learning_rate:.0e}"


def seconds_per_token(model: Any, repeats: int = 8) -> float:
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


def cost(model: Path, directory: Path, name: str) -> tuple[str, ...]:
    """A row of the second table, in float32 and bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures, times = [], []
    for dtype in (torch.float32, torch.bfloat16):
        outputs = []
        for path in (model, directory):
            loaded = load_model(path, dtype=dtype, device=device).eval()
            outputs.append(model_outputs(loaded))
            if dtype == torch.float32:
                times.append(seconds_per_token(loaded))
            del loaded
        compared = compare_outputs(*outputs)
        figures.append("equal" if compared.equal else f"{compared.relative:.1e}")
    manifest = read_manifest(directory)
    added = sum(layer.out_features**2 for layer in manifest.inserted)
    added += sum(module.parameters_added for module in manifest.scaled)
    size = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (model, directory)]
    return (
        name,
        f"{added:,}",
        f"{(size[1] - size[0]) / 1e6:+.1f} MB",
        *figures,
        f"{1e3 * times[0]:.1f} → {1e3 * times[1]:.1f} ms",
    )


def main() -> None:
    """Harden, attack, print two Markdown tables a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", help="directories of base models")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--real", action="store_true", help="few short steps on outside text, as a real model takes")
    parser.add_argument("--constructions", nargs="+", choices=CONSTRUCTIONS, default=list(CONSTRUCTIONS))
    parser.add_argument("--trained", nargs="+", default=None, help="some of: full, lora, last-half, embeddings, …")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    for model in arguments.models:
        known = trainings(AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers)
        chosen = arguments.trained or list(known)
        cells: dict[tuple[str, str], tuple[str, str]] = {}
        for trained in chosen:
            for name in arguments.constructions:
                if time.monotonic() < end:
                    directory = hardened(model, name, arguments.out)
                    cells[trained, name] = shares(model, directory, name, known[trained], arguments.out, arguments.real)
                    print(f"{model.name} {name} {trained}:", *cells[trained, name], file=sys.stderr, flush=True)
        rows = (
            (
                known[trained].label,
                *(" at ".join(cells.get((trained, name), ("",))) for name in arguments.constructions),
            )
            for trained in chosen
        )
        costs = [cost(model, hardened(model, name, arguments.out), name) for name in arguments.constructions]
        print(f"\n{model.name}: share of the control's progress, and the best rate\n")
        print(markdown(("trained", *arguments.constructions), rows))
        header = ("construction", "parameters added", "size", "logits, float32", "logits, bfloat16", "one token")
        print(f"\n{model.name}: what it costs\n")
        print(markdown(header, costs))


if __name__ == "__main__":
    main()
