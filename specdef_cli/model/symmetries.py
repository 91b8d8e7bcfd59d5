"""The exact symmetries of a family: value against output, query against key, up against down, norm against readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from specdef_cli.model.body import (
    Body,
    Found,
    Indices,
    NotOnDisk,
    PairKind,
    SymmetricPair,
    Symmetries,
    Unpaired,
    described_bodies,
    experts_up_down,
    generic,
    join,
    up_down,
)
from specdef_cli.model.families import Attention, Experts, Mlp
from specdef_cli.model.norms import final_norm, masked_head_norm, norm_readers, norms_of
from specdef_cli.model.skeleton import Skeleton


@dataclass(frozen=True)
class _Heads:
    """Geometry of an attention sublayer: which row of a projection belongs to which head and dimension."""

    queries: int
    keys: int
    dim: int
    fused: Literal["stacked", "per_head"] | None

    def query_row(self, head: int, offset: int) -> int:
        return head * (3 * self.dim if self.fused == "per_head" else self.dim) + offset

    def key_row(self, head: int, offset: int) -> int:
        if self.fused == "per_head":
            return (3 * head + 1) * self.dim + offset
        return (self.queries * self.dim if self.fused else 0) + head * self.dim + offset

    def value_row(self, head: int, offset: int) -> int:
        if self.fused == "per_head":
            return (3 * head + 2) * self.dim + offset
        return ((self.queries + self.keys) * self.dim if self.fused else 0) + head * self.dim + offset

    def group(self, key_head: int) -> range:
        """The query heads that attend with a key head."""
        width = self.queries // self.keys
        return range(key_head * width, (key_head + 1) * width)


def value_output(body: Body, block: str, layer: Attention) -> Found:
    """v_h → D v_h, o_h → o_h D⁻¹ for every key/value head; all query heads of its group read the same D."""
    if _clips(body, layer):
        clamp = f"{layer.clip} = {getattr(body.config, str(layer.clip))}"
        yield Unpaired(
            "value_output", f"value_output and query_key do not hold: {clamp} clamps queries, keys and values."
        )
        return
    module = join(block, layer.path)
    heads = _heads(body, module, layer)
    channels = [(head, offset) for head in range(heads.keys) for offset in range(heads.dim)]
    values = tuple((heads.value_row(head, offset),) for head, offset in channels)
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
            yield Unpaired("query_key", "query_key does not hold: the q/k norms' gain is stored as 1+w, which rounds.")
            return
        yield Unpaired(
            "query_key",
            "query_key reaches the gains of the q/k norms only: q_proj and k_proj stand before those norms, which "
            "undo any scale.",
        )
    if _clips(body, layer):
        return
    heads = _heads(body, module, layer)
    rotated = _rotated_dimensions(body) if layer.rope else 0
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
                tuple(heads.query_row(query, offset) for query in heads.group(head) for offset in plane)
                for head in range(heads.keys)
                for plane in offsets
            )
            keys = tuple(
                tuple(heads.key_row(head, offset) for offset in plane)
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


def _rotated_dimensions(body: Body) -> int:
    """How many channels of a head RoPE rotates: two for each frequency that the model keeps."""
    frequencies = body.module.get_submodule("rotary_emb").get_buffer("inv_freq")
    return 2 * int(frequencies.numel())


def symmetries(skeleton: Skeleton) -> Symmetries:
    """Find the symmetric pairs of a checkpoint."""
    found: list[SymmetricPair | Unpaired] = []
    bodies = [Body(skeleton, path, family) for path, family in described_bodies(skeleton.model)]
    if not bodies:
        name = type(skeleton.model).__name__
        reason = f"{name}: this family is not described, so no symmetric pairs are known in it."
        found.append(Unpaired(None, reason))
    for body in bodies:
        found += _in_body(body)
    pairs = tuple(part for part in found if isinstance(part, SymmetricPair))
    notes = dict.fromkeys(part for part in found if isinstance(part, Unpaired))
    return Symmetries(pairs, tuple(notes))


def symmetric_pairs(model: PreTrainedModel) -> tuple[SymmetricPair, ...]:
    """The symmetric pairs of a model in memory, by the names of its parameters."""
    return symmetries(Skeleton.around(model)).pairs


def _in_body(body: Body) -> Found:
    unknown = _undescribed(body)
    if unknown:
        name = type(body.module).__name__
        yield Unpaired(None, f"{name}: {', '.join(unknown)} are not described, so no symmetric pairs are known.")
        return
    for stack in body.family.stacks:
        for block in body.blocks(stack):
            for layer in body.sublayers(stack, block):
                yield from _in_sublayer(body, block, layer)
            for norm in norms_of(body, stack, block):
                yield from _attempt("norm_readers", norm_readers(body, stack, block, norm))
    for stack in body.family.stacks:
        yield from _attempt("norm_readers", final_norm(body, stack))
    yield from _attempt("norm_readers", masked_head_norm(body))
    for suffix, reason in body.family.unpaired:
        if any(name.endswith(f".{suffix}") for name in body.skeleton.parameters):
            yield Unpaired(None, f"{suffix.removesuffix('.weight')} has no pair: {reason}.")
    if body.family.is_post_norm:
        yield Unpaired(
            "norm_readers",
            "Norms inside the blocks have no readers' pair: their output is also added to the residual stream.",
        )


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
    """What a search finds; where it misses a tensor on disk, a note on that in the place of its pairs."""
    found: list[SymmetricPair | Unpaired] = []
    try:
        for part in search:
            found.append(part)
    except NotOnDisk as missing:
        found = [part for part in found if isinstance(part, Unpaired)]
        parameter = generic(str(missing))
        found.append(Unpaired(kind, f"{kind} does not hold where {parameter} is not one plain tensor on disk."))
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
    if isinstance(layer, Attention):
        parts = (layer.query, layer.key, layer.value, layer.output, layer.query_norm, layer.key_norm)
        return [join(layer.path, part) for part in parts if part]
    return [join(layer.path, part) for part in (layer.gate, layer.up, layer.down) if part]
