"""The exact symmetries of a family: value and output, query and key, up and down, a norm and its readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from transformers import PreTrainedModel

from specdef_cli.model.body import (
    Body,
    Found,
    NoPair,
    Power,
    Side,
    SymmetricPair,
    Symmetries,
    described_bodies,
    join,
    singles,
)
from specdef_cli.model.families import HOMOGENEOUS_ACTIVATIONS, Attention, Experts, Mlp, Stack
from specdef_cli.model.skeleton import Skeleton, output_embeddings


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
    unknown = body.undescribed()
    if unknown:
        name = type(body.module).__name__
        yield f"{name}: {', '.join(unknown)} are not described, so no symmetric pairs are known."
        return
    for stack in body.family.stacks:
        for block in body.blocks(stack):
            layers = list(body.sublayers(stack, block))
            for layer in layers:
                for search in SEARCHES[type(layer)]:
                    yield from _attempt(search(body, block, layer))
            for norm in dict.fromkeys(layer.norm for layer in layers if layer.norm is not None):
                yield from _attempt(norm_readers(body, stack, block, norm))
    for stack in body.family.stacks:
        yield from _attempt(final_norm(body, stack))
    yield from _attempt(head_norm(body))
    for suffix, reason in body.family.unpaired:
        if any(name.endswith(f".{suffix}") for name in body.skeleton.parameters):
            yield f"{suffix.removesuffix('.weight')} has no pair: {reason}."
    if body.family.is_post_norm:
        yield "Norms inside the blocks have no readers' pair: their output is also added to the residual stream."


def _attempt(search: Found) -> Found:
    """Run a search; a note replaces its pairs if one does not hold."""
    found: list[SymmetricPair | str] = []
    try:
        found.extend(search)
    except NoPair as reason:
        found = [*(part for part in found if isinstance(part, str)), str(reason)]
    yield from found


@dataclass(frozen=True)
class _Heads:
    """Geometry of an attention sublayer: which row of a projection belongs to which head and dimension."""

    queries: int
    keys: int
    dim: int
    fused: Literal["stacked", "per_head"] | None = None

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


def _heads(body: Body, module: str, layer: Attention) -> _Heads:
    clamp = None if layer.clip is None else getattr(body.config, layer.clip, None)
    if clamp is not None:
        raise NoPair(f"value_output and query_key do not hold: {layer.clip} = {clamp} clamps queries, keys and values.")
    queries = int(body.config.num_attention_heads)
    keys = int(getattr(body.config, "num_key_value_heads", None) or queries)
    dim = body.in_features(join(module, layer.output)) // queries
    # Families without grouped-query attention may carry the key all the same; the projection decides.
    if layer.fused is None:
        keys = body.out_features(join(module, layer.key)) // dim
    return _Heads(queries, keys, dim, layer.fused)


def value_output(body: Body, block: str, layer: Attention) -> Found:
    """v_h → D v_h, o_h → o_h D⁻¹ for every key/value head; all query heads of its group read the same D."""
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
            raise NoPair("query_key does not hold: the q/k norms' gain is stored as 1+w, which rounds.")
        yield (
            "query_key reaches the gains of the q/k norms only: q_proj and k_proj stand before those norms, which "
            "undo any scale."
        )
    heads = _heads(body, module, layer)
    if layer.query_norm is not None and layer.norm_width == "head":
        heads = _Heads(1, 1, heads.dim)  # one gain serves all heads
    rotated = 0
    if layer.rope:  # two channels of a head for each frequency that the model keeps
        rotated = 2 * body.module.get_submodule("rotary_emb").get_buffer("inv_freq").numel()
    planes = [(offset, offset + rotated // 2) for offset in range(rotated // 2)]
    free = [(offset,) for offset in range(rotated, heads.dim)]
    for suffix, offsets in (("query_key", planes), ("query_key_unrotated" if rotated else "query_key", free)):
        if not offsets:
            continue
        channels = [(head, plane) for head in range(heads.keys) for plane in offsets]
        queries = tuple(
            tuple(heads.row("query", query, offset) for query in heads.group(head) for offset in plane)
            for head, plane in channels
        )
        keys = tuple(tuple(heads.row("key", head, offset) for offset in plane) for head, plane in channels)
        sides = (
            *body.rows(join(module, layer.query_norm or layer.query), queries, -1),
            *body.rows(join(module, layer.key_norm or layer.key), keys, 1),
        )
        yield SymmetricPair(join(module, suffix), "query_key", len(keys), sides)


def up_down(body: Body, block: str, layer: Mlp) -> Found:
    """up → D up, down → down D⁻¹: the MLP is linear in its up branch, or its activation is homogeneous."""
    module = join(block, layer.path)
    activation = "linear" if layer.gate is not None else getattr(body.config, layer.activation)
    if activation not in HOMOGENEOUS_ACTIVATIONS:
        between = f"the activation {activation!r} stands between {layer.up} and {layer.down}"
        raise NoPair(f"up_down does not hold: {between}.")
    up, down = join(module, layer.up), join(module, layer.down)
    width = body.in_features(down)
    rows = singles(width, width) if layer.fused else singles(width)
    sides = (*body.rows(up, rows, 1), *body.columns(down, singles(width), -1))
    yield SymmetricPair(join(module, "up_down"), "up_down", width, sides)


def experts_up_down(body: Body, block: str, layer: Experts) -> Found:
    """As :func:`up_down`, for each expert of a mixture."""
    if not layer.gated_linearly:
        reason = "the up branch is clamped and 1 is added to it before the gate"
        raise NoPair(f"up_down does not hold in {layer.path}: {reason}.")
    module = join(block, layer.path)
    width = int(body.skeleton.parameters[f"{module}.down_proj"].shape[2])
    ups = _expert_sides(body, f"{module}.gate_up_proj", 0, range(width, 2 * width), 1)
    downs = _expert_sides(body, f"{module}.down_proj", 1, range(width), -1)
    for expert, sides in enumerate(zip(ups, downs, strict=True)):
        yield SymmetricPair(join(module, str(expert), "up_down"), "up_down", width, sides)


def _expert_sides(body: Body, parameter: str, axis: int, stacked: range, power: Power) -> list[Side]:
    """One side for each expert: of its own (up or down) tensor, or at the positions ``stacked`` of its block."""
    own = singles(len(stacked))
    if parts := expert_tensors(body, parameter):
        return [Side(tensor, axis, own, power) for tensor in parts[-1]]
    tensor, indices = body.tensor(parameter), singles(len(stacked), stacked.start)
    return [
        Side(tensor, axis + 1, indices, power, expert) for expert in range(len(body.skeleton.parameters[parameter]))
    ]


def expert_tensors(body: Body, parameter: str) -> list[tuple[str, ...]]:
    """The tensors of experts stored one by one, for each part that a parameter stacks: gate and up, or down.

    None where they are stacked on disk.

    Raises:
        NoPair: There are neither all of these nor a stack.
    """
    names = body.skeleton.names
    if names.tensor(parameter) is not None:
        return []
    parts = [*names.stacked.get(parameter, {}).values()]
    experts, wide, narrow = body.skeleton.parameters[parameter].shape
    if {*map(len, parts)} != {experts}:
        body.tensor(parameter)  # which refuses
    for name in chain(*parts):
        body.skeleton.require_shape(name, (wide // len(parts), narrow), parameter)
    return parts


def norm_readers(body: Body, stack: Stack, block: str, norm: str) -> Found:
    """gain → D gain (and bias), every linear that reads the norm → W D⁻¹."""
    layers = (layer for layer in body.sublayers(stack, block) if layer.norm == norm)
    yield _norm_pair(body, join(block, norm), (side for layer in layers for side in _reading(body, block, layer)))


def final_norm(body: Body, stack: Stack) -> Found:
    """The norm after the last block, and what reads it: the head, or every cross-attention of the decoder."""
    if stack.final_norm is not None:
        norm = join(body.path, stack.final_norm)
    else:
        norm = next((join(block, body.family.output_norms[-1]) for block in reversed(body.blocks(stack))), "")
    if norm and norm in body.skeleton.modules:
        yield _norm_pair(body, norm, _after_blocks(body, stack, norm))


def head_norm(body: Body) -> Found:
    """The norm of a masked-language head, and the output embeddings that read it."""
    norm = body.family.head_norm
    if norm is not None and norm in body.skeleton.modules:
        yield _norm_pair(body, norm, _in_head(body, norm, _output_embeddings(body)))


def _norm_pair(body: Body, norm: str, readers: Iterable[Side]) -> SymmetricPair:
    if body.family.gain == "one_plus":
        raise NoPair("norm_readers does not hold: norms store their gain as 1+w, and scaling that rounds.")
    if body.family.gain == "none":
        raise NoPair("norm_readers does not exist: the norms have no gain.")
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
    stacked = join(block, layer.path, "gate_up_proj")
    axis = 1 if layer.transposed else 2
    indices = singles(int(body.skeleton.parameters[stacked].shape[axis]))
    sides = [body.side(join(block, reader), 1, indices, -1) for reader in layer.readers]
    own = chain(*expert_tensors(body, stacked))
    return sides + ([Side(name, 1, indices, -1) for name in own] or [body.side(stacked, axis, indices, -1)])


def _after_blocks(body: Body, stack: Stack, norm: str) -> Iterator[Side]:
    """The columns that read the stack's final norm."""
    crossing = [
        join(block, layer.path, part)
        for other in body.family.stacks
        for block in body.blocks(other)
        for layer in body.sublayers(other, block)
        if isinstance(layer, Attention) and layer.cross
        for part in (layer.key, layer.value)
    ]
    if not crossing or stack is not body.family.stacks[0]:
        yield from _in_head(body, norm, _head(body))
    elif _head(body) is None:  # the encoder's output is also a result of the bare model; with a head, only logits are
        raise NoPair(f"{norm} has no pair: it is an output.")
    else:
        for linear in crossing:
            yield from _columns(body, linear)


def _in_head(body: Body, norm: str, head: str | None) -> list[Side]:
    """The columns with which a head reads the norm before it."""
    if head is None or not body.has(f"{head}.weight"):
        raise NoPair(f"{norm} has no pair: its output leaves the model, or enters a head that is not described.")
    if body.is_tied(head):
        raise NoPair(f"{norm} has no pair: {head} is tied to the embeddings.")
    return _columns(body, head)


def _head(body: Body) -> str | None:
    """The linear that reads the final norm, if the family's description knows the head."""
    model = body.skeleton.model
    if body.path in ("", getattr(model, "base_model_prefix", ""), "transformer"):
        for suffix, reader in body.family.heads:
            if type(model).__name__.endswith(suffix):
                return reader if reader is not None else _output_embeddings(body)
    return None


def _output_embeddings(body: Body) -> str | None:
    """Path of the linear that turns hidden states into logits over the vocabulary."""
    model, modules = body.skeleton.model, body.skeleton.modules
    output = output_embeddings(model)
    return next((path for path, module in modules.items() if output is not None and module is output), None)


SEARCHES: Mapping[type, tuple[Callable[[Body, str, Any], Found], ...]] = {
    Attention: (value_output, query_key),
    Mlp: (up_down,),
    Experts: (experts_up_down,),
}
"""The searches for pairs within a sublayer."""
