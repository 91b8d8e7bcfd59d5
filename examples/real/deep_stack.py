"""Make a deep model out of a shallow one: its layers, far apart, with random layers between them that add little.

What a staircase of exponents does at 60 or 80 layers cannot be told from a model of four, and a pretrained model of
that depth does not fit on a laptop. Here the depth is real and the width is small: the trained layers keep their order,
and the random ones write so little to the residual stream that the loss hardly changes, while every one of them trains.

    python examples/real/deep_stack.py examples/tiny_llama/model --layers 60 --out demo/deep-60
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

WRITES = 0.1
"""What a random layer writes to the residual stream, as a share of what its initialization would."""


def deepen(directory: Path, layers: int, seed: int = 0) -> Any:
    """A model with ``layers`` layers, among which those of the checkpoint stand at equal distances.

    Args:
        directory: A checkpoint whose decoder layers are ``model.layers`` (Llama and its relatives).
        layers: How many layers the result has; at least as many as the checkpoint.
        seed: Of the random layers.
    """
    shallow = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = AutoConfig.from_pretrained(directory)
    trained = config.num_hidden_layers
    config.num_hidden_layers = layers
    set_seed(seed)
    deep = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    places = {index * layers // trained: index for index in range(trained)}
    with torch.no_grad():
        for place, layer in enumerate(deep.model.layers):
            if place in places:
                layer.load_state_dict(shallow.model.layers[places[place]].state_dict())
            else:
                layer.self_attn.o_proj.weight *= WRITES
                layer.mlp.down_proj.weight *= WRITES
    rest = {name: tensor for name, tensor in shallow.state_dict().items() if ".layers." not in name}
    deep.load_state_dict(rest, strict=False)
    return deep


def main() -> None:
    """Write the deep model with the tokenizer of the shallow one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="directory of the shallow model")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True, help="must not exist")
    options = parser.parse_args()
    unfinished = options.out.with_name(f".{options.out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    deepen(options.model, options.layers).save_pretrained(unfinished)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(options.model / name, unfinished / name)
    unfinished.rename(options.out)


if __name__ == "__main__":
    main()
