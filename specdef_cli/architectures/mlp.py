"""The symmetric pairs of an MLP sublayer, dense or a mixture of experts: its up with its down projection."""

from __future__ import annotations

import re
from typing import Literal

from specdef_cli.architectures.body import Body, NotOnDisk, join, singles
from specdef_cli.architectures.families import HOMOGENEOUS_ACTIVATIONS, Experts, Mlp
from specdef_cli.architectures.pairs import Found, Side, SymmetricPair, Unpaired


def up_down(body: Body, block: str, layer: Mlp) -> Found:
    """up → D up, down → down D⁻¹: the MLP is linear in its up branch, or its activation is homogeneous."""
    module = join(block, layer.path)
    up, down = join(module, layer.up), join(module, layer.down)
    if layer.gate is None:
        activation = getattr(body.config, layer.activation)
        if activation not in HOMOGENEOUS_ACTIVATIONS:
            between = f"the activation {activation!r} stands between {layer.up} and {layer.down}"
            yield Unpaired("up_down", f"up_down does not hold: {between}.")
            return
    width = body.in_features(down)
    rows = singles(width, width) if layer.fused else singles(width)
    sides = (*body.rows(up, rows, 1), *body.columns(down, singles(width), -1))
    yield SymmetricPair(join(module, "up_down"), "up_down", width, sides)


def experts_up_down(body: Body, block: str, layer: Experts) -> Found:
    """The same for each expert of a mixture."""
    module = join(block, layer.path)
    if not layer.gated_linearly:
        reason = "the up branch is clamped and 1 is added to it before the gate"
        yield Unpaired("up_down", f"up_down does not hold in {layer.path}: {reason}.")
        return
    ups, downs = expert_tensors(body, module, "up"), expert_tensors(body, module, "down")
    experts, _, width = body.skeleton.parameters[f"{module}.down_proj"].shape
    for expert in range(experts):
        if ups is not None:
            up = Side(ups[expert], 0, singles(width), 1)
        else:
            up = Side(body.tensor(f"{module}.gate_up_proj"), 1, singles(width, width), 1, expert)
        if downs is not None:
            down = Side(downs[expert], 1, singles(width), -1)
        else:
            down = Side(body.tensor(f"{module}.down_proj"), 2, singles(width), -1, expert)
        yield SymmetricPair(join(module, str(expert), "up_down"), "up_down", int(width), (up, down))


def expert_tensors(body: Body, module: str, part: Literal["gate", "up", "down"]) -> list[str] | None:
    """The tensor of each expert, where experts are stored one by one; ``None`` where they are stacked on disk.

    Raises:
        NotOnDisk: There are neither all of these nor a stack.
    """
    parameter = f"{module}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
    names = body.skeleton.names
    if names.tensor(parameter) is not None:
        return None
    suffixes = {"gate": "w1|gate_proj", "up": "w3|up_proj", "down": "w2|down_proj"}[part]
    pattern = re.compile(rf"\.experts\.(\d+)\.(?:{suffixes})\.weight$")
    found = {int(match[1]): name for name in names.sources.get(parameter, ()) if (match := pattern.search(name))}
    experts, wide, narrow = body.skeleton.parameters[parameter].shape
    if sorted(found) != list(range(experts)):
        raise NotOnDisk(parameter)
    expected = (wide, narrow) if part == "down" else (wide // 2, narrow)
    for name in found.values():
        body.skeleton.require_shape(name, expected, parameter)
    return [found[expert] for expert in range(experts)]
