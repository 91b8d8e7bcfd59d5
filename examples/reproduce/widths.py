"""How far a channel can be raised within blocks of activations, by the width of a layer and of a block.

    python examples/reproduce/widths.py MODEL

Layers of other widths are made of MODEL's own channels, drawn with replacement and in any order: they have its spread
of activations and of columns, and nothing else of a real model of that width. Each gets the exponent that the profile
gguf would give the pair in front of it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from setting import markdown
from torch import Tensor, nn

from specdef_cli.hardening import calibration
from specdef_cli.hardening.calibration import default_text, drowned_energy, relative_inputs
from specdef_cli.hardening.expendable import BLOCK_LOSS, HIGHEST_IN_BLOCKS, LARGEST
from specdef_cli.model import load_model, load_tokenizer

READERS = {
    "norm before attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "norm before the MLP": ("mlp.gate_proj", "mlp.up_proj"),
    "value/output": ("self_attn.o_proj",),
    "up/down": ("mlp.down_proj",),
}
"""What reads the channels of each pair."""
WIDTHS = (1_024, 2_048, 4_096, 8_192, 14_336)
BLOCKS = {32: "Q8_0, Q4_0", 256: "K-quants"}
EVERY = 3
"""Of so many layers one is looked at."""


def main() -> None:
    """Print the median exponent of each kind of pair, by width and block."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of a base of Llama's architecture")
    directory: Path = parser.parse_args().model
    layers = seen_inputs(load_model(directory, dtype=torch.float32), directory)
    rows = []
    for block, formats in BLOCKS.items():
        for width in WIDTHS:
            drawn = [median_exponent(layers[kind], width, block) for kind in READERS]
            rows.append((formats, str(width), *drawn))
    print(markdown(["blocks", "width", *READERS], rows))


def seen_inputs(model: Any, directory: Path) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs [tokens, channels] and ‖column‖² [channels] of the readers of each kind of pair, layer by layer."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in READERS}
    for layer in model.model.layers[::EVERY]:
        for kind, paths in READERS.items():
            readers: list[nn.Linear] = [layer.get_submodule(path) for path in paths]
            norms = sum(reader.weight.detach().square().sum(0) for reader in readers)

            def see(_: nn.Module, arguments: tuple[Tensor], kind: str = kind, norms: Any = norms) -> None:
                found[kind].append((arguments[0].detach().flatten(0, -2), norms))

            readers[0].register_forward_pre_hook(see)
    tokens = load_tokenizer(directory)(default_text(), return_tensors="pt").input_ids[:, : 8 * 128].view(8, 128)
    with torch.no_grad():
        model(input_ids=tokens)
    return found


def median_exponent(layers: list[tuple[Tensor, Tensor]], width: int, block: int) -> str:
    """The exponent of the median layer, and the span of all."""
    found = sorted(exponent(*layer, width, block) for layer in layers)
    return f"{statistics.median_low(found)} ({found[0]} to {found[-1]})"


def exponent(inputs: Tensor, norms: Tensor, width: int, block: int) -> int:
    """The largest power of two for one channel of a layer drawn from these; 0 where none is within the limits."""
    drawn = torch.randint(len(norms), (width,), generator=torch.Generator().manual_seed(width))
    inputs, norms = inputs[:, drawn], norms[drawn]
    relative = relative_inputs(inputs, norms)
    exponents = range(1, HIGHEST_IN_BLOCKS + 1)
    calibration.BLOCK = calibration.WIDE_BLOCK = block
    lost = drowned_energy(relative, norms, exponents) + relative.square().mean(0) * norms
    room = (LARGEST / inputs.abs().amax(0)).log2().floor()
    possible = (lost <= BLOCK_LOSS) & (torch.tensor(exponents)[:, None] <= room)
    return int(possible.any(1).nonzero().max()) + 1 if possible.any() else 0


if __name__ == "__main__":
    main()
