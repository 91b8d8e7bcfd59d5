"""The exact symmetries of a family: value and output, query and key, up and down, a norm and its readers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from specdef_cli.model.body import (
    Body,
    Found,
    Indices,
    NotOnDisk,
    PairKind,
    Side,
    SymmetricPair,
    Symmetries,
    described_bodies,
    expert_tensors,
    experts_up_down,
    generic,
    join,
    singles,
    up_down,
)
from specdef_cli.model.families import Attention, Experts, Mlp, Stack
from specdef_cli.model.skeleton import Skeleton, output_embeddings


@dataclass(frozen=True)
class _Heads:
    """Geometry of an attention sublayer: which row of a projection belongs to which head and dimension."""

    queries: int
    keys: int
    dim: int
    fused: Literal["stacked", "per_head"] | None

    def row(self, part: Literal["query", "key", "value"], head: int, offset: int) -> int:
        """The row of the projection for one dimension of a head."""
        place = ("query", "key", "value").index(part)
        if self.fused == "per_head":
            return (3 * head + place) * self.dim + offset
        before = (0, self.queries, self.queries + self.keys)[place] if self.fused else 0
        return (before + head) * self.dim + offset

    def group(self, key_head: int) -> range:
        """The query heads that attend with a key head."""
        width = self.queries // self.keys
        return range(key_head * width, (key_head + 1) * width)


def value_output(body: Body, block: str, layer: Attention) -> Found:
    """v_h → D v_h, o_h → o_h D⁻¹ for every key/value head; all query heads of its group read the same D."""
    if _clips(body, layer):
        clamp = f"{layer.clip} = {getattr(body.config, str(layer.clip))}"
        yield f"value_output and query_key do not hold: {clamp} clamps queries, keys and values."
        return
    module = join(block, layer.path)
    heads = _heads(body, module, layer)
    channels = [(head, offset) for head in range(heads.keys) for offset in range(heads.dim)]
    values = tuple((heads.row("value", head, offset),) for head, offset in channels)
    outputs = tuple(tuple(query * heads.dim + offset for query in heads.group(head)) for head, offset in channels)
    sides = (
        *body.rows(join(module, layer.value), values, 1),
        *body.columns(join(module, layer.output), outputs, -1),
    )
    yield SymmetricPair(join(module, "value_output"), "value_output", len(channels), sides)


def query_key(body: Body, block: str, layer: Attention) -> Found:
    """q → q/s, k → k·s, s shared by the two channels of a RoPE plane; through the gains of a q/k norm."""
    module = join(block, layer.path)
    if layer.query_norm is not None:
        if body.family.gain == "one_plus":
            yield "query_key does not hold: the q/k norms' gain is stored as 1+w, which rounds."
            return
        yield (
            "query_key reaches the gains of the q/k norms only: q_proj and k_proj stand before those norms, which "
            "undo any scale."
        )
    if _clips(body, layer):
        return
    heads = _heads(body, module, layer)
    rotated = 0
    if layer.rope:  # two channels of a head for each frequency that the model keeps
        rotated = 2 * body.module.get_submodule("rotary_emb").get_buffer("inv_freq").numel()
    planes = [(offset, offset + rotated // 2) for offset in range(rotated // 2)]
    free = [(offset,) for offset in range(rotated, heads.dim)]
    for suffix, offsets in (("query_key", planes), ("query_key_unrotated" if rotated else "query_key", free)):
        if not offsets:
            continue
        if layer.query_norm is not None and layer.norm_width == "head":
            # One gain vector serves all heads.
            queries: Indices = tuple(offsets)
            keys: Indices = queries
        else:
            queries = tuple(
                tuple(heads.row("query", query, offset) for query in heads.group(head) for offset in plane)
                for head in range(heads.keys)
                for plane in offsets
            )
            keys = tuple(
                tuple(heads.row("key", head, offset) for offset in plane)
                for head in range(heads.keys)
                for plane in offsets
            )
        sides = (
            *body.rows(join(module, layer.query_norm or layer.query), queries, -1),
            *body.rows(join(module, layer.key_norm or layer.key), keys, 1),
        )
        yield SymmetricPair(join(module, suffix), "query_key", len(keys), sides)


def _clips(body: Body, layer: Attention) -> bool:
    return layer.clip is not None and getattr(body.config, layer.clip, None) is not None


def _heads(body: Body, module: str, layer: Attention) -> _Heads:
    queries = int(body.config.num_attention_heads)
    keys = int(getattr(body.config, "num_key_value_heads", None) or queries)
    dim = body.in_features(join(module, layer.output)) // queries
    # Families without grouped-query attention may carry the key all the same; the projection decides.
    if layer.fused is None:
        keys = body.out_features(join(module, layer.key)) // dim
    return _Heads(queries, keys, dim, layer.fused)


def symmetries(skeleton: Skeleton) -> Symmetries:
    """Find the symmetric pairs of a checkpoint."""
    found: list[SymmetricPair | str] = []
    bodies = [Body(skeleton, path, family) for path, family in described_bodies(skeleton.model)]
    if not bodies:
        name = type(skeleton.model).__name__
        found.append(f"{name}: this family is not described, so no symmetric pairs are known in it.")
    for body in bodies:
        found += _in_body(body)
    pairs = tuple(part for part in found if isinstance(part, SymmetricPair))
    notes = dict.fromkeys(part for part in found if isinstance(part, str))
    return Symmetries(pairs, tuple(notes))


def symmetric_pairs(model: PreTrainedModel) -> tuple[SymmetricPair, ...]:
    """The symmetric pairs of a model in memory, by the names of its parameters."""
    return symmetries(Skeleton.around(model)).pairs


def _in_body(body: Body) -> Found:
    unknown = _undescribed(body)
    if unknown:
        name = type(body.module).__name__
        yield f"{name}: {', '.join(unknown)} are not described, so no symmetric pairs are known."
        return
    for stack in body.family.stacks:
        for block in body.blocks(stack):
            for layer in body.sublayers(stack, block):
                yield from _in_sublayer(body, block, layer)
            norms = (layer.norm for layer in body.sublayers(stack, block) if layer.norm is not None)
            for norm in dict.fromkeys(norms):
                yield from _attempt("norm_readers", norm_readers(body, stack, block, norm))
    for stack in body.family.stacks:
        yield from _attempt("norm_readers", final_norm(body, stack))
    yield from _attempt("norm_readers", masked_head_norm(body))
    for suffix, reason in body.family.unpaired:
        if any(name.endswith(f".{suffix}") for name in body.skeleton.parameters):
            yield f"{suffix.removesuffix('.weight')} has no pair: {reason}."
    if body.family.is_post_norm:
        yield "Norms inside the blocks have no readers' pair: their output is also added to the residual stream."


def _in_sublayer(body: Body, block: str, layer: Attention | Mlp | Experts) -> Found:
    if isinstance(layer, Attention):
        yield from _attempt("value_output", value_output(body, block, layer))
        yield from _attempt("query_key", query_key(body, block, layer))
    elif isinstance(layer, Mlp):
        yield from _attempt("up_down", up_down(body, block, layer))
    else:
        yield from _attempt("up_down", experts_up_down(body, block, layer))
        if layer.shared is not None:
            yield from _attempt("up_down", up_down(body, block, layer.shared))


def _attempt(kind: PairKind, search: Found) -> Found:
    """Run a search; a note replaces its pairs if a tensor is missing on disk."""
    found: list[SymmetricPair | str] = []
    try:
        found.extend(search)
    except NotOnDisk as missing:
        found = [part for part in found if isinstance(part, str)]
        parameter = generic(str(missing))
        found.append(f"{kind} does not hold where {parameter} is not one plain tensor on disk.")
    yield from found


def _undescribed(body: Body) -> list[str]:
    """Parameters inside the blocks that the description does not account for (a cross-attention, say)."""
    unknown = set()
    extra = tuple(f".{suffix}" for suffix, _ in body.family.unpaired)
    for stack in body.family.stacks:
        for block in body.blocks(stack):
            known = [join(block, name) for name in body.family.output_norms]
            for layer in body.sublayers(stack, block):
                known += [join(block, layer.norm)] if layer.norm else []
                known += [join(block, part) for part in _parts(layer)]
            for name in body.skeleton.parameters:
                if not name.startswith(f"{block}.") or name.endswith(extra):
                    continue
                if not any(name == path or name.startswith(f"{path}.") for path in known):
                    unknown.add(generic(name))
    return sorted(unknown)


def _parts(layer: Attention | Mlp | Experts) -> list[str]:
    """Modules and parameters that a sublayer is described by, relative to the block."""
    if isinstance(layer, Experts):
        readers = [name for reader in layer.readers for name in (reader, reader.removesuffix(".weight"))]
        return [layer.path, *readers, *([layer.shared.path] if layer.shared else [])]
    norms = (layer.query_norm, layer.key_norm) if isinstance(layer, Attention) else ()
    return [join(layer.path, part) for part in (*layer.readers, layer.writer, *norms) if part]


def norm_readers(body: Body, stack: Stack, block: str, norm: str) -> Found:
    """gain → D gain (and bias), every linear that reads the norm → W D⁻¹."""
    module = join(block, norm)
    obstacle = _gain_obstacle(body)
    if obstacle is not None:
        yield obstacle
        return
    layers = (layer for layer in body.sublayers(stack, block) if layer.norm == norm)
    yield _norm_pair(body, module, (side for layer in layers for side in _reading(body, block, layer)))


def final_norm(body: Body, stack: Stack) -> Found:
    """The norm after the last block, and what reads it: the head, or every cross-attention of the decoder."""
    if stack.final_norm is not None:
        path = join(body.path, stack.final_norm)
    else:
        path = next((join(block, body.family.output_norms[-1]) for block in reversed(body.blocks(stack))), "")
    if path not in body.skeleton.modules or not path:
        return
    obstacle = _gain_obstacle(body)
    if obstacle is not None:
        yield obstacle
        return
    readers, reason = _final_readers(body, stack)
    if not readers:
        yield f"{path} has no pair: {reason}."
        return
    yield _norm_pair(body, path, (side for reader in readers for side in _columns(body, reader)))


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
        yield f"{norm} has no pair: {decoder} is tied to the embeddings."
        return
    yield _norm_pair(body, norm, _columns(body, decoder))


def _gain_obstacle(body: Body) -> str | None:
    """Why no gain of this family can be scaled exactly, if so."""
    if body.family.gain == "one_plus":
        return "norm_readers does not hold: norms store their gain as 1+w, and scaling that rounds."
    if body.family.gain == "none":
        return "norm_readers does not exist: the norms have no gain."
    return None


def _norm_pair(body: Body, norm: str, readers: Iterable[Side]) -> SymmetricPair:
    width = int(body.skeleton.parameters[f"{norm}.weight"].shape[0])
    sides = (*body.rows(norm, singles(width), 1), *readers)
    return SymmetricPair(join(norm, "norm_readers"), "norm_readers", width, sides)


def _columns(body: Body, linear: str) -> list[Side]:
    """All input channels of a linear."""
    return body.columns(linear, singles(body.in_features(linear)), -1)


def _reading(body: Body, block: str, layer: Attention | Mlp | Experts) -> list[Side]:
    """The columns with which a sublayer reads its norm."""
    if isinstance(layer, Experts):
        return _experts_reading(body, block, layer)
    crossing = isinstance(layer, Attention) and layer.cross
    parts = layer.readers[:1] if crossing else layer.readers
    return [side for part in parts for side in _columns(body, join(block, layer.path, part))]


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
