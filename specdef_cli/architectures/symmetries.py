"""All symmetric pairs of a checkpoint: its bodies are walked block by block. Nothing here reads weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from specdef_cli.architectures.attention import query_key, value_output
from specdef_cli.architectures.body import Body, NotOnDisk, described_bodies, generic, join
from specdef_cli.architectures.families import Attention, Experts, Mlp
from specdef_cli.architectures.mlp import experts_up_down, up_down
from specdef_cli.architectures.norms import final_norm, masked_head_norm, norm_readers, norms_of
from specdef_cli.architectures.pairs import Found, PairKind, SymmetricPair, Symmetries, Unpaired
from specdef_cli.architectures.skeleton import Skeleton


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
