"""The symmetric pairs of a norm: its gain with every linear that reads it."""

from __future__ import annotations

from specdef_cli.model.body import Body, Found, Side, SymmetricPair, Unpaired, expert_tensors, join, singles
from specdef_cli.model.families import Attention, Experts, Mlp, Stack
from specdef_cli.model.skeleton import output_embeddings


def norms_of(body: Body, stack: Stack, block: str) -> list[str]:
    """The norms that a block's sublayers read, relative to the block."""
    return list(dict.fromkeys(layer.norm for layer in body.sublayers(stack, block) if layer.norm is not None))


def norm_readers(body: Body, stack: Stack, block: str, norm: str) -> Found:
    """gain → D gain (and bias), every linear that reads the norm → W D⁻¹."""
    module = join(block, norm)
    obstacle = _gain_obstacle(body)
    if obstacle is not None:
        yield obstacle
        return
    width = _width(body, module)
    sides = body.rows(module, singles(width), 1)
    for layer in body.sublayers(stack, block):
        if layer.norm == norm:
            sides += _reading(body, block, layer)
    yield SymmetricPair(join(module, "norm_readers"), "norm_readers", width, tuple(sides))


def final_norm(body: Body, stack: Stack) -> Found:
    """The norm after the last block, and what reads it: the head, or every cross-attention of the decoder."""
    path = _final_norm_path(body, stack)
    if path is None or path not in body.skeleton.modules:
        return
    obstacle = _gain_obstacle(body)
    if obstacle is not None:
        yield obstacle
        return
    readers, reason = _final_readers(body, stack)
    if not readers:
        yield Unpaired("norm_readers", f"{path} has no pair: {reason}.")
        return
    width = _width(body, path)
    sides = body.rows(path, singles(width), 1)
    for reader in readers:
        sides += body.columns(reader, singles(width), -1)
    yield SymmetricPair(join(path, "norm_readers"), "norm_readers", width, tuple(sides))


def masked_head_norm(body: Body) -> Found:
    """BERT's masked-language head has a norm of its own, before the decoder."""
    decoder = _output_embeddings(body) if body.family.is_post_norm else None
    if decoder is None:
        return
    norms = [
        path
        for path, module in body.skeleton.modules.items()
        if hasattr(module, "eps") and not list(module.children()) and not path.startswith(f"{body.path}.")
    ]
    if len(norms) != 1 or not type(body.skeleton.model).__name__.endswith("ForMaskedLM"):
        return
    (norm,) = norms
    if body.is_tied(decoder):
        yield Unpaired("norm_readers", f"{norm} has no pair: {decoder} is tied to the embeddings.")
        return
    width = body.in_features(decoder)
    sides = (*body.rows(norm, singles(width), 1), *body.columns(decoder, singles(width), -1))
    yield SymmetricPair(join(norm, "norm_readers"), "norm_readers", width, sides)


def _gain_obstacle(body: Body) -> Unpaired | None:
    """Why no gain of this family can be scaled exactly, if so."""
    if body.family.gain == "one_plus":
        reason = "norm_readers does not hold: norms store their gain as 1+w, and scaling that rounds."
        return Unpaired("norm_readers", reason)
    if body.family.gain == "none":
        return Unpaired("norm_readers", "norm_readers does not exist: the norms have no gain.")
    return None


def _width(body: Body, norm: str) -> int:
    return int(body.skeleton.parameters[f"{norm}.weight"].shape[0])


def _reading(body: Body, block: str, layer: Attention | Mlp | Experts) -> list[Side]:
    """The columns with which a sublayer reads its norm."""
    if isinstance(layer, Attention):
        parts = [layer.query] if layer.cross else [layer.query, layer.key, layer.value]
    elif isinstance(layer, Mlp):
        parts = [layer.gate, layer.up] if layer.gate else [layer.up]
    else:
        return _experts_reading(body, block, layer)
    sides: list[Side] = []
    for part in dict.fromkeys(parts):
        linear = join(block, layer.path, part)
        sides += body.columns(linear, singles(body.in_features(linear)), -1)
    return sides


def _experts_reading(body: Body, block: str, layer: Experts) -> list[Side]:
    module = join(block, layer.path)
    stacked = body.skeleton.parameters[f"{module}.gate_up_proj"]
    axis = 1 if layer.transposed else 2
    indices = singles(int(stacked.shape[axis]))
    sides = [body.side(join(block, reader), 1, indices, -1) for reader in layer.readers]
    gates, ups = expert_tensors(body, module, "gate"), expert_tensors(body, module, "up")
    if gates is None or ups is None:
        sides.append(body.side(f"{module}.gate_up_proj", axis, indices, -1))
    else:
        sides += [Side(tensor, 1, indices, -1) for tensor in (*gates, *ups)]
    if layer.shared is not None:
        sides += _reading(body, block, layer.shared)
    return sides


def _final_norm_path(body: Body, stack: Stack) -> str | None:
    if stack.final_norm is not None:
        return join(body.path, stack.final_norm)
    blocks = body.blocks(stack)
    return join(blocks[-1], body.family.output_norms[-1]) if blocks else None


def _final_readers(body: Body, stack: Stack) -> tuple[list[str], str]:
    """Paths of the linears that read the stack's final norm, or why there are none to scale."""
    model, heads = body.skeleton.model, dict(body.family.heads)
    crossing = [
        join(block, layer.path, part)
        for other in body.family.stacks
        for block in body.blocks(other)
        for layer in body.sublayers(other, block)
        if isinstance(layer, Attention) and layer.cross
        for part in (layer.key, layer.value)
    ]
    if crossing and stack is body.family.stacks[0]:
        # The encoder's output is also a result of the bare model; with a head, only the logits are.
        return (crossing, "") if heads.get(type(model).__name__, "") is None else ([], "it is an output")
    if model is body.module and type(model).__name__ not in heads:
        return [], "its output leaves the model"
    known, head = _head(body)
    if not known:
        return [], "its output leaves the model, or enters a head that is not described"
    if head is None or not body.has(f"{head}.weight"):
        return [], "its output leaves the model"
    if body.is_tied(head):
        return [], f"{head} is tied to the embeddings"
    return [head], ""


def _head(body: Body) -> tuple[bool, str | None]:
    """Whether the head is one that the family's description knows, and the linear that reads the final norm."""
    model = body.skeleton.model
    if body.path in ("", getattr(model, "base_model_prefix", ""), "transformer"):
        for suffix, reader in body.family.heads:
            if type(model).__name__.endswith(suffix):
                return True, reader if reader is not None else _output_embeddings(body)
    return False, None


def _output_embeddings(body: Body) -> str | None:
    """Path of the linear that turns hidden states into logits over the vocabulary."""
    model, modules = body.skeleton.model, body.skeleton.modules
    output = output_embeddings(model)
    return next((path for path, module in modules.items() if output is not None and module is output), None)
