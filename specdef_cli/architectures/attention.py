"""The symmetric pairs of an attention sublayer: values with the output projection, queries with keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specdef_cli.architectures.body import Body, join
from specdef_cli.architectures.families import Attention
from specdef_cli.architectures.pairs import Found, Indices, SymmetricPair, Unpaired


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
