"""Exact symmetries between the weights of a checkpoint, in terms of its tensors on disk.

A symmetric pair is a set of tensor slices that can be multiplied by d and 1/d, channel by channel, without changing the
function. With d a power of two nothing is rounded: the logits keep every bit as long as nothing over- or underflows.
Folding puts the paper's inflated layer and its compensation (arXiv 2602.18868, Algorithm 1) into such a pair.

`families.py` says what a family's blocks are made of; this module turns that into slices. Nothing here reads weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.architectures.families import (
    FAMILIES,
    HOMOGENEOUS_ACTIVATIONS,
    Attention,
    Experts,
    Family,
    Mlp,
    Stack,
)
from specdef_cli.architectures.names import TensorNames, match_names, meta_model, tied_parameters
from specdef_cli.errors import SpecDefError

PairKind = Literal["value_output", "up_down", "query_key", "norm_readers", "residual_stream"]
Indices = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Side:
    """The slices of one tensor that belong to a pair.

    Attributes:
        tensor: Name on disk.
        axis: The dimension that ``indices`` count along (dimension 0 included where the tensor stacks experts).
        indices: For each channel of the pair, the positions along ``axis`` that it scales; every channel has equally
            many, none is listed twice. ``None``: the whole tensor, for a pair of one channel.
        power: +1 where the slices are multiplied by the channel's factor d, -1 where by 1/d.
        block: Index on dimension 0 of a tensor that stacks experts; ``None``: all of it.
    """

    tensor: str
    axis: int
    indices: Indices | None
    power: Literal[1, -1]
    block: int | None = None


@dataclass(frozen=True)
class SymmetricPair:
    """Slices that can be rescaled against each other without changing the function.

    Attributes:
        name: Where, by the path in the transformers model, e.g. ``model.layers.0.self_attn.value_output``.
        kind: Which symmetry.
        channels: How many independent factors the pair takes.
        sides: The slices. Some have power +1 and some -1, except in a residual stream, which ends in the norms' ε.
        config_scale: Values of config.json that must be multiplied by d**power at the same time: (key, power).
    """

    name: str
    kind: PairKind
    channels: int
    sides: tuple[Side, ...]
    config_scale: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Unpaired:
    """Why pairs are missing.

    Attributes:
        kind: Which symmetry does not hold; ``None`` for parameters that none could involve.
        reason: A sentence that names the parameters.
    """

    kind: PairKind | None
    reason: str


@dataclass(frozen=True)
class Symmetries:
    """All symmetric pairs of a checkpoint, and why there are no more.

    Attributes:
        pairs: In the order of the model.
        unpaired: What has no pair, once for all blocks.
    """

    pairs: tuple[SymmetricPair, ...]
    unpaired: tuple[Unpaired, ...]


def symmetries(
    config: PreTrainedConfig,
    tensors: Mapping[str, tuple[int, ...]],
    *,
    model: PreTrainedModel | None = None,
    trust_remote_code: bool = False,
) -> Symmetries:
    """Find the symmetric pairs of a checkpoint.

    Args:
        config: The model's native config.
        tensors: Tensor name on disk → shape.
        model: ``meta_model(config)``, where the caller has it already.
        trust_remote_code: As in :func:`~specdef_cli.architectures.names.meta_model`.

    Raises:
        SpecDefError: The model cannot be built, or a tensor's shape contradicts it.
    """
    model = meta_model(config, trust_remote_code=trust_remote_code) if model is None else model
    names = match_names(model, tensors)
    pairs: list[SymmetricPair] = []
    notes: list[Unpaired] = []
    bodies = list(_bodies(model))
    if not bodies:
        reason = f"{type(model).__name__}: this family is not described, so no symmetric pairs are known in it."
        notes.append(Unpaired(None, reason))
    for path, body, family in bodies:
        found = _Body(model, path, body, family, names, tensors)
        found.collect()
        pairs += found.pairs
        notes += found.notes
    return Symmetries(tuple(pairs), tuple(dict.fromkeys(notes)))


def symmetric_pairs(config: PreTrainedConfig, tensors: Mapping[str, tuple[int, ...]]) -> tuple[SymmetricPair, ...]:
    """The pairs alone of :func:`symmetries`."""
    return symmetries(config, tensors).pairs


def unpaired(config: PreTrainedConfig, tensors: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The sentences alone of :func:`symmetries`."""
    return tuple(each.reason for each in symmetries(config, tensors).unpaired)


def _bodies(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel, Family]]:
    """The outermost submodules whose class is described. A class of the same name from elsewhere is another class."""
    found: list[str] = []
    for path, module in model.named_modules():
        family = FAMILIES.get(type(module).__name__)
        if family is None or not type(module).__module__.startswith("transformers.models."):
            continue
        if any(outer == "" or path.startswith(f"{outer}.") for outer in found):
            continue
        assert isinstance(module, PreTrainedModel)
        found.append(path)
        yield path, module, family


class _NotOnDisk(Exception):
    """A parameter that a pair needs is not on disk as a tensor of its own."""


@lru_cache(maxsize=64)
def _singles(count: int, start: int = 0, step: int = 1) -> Indices:
    """One position a channel. Cached: a large model has thousands of sides with the same positions."""
    return tuple((start + step * channel,) for channel in range(count))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


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


class _Body:
    """Collects the pairs of one body: one method for each kind of pair, on a few primitives that make sides."""

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        body: PreTrainedModel,
        family: Family,
        names: TensorNames,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.model, self.path, self.body, self.family = model, path, body, family
        self.names, self.shapes = names, shapes
        self.config = body.config.get_text_config()
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.modules = dict(model.named_modules())
        self.tied = tied_parameters(model)
        self.pairs: list[SymmetricPair] = []
        self.notes: list[Unpaired] = []

    def _is_tied(self, head: str) -> bool:
        """Whether the head's weight is, or may be, the embeddings'.

        A checkpoint can hold both although its config ties them. Transformers then compares the values, other engines
        do not look; so they count as tied, and are scaled together. T5's config class ties always and remembers what
        the checkpoint said as ``scale_decoder_outputs``.
        """
        weight = f"{head}.weight"
        kept_apart = getattr(self.config, "scale_decoder_outputs", True) is False and weight in self.names.sources
        return weight in self.tied and not kept_apart

    # ------------------------------------------------------------------------------------------------ primitives

    def _tensor(self, parameter: str) -> str:
        tensor = self.names.tensor(parameter)
        if tensor is None:
            raise _NotOnDisk(parameter)
        self._check_shape(tensor, tuple(self.parameters[parameter].shape), parameter)
        return tensor

    def _check_shape(self, tensor: str, expected: tuple[int, ...], parameter: str) -> None:
        shape = tuple(self.shapes[tensor])
        if shape != expected:
            raise SpecDefError(
                f"tensor {tensor} has shape {list(shape)}, but by config.json {parameter} needs {list(expected)}",
                "Use the config.json that belongs to this checkpoint (of a quantized one, the unquantized checkpoint).",
            )

    def _slice(self, parameter: str, axis: int, indices: Indices, power: Literal[1, -1]) -> Side:
        return Side(self._tensor(parameter), axis, indices, power)

    def _whole(self, parameter: str, power: Literal[1, -1]) -> Side:
        return Side(self._tensor(parameter), 0, None, power)

    def _has(self, parameter: str) -> bool:
        return self.parameters.get(parameter) is not None

    def _out_features(self, module: str) -> int:
        return int(self.parameters[f"{module}.weight"].shape[1 if self._is_transposed(module) else 0])

    def _in_features(self, module: str) -> int:
        return int(self.parameters[f"{module}.weight"].shape[0 if self._is_transposed(module) else 1])

    def _is_transposed(self, module: str) -> bool:
        return isinstance(self.modules[module], Conv1D)

    def _rows(self, module: str, indices: Indices, power: Literal[1, -1]) -> list[Side]:
        """What a linear (or a norm) puts out on some channels: rows of the weight, entries of the bias."""
        sides = [self._slice(f"{module}.weight", 1 if self._is_transposed(module) else 0, indices, power)]
        if self._has(f"{module}.bias"):
            sides.append(self._slice(f"{module}.bias", 0, indices, power))
        return sides

    def _columns(self, module: str, indices: Indices, power: Literal[1, -1]) -> list[Side]:
        """How a linear reads some channels: columns of the weight."""
        return [self._slice(f"{module}.weight", 0 if self._is_transposed(module) else 1, indices, power)]

    def _output(self, module: str, power: Literal[1, -1]) -> list[Side]:
        """All that a linear or a norm puts out: weight and bias."""
        biases = [f"{module}.bias"] if self._has(f"{module}.bias") else []
        return [self._whole(parameter, power) for parameter in (f"{module}.weight", *biases)]

    def _expert_tensors(self, module: str, part: Literal["gate", "up", "down"]) -> list[str] | None:
        """The tensor of each expert, where experts are stored one by one; ``None`` where they are stacked on disk."""
        parameter = f"{module}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
        if self.names.tensor(parameter) is not None:
            return None
        suffixes = {"gate": "w1|gate_proj", "up": "w3|up_proj", "down": "w2|down_proj"}[part]
        pattern = re.compile(rf"\.experts\.(\d+)\.(?:{suffixes})\.weight$")
        found = {
            int(match[1]): name for name in self.names.sources.get(parameter, ()) if (match := pattern.search(name))
        }
        experts, wide, narrow = self.parameters[parameter].shape
        if sorted(found) != list(range(experts)):
            raise _NotOnDisk(parameter)
        expected = (wide, narrow) if part == "down" else (wide // 2, narrow)
        for name in found.values():
            self._check_shape(name, expected, parameter)
        return [found[expert] for expert in range(experts)]

    def _add(self, name: str, kind: PairKind, channels: int, sides: list[Side], eps: str | None = None) -> None:
        self.pairs.append(SymmetricPair(name, kind, channels, tuple(sides), ((eps, 2),) if eps else ()))

    # ------------------------------------------------------------------------------------------------ collection

    def collect(self) -> None:
        unknown = self._undescribed()
        if unknown:
            body = type(self.body).__name__
            self._note(None, f"{body}: {', '.join(unknown)} are not described, so no symmetric pairs are known.")
            return
        for stack in self.family.stacks:
            for block in self._blocks(stack):
                for layer in self._sublayers(stack, block):
                    if isinstance(layer, Attention):
                        self._attempt("value_output", self._value_output, block, layer)
                        self._attempt("query_key", self._query_key, block, layer)
                    elif isinstance(layer, Mlp):
                        self._attempt("up_down", self._up_down, block, layer)
                    else:
                        self._attempt("up_down", self._experts_up_down, block, layer)
                        if layer.shared is not None:
                            self._attempt("up_down", self._up_down, block, layer.shared)
                for norm in self._norms(stack, block):
                    self._attempt("norm_readers", self._norm_readers, stack, block, norm)
        for stack in self.family.stacks:
            self._attempt("norm_readers", self._final_norm, stack)
        self._attempt("norm_readers", self._head_norm)
        self._attempt("residual_stream", self._residual_stream)
        self._general_notes()

    def _attempt(self, kind: PairKind, step: Callable[..., None], *arguments: object) -> None:
        before = len(self.pairs)
        try:
            step(*arguments)
        except _NotOnDisk as missing:
            del self.pairs[before:]
            parameter = self._generic(str(missing))
            self._note(kind, f"{kind} does not hold where {parameter} is not one plain tensor on disk.")

    def _note(self, kind: PairKind | None, reason: str) -> None:
        self.notes.append(Unpaired(kind, reason))

    @staticmethod
    def _generic(path: str) -> str:
        """A path with its block indices replaced, so that equal notes of many blocks become one."""
        return re.sub(r"\.\d+(?=\.|$)", ".*", path)

    def _blocks(self, stack: Stack) -> list[str]:
        path = _join(self.path, stack.blocks)
        module = self.modules.get(path)
        return [_join(path, child) for child, _ in module.named_children()] if module is not None else []

    def _sublayers(self, stack: Stack, block: str) -> Iterator[Attention | Mlp | Experts]:
        for layer in stack.sublayers:
            module = self.modules.get(_join(block, layer.path))
            if module is None:
                continue
            if isinstance(layer, Attention):
                present = self._has(_join(block, layer.path, layer.query, "weight"))
            elif isinstance(layer, Mlp):
                gated = layer.gate is None or self._has(_join(block, layer.path, layer.gate, "weight"))
                present = gated and self._has(_join(block, layer.path, layer.up, "weight"))
            else:
                present = self._has(_join(block, layer.path, "gate_up_proj"))
            if present:
                yield layer

    def _undescribed(self) -> list[str]:
        """Parameters inside the blocks that the description does not account for (a cross-attention, say)."""
        unknown = set()
        for stack in self.family.stacks:
            for block in self._blocks(stack):
                known = [_join(block, name) for name in self.family.output_norms]
                extra = tuple(f".{suffix}" for suffix, _ in self.family.unpaired)
                for layer in self._sublayers(stack, block):
                    known += [_join(block, layer.norm)] if layer.norm else []
                    if isinstance(layer, Experts):
                        known += [_join(block, layer.path), *(_join(block, reader) for reader in layer.readers)]
                        known += [_join(block, reader).removesuffix(".weight") for reader in layer.readers]
                        known += [_join(block, layer.shared.path)] if layer.shared else []
                        continue
                    parts = (
                        (layer.query, layer.key, layer.value, layer.output, layer.query_norm, layer.key_norm)
                        if isinstance(layer, Attention)
                        else (layer.gate, layer.up, layer.down)
                    )
                    known += [_join(block, layer.path, part) for part in parts if part]
                for name in self.parameters:
                    if not name.startswith(f"{block}.") or name.endswith(extra):
                        continue
                    if not any(name == path or name.startswith(f"{path}.") for path in known):
                        unknown.add(self._generic(name))
        return sorted(unknown)

    # ------------------------------------------------------------------------------------------- pairs in a block

    def _heads(self, module: str, layer: Attention) -> _Heads:
        queries = int(self.config.num_attention_heads)
        keys = int(getattr(self.config, "num_key_value_heads", None) or queries)
        dim = self._in_features(_join(module, layer.output)) // queries
        # Families without grouped-query attention may carry the key all the same; the projection decides.
        if layer.fused is None:
            keys = self._out_features(_join(module, layer.key)) // dim
        return _Heads(queries, keys, dim, layer.fused)

    def _clips(self, layer: Attention) -> bool:
        if layer.clip is None or getattr(self.config, layer.clip, None) is None:
            return False
        clamp = f"{layer.clip} = {getattr(self.config, layer.clip)}"
        self._note("value_output", f"value_output and query_key do not hold: {clamp} clamps queries, keys and values.")
        return True

    def _value_output(self, block: str, layer: Attention) -> None:
        """v_h → D v_h, o_h → o_h D⁻¹ for every key/value head; all query heads of its group read the same D."""
        if self._clips(layer):
            return
        module = _join(block, layer.path)
        heads = self._heads(module, layer)
        channels = [(head, offset) for head in range(heads.keys) for offset in range(heads.dim)]
        values = tuple((heads.value_row(head, offset),) for head, offset in channels)
        outputs = tuple(tuple(query * heads.dim + offset for query in heads.group(head)) for head, offset in channels)
        sides = [
            *self._rows(_join(module, layer.value), values, 1),
            *self._columns(_join(module, layer.output), outputs, -1),
        ]
        self._add(_join(module, "value_output"), "value_output", len(channels), sides)

    def _query_key(self, block: str, layer: Attention) -> None:
        """q → q/s, k → k·s, s shared by the two channels of a RoPE plane; through the gains of a q/k norm."""
        module = _join(block, layer.path)
        if layer.query_norm is not None:
            if self.family.gain == "one_plus":
                reason = "query_key does not hold: the q/k norms' gain is stored as 1+w, which rounds."
                self._note("query_key", reason)
                return
            self._note(
                "query_key",
                "query_key reaches the gains of the q/k norms only: q_proj and k_proj stand before those norms, which "
                "undo any scale.",
            )
        if layer.clip is not None and getattr(self.config, layer.clip, None) is not None:
            return
        heads = self._heads(module, layer)
        rotated = self._rotated_dimensions() if layer.rope else 0
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
            sides = [
                *self._rows(_join(module, layer.query_norm or layer.query), queries, -1),
                *self._rows(_join(module, layer.key_norm or layer.key), keys, 1),
            ]
            self._add(_join(module, suffix), "query_key", len(keys), sides)

    def _rotated_dimensions(self) -> int:
        """How many channels of a head RoPE rotates: two for each frequency that the model keeps."""
        frequencies = self.body.get_submodule("rotary_emb").get_buffer("inv_freq")
        return 2 * int(frequencies.numel())

    def _up_down(self, block: str, layer: Mlp) -> None:
        """up → D up, down → down D⁻¹: the MLP is linear in its up branch, or its activation is homogeneous."""
        module = _join(block, layer.path)
        up, down = _join(module, layer.up), _join(module, layer.down)
        if layer.gate is None:
            activation = getattr(self.config, layer.activation)
            if activation not in HOMOGENEOUS_ACTIVATIONS:
                between = f"the activation {activation!r} stands between {layer.up} and {layer.down}"
                self._note("up_down", f"up_down does not hold: {between}.")
                return
        width = self._in_features(down)
        rows = _singles(width, width) if layer.fused else _singles(width)
        sides = [*self._rows(up, rows, 1), *self._columns(down, _singles(width), -1)]
        self._add(_join(module, "up_down"), "up_down", width, sides)

    def _experts_up_down(self, block: str, layer: Experts) -> None:
        """The same for each expert of a mixture."""
        module = _join(block, layer.path)
        if not layer.gated_linearly:
            reason = "the up branch is clamped and 1 is added to it before the gate"
            self._note("up_down", f"up_down does not hold in {layer.path}: {reason}.")
            return
        ups, downs = self._expert_tensors(module, "up"), self._expert_tensors(module, "down")
        experts, _, width = self.parameters[f"{module}.down_proj"].shape
        for expert in range(experts):
            if ups is not None:
                up = Side(ups[expert], 0, _singles(width), 1)
            else:
                up = Side(self._tensor(f"{module}.gate_up_proj"), 1, _singles(width, width), 1, expert)
            if downs is not None:
                down = Side(downs[expert], 1, _singles(width), -1)
            else:
                down = Side(self._tensor(f"{module}.down_proj"), 2, _singles(width), -1, expert)
            self._add(_join(module, str(expert), "up_down"), "up_down", int(width), [up, down])

    # ---------------------------------------------------------------------------------- norms and their readers

    def _norms(self, stack: Stack, block: str) -> list[str]:
        return list(dict.fromkeys(layer.norm for layer in self._sublayers(stack, block) if layer.norm is not None))

    def _norm_readers(self, stack: Stack, block: str, norm: str) -> None:
        """gain → D gain (and bias), every linear that reads the norm → W D⁻¹."""
        module = _join(block, norm)
        width = self._gain_width(module)
        if width is None:
            return
        sides = self._rows(module, _singles(width), 1)
        for layer in self._sublayers(stack, block):
            if layer.norm == norm:
                sides += self._reading(block, layer)
        self._add(_join(module, "norm_readers"), "norm_readers", width, sides)

    def _gain_width(self, norm: str) -> int | None:
        """The norm's width, if its gain can be scaled exactly."""
        if self.family.gain == "one_plus":
            reason = "norm_readers does not hold: norms store their gain as 1+w, and scaling that rounds."
            self._note("norm_readers", reason)
            return None
        if self.family.gain == "none":
            self._note("norm_readers", "norm_readers does not exist: the norms have no gain.")
            return None
        return int(self.parameters[f"{norm}.weight"].shape[0])

    def _reading(self, block: str, layer: Attention | Mlp | Experts) -> list[Side]:
        """The columns with which a sublayer reads its norm."""
        if isinstance(layer, Attention):
            parts = [layer.query] if layer.cross else [layer.query, layer.key, layer.value]
        elif isinstance(layer, Mlp):
            parts = [layer.gate, layer.up] if layer.gate else [layer.up]
        else:
            return self._experts_reading(block, layer)
        sides: list[Side] = []
        for part in dict.fromkeys(parts):
            linear = _join(block, layer.path, part)
            sides += self._columns(linear, _singles(self._in_features(linear)), -1)
        return sides

    def _experts_reading(self, block: str, layer: Experts) -> list[Side]:
        module = _join(block, layer.path)
        stacked = self.parameters[f"{module}.gate_up_proj"]
        axis = 1 if layer.transposed else 2
        indices = _singles(int(stacked.shape[axis]))
        sides = [self._slice(_join(block, reader), 1, indices, -1) for reader in layer.readers]
        gates, ups = self._expert_tensors(module, "gate"), self._expert_tensors(module, "up")
        if gates is None or ups is None:
            sides.append(self._slice(f"{module}.gate_up_proj", axis, indices, -1))
        else:
            sides += [Side(tensor, 1, indices, -1) for tensor in (*gates, *ups)]
        if layer.shared is not None:
            sides += self._reading(block, layer.shared)
        return sides

    def _final_norm(self, stack: Stack) -> None:
        """The norm after the last block, and what reads it: the head, or every cross-attention of the decoder."""
        path, norm = self._last_norm(stack)
        if norm is None:
            return
        width = self._gain_width(path)
        if width is None:
            return
        readers = self._final_readers(stack)
        if isinstance(readers, str):
            self._note("norm_readers", f"{path} has no pair: {readers}.")
            return
        sides = self._rows(path, _singles(width), 1)
        for reader in readers:
            sides += self._columns(reader, _singles(width), -1)
        self._add(_join(path, "norm_readers"), "norm_readers", width, sides)

    def _last_norm(self, stack: Stack) -> tuple[str, nn.Module | None]:
        if stack.final_norm is not None:
            path = _join(self.path, stack.final_norm)
        else:
            blocks = self._blocks(stack)
            path = _join(blocks[-1], self.family.output_norms[-1]) if blocks else ""
        return path, self.modules.get(path) if path else None

    def _final_readers(self, stack: Stack) -> list[str] | str:
        """Paths of the linears that read the stack's final norm, or why there are none to scale."""
        crossing = [
            _join(block, layer.path, part)
            for other in self.family.stacks
            for block in self._blocks(other)
            for layer in self._sublayers(other, block)
            if isinstance(layer, Attention) and layer.cross
            for part in (layer.key, layer.value)
        ]
        if crossing and stack is self.family.stacks[0]:
            # The encoder's output is also a result of the bare model; with a head, only the logits are.
            return crossing if dict(self.family.heads).get(type(self.model).__name__, "") is None else "it is an output"
        found, head = self._head()
        if not found:
            return "its output leaves the model, or enters a head that is not described"
        if head is None or f"{head}.weight" not in self.parameters:
            return "its output leaves the model"
        if self._is_tied(head):
            return f"{head} is tied to the embeddings"
        return [head]

    def _head(self) -> tuple[bool, str | None]:
        """Whether the head is one that the family's description knows, and the linear that reads the final norm."""
        if self.model is self.body and type(self.model).__name__ not in dict(self.family.heads):
            return True, None
        if self.path not in ("", self.model.base_model_prefix, "transformer"):
            return False, None
        for suffix, reader in self.family.heads:
            if type(self.model).__name__.endswith(suffix):
                if reader is not None:
                    return True, reader
                output = self.model.get_output_embeddings()
                return True, next((path for path, module in self.modules.items() if module is output), None)
        return False, None

    def _head_norm(self) -> None:
        """BERT's masked-language head has a norm of its own, before the decoder."""
        output = self.model.get_output_embeddings()
        path = next((name for name, module in self.modules.items() if output is not None and module is output), None)
        if self.family.stream != "post_norm" or path is None:
            return
        norms = [name for name, module in self._normalizations() if not name.startswith(f"{self.path}.")]
        if len(norms) != 1 or not type(self.model).__name__.endswith("ForMaskedLM"):
            return
        if self._is_tied(path):
            self._note("norm_readers", f"{norms[0]} has no pair: {path} is tied to the embeddings.")
            return
        width = self._in_features(path)
        sides = [*self._rows(norms[0], _singles(width), 1), *self._columns(path, _singles(width), -1)]
        self._add(_join(norms[0], "norm_readers"), "norm_readers", width, sides)

    # ------------------------------------------------------------------------------------------ residual stream

    def _residual_stream(self) -> None:
        """Embeddings and all that is added to the stream × s, with the norms' ε × s²: no norm sees the difference."""
        obstacle = self._stream_obstacle()
        if obstacle is not None:
            self._note("residual_stream", f"residual_stream does not hold: {obstacle}.")
            return
        sides = self._embedding_sides()
        for stack in self.family.stacks:
            for block in self._blocks(stack):
                for layer in self._sublayers(stack, block):
                    sides += self._stream_sides(block, layer)
        sides += self._stream_norm_sides()
        sides += self._tied_head_sides()
        self._add(_join(self.path, "residual_stream"), "residual_stream", 1, sides, self.family.eps)

    def _stream_obstacle(self) -> str | None:
        family = self.family
        if family.eps is None:
            return "the norms' ε is a constant of the code, not a value of config.json"
        if family.stream == "input_and_output":
            return "norms on the sublayers' outputs store their gain as 1+w, which does not scale exactly"
        found, _ = self._head()
        if not found or self.model.config is not self.body.config:
            return f"what {type(self.model).__name__} adds to the stream or reads from it is not described"
        value = getattr(self.config, family.eps)
        described = self._stream_norms()
        for path, module in self._normalizations():
            if path not in described:
                return f"{path} shares the config's {family.eps} and does not read the residual stream"
            if getattr(module, "eps", getattr(module, "variance_epsilon", None)) != value:
                return f"{path} does not take its ε from the config's {family.eps}"
        return None

    def _normalizations(self) -> list[tuple[str, nn.Module]]:
        return [
            (path, module)
            for path, module in self.modules.items()
            if (hasattr(module, "eps") or hasattr(module, "variance_epsilon")) and not list(module.children())
        ]

    def _stream_norms(self) -> set[str]:
        """Every norm whose input scales with the stream."""
        family = self.family
        paths = {_join(self.path, family.embedding_norm)} if family.embedding_norm else set()
        for stack in family.stacks:
            paths |= {_join(self.path, stack.final_norm)} if stack.final_norm else set()
            for block in self._blocks(stack):
                paths |= {_join(block, norm) for norm in family.output_norms}
                for layer in self._sublayers(stack, block):
                    paths |= {_join(block, layer.norm)} if layer.norm else set()
                    if isinstance(layer, Attention) and layer.query_norm and layer.key_norm:
                        paths |= {_join(block, layer.path, norm) for norm in (layer.query_norm, layer.key_norm)}
        return paths

    def _embedding_sides(self) -> list[Side]:
        parameters = [_join(self.path, name) for name in self.family.embeddings]
        _, head = self._head()
        if head is not None and self._is_tied(head):
            parameters.append(f"{head}.weight")
        # Of tied parameters, those without a tensor of their own follow the one that has it.
        found = [
            self._whole(parameter, 1)
            for parameter in parameters
            if self._has(parameter) and (parameter in self.names.sources or parameter not in self.tied)
        ]
        if not found:
            raise _NotOnDisk(parameters[0])
        return found

    def _stream_sides(self, block: str, layer: Attention | Mlp | Experts) -> list[Side]:
        """What has to change in a sublayer when its input stream (or, pre-norm, only its output) is multiplied by s."""
        if isinstance(layer, Experts):
            return self._experts_writing(block, layer)
        module = _join(block, layer.path)
        last = _join(module, layer.output if isinstance(layer, Attention) else layer.down)
        if self.family.stream == "output_norm":
            return self._scaled_input_sides(module, layer)
        sides = self._output(last, 1)
        if self.family.stream == "post_norm":
            parts = (layer.query, layer.key, layer.value) if isinstance(layer, Attention) else (layer.up,)
            sides += [self._whole(_join(module, part, "weight"), -1) for part in parts]
        elif isinstance(layer, Attention) and layer.query_norm is not None:
            # The q/k norms share the config's ε, so their inputs have to follow; they read a norm, which does not.
            for part in (layer.query, layer.key):
                sides += self._output(_join(module, part), 1)
        return sides

    def _scaled_input_sides(self, module: str, layer: Attention | Mlp) -> list[Side]:
        """OLMo 2: no norm before the sublayer, so that s runs through it up to the norm on its output."""
        if isinstance(layer, Attention):
            # Biases follow; the weights pass the factor on to the q/k norms and, along the values, to the output norm.
            linears = [_join(module, part) for part in (layer.query, layer.key, layer.value, layer.output)]
            return [self._whole(f"{linear}.bias", 1) for linear in linears if self._has(f"{linear}.bias")]
        assert layer.gate is not None
        return [self._whole(_join(module, layer.gate, "weight"), -1)]  # the activation must not see s; up passes it on

    def _experts_writing(self, block: str, layer: Experts) -> list[Side]:
        module = _join(block, layer.path)
        downs = self._expert_tensors(module, "down")
        sides = [self._whole(f"{module}.down_proj", 1)] if downs is None else [Side(name, 0, None, 1) for name in downs]
        if self._has(f"{module}.down_proj_bias"):
            sides.append(self._whole(f"{module}.down_proj_bias", 1))
        if layer.shared is not None:
            sides += self._output(_join(block, layer.shared.path, layer.shared.down), 1)
        return sides

    def _stream_norm_sides(self) -> list[Side]:
        """Norms that write to the stream: those on outputs, and in a post-norm model all but the last."""
        family = self.family
        if family.stream not in ("output_norm", "post_norm"):
            return []
        paths = [_join(self.path, family.embedding_norm)] if family.embedding_norm else []
        for stack in family.stacks:
            paths += [_join(block, norm) for block in self._blocks(stack) for norm in family.output_norms]
        if family.stream == "post_norm":
            paths = paths[:-1]
        return [side for path in paths for side in self._output(path, 1)]

    def _tied_head_sides(self) -> list[Side]:
        """A tied head is scaled along with the embeddings; the norm before it takes the factor back."""
        _, head = self._head()
        if head is None or not self._is_tied(head):
            return []
        path, _ = self._last_norm(self.family.stacks[-1])
        return self._output(path, -1)

    # ------------------------------------------------------------------------------------------------------ notes

    def _general_notes(self) -> None:
        for suffix, reason in self.family.unpaired:
            if any(name.endswith(f".{suffix}") for name in self.parameters):
                self._note(None, f"{suffix.removesuffix('.weight')} has no pair: {reason}.")
        if self.family.stream == "post_norm":
            self._note(
                "norm_readers",
                "Norms inside the blocks have no readers' pair: their output is also added to the residual stream.",
            )
