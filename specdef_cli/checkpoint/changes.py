"""What hardening changes: layers replaced by factors, folded pairs, scaled modules; records of plan and manifest alike.

Every record names its tensors, in the base's files and in the hardened ones: undoing the change is arithmetic, and not
detective work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from specdef_cli.spectral import Gauge

Method = Literal["fold", "scale", "factors"]
Change = Literal["folded", "scaled", "factored"]
Shapes = dict[str, tuple[int, ...]]
"""Of tensors, by their names on disk."""
ScaledKind = Literal["linear", "embedding", "head", "norm"]


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer y = Wx (+ b), W ∈ R^{m×n}, whose weight is one tensor on disk."""

    module: str
    """Path of the layer in the transformers model, e.g. ``model.layers.0.self_attn.o_proj``."""
    tensor: str
    """Name of the weight on disk; it ends in ``.weight``."""
    out_features: int
    """m, the length of y."""
    in_features: int
    """n, the length of x."""
    bias: str | None
    """Name of the bias on disk, or ``None``."""
    transposed: bool
    """Whether the tensor on disk is Wᵀ (transformers' ``Conv1D``)."""

    @property
    def parameters_added(self) -> int:
        """Parameters that factors of this layer add."""
        return self.out_features**2


@dataclass(frozen=True)
class ScaledSlice:
    """Part of one tensor, multiplied by powers of two."""

    tensor: str
    """Name in the checkpoint's files."""
    axis: int
    """The dimension that ``indices`` count along."""
    block: int | None
    """Index on dimension 0 of a tensor that stacks experts, or ``None``; ``axis`` counts dimension 0 too."""
    indices: tuple[int, ...]
    """Positions along ``axis``."""
    exponents: tuple[int, ...]
    """The slice at each of them is scaled by 2**exponent."""

    @property
    def inverse(self) -> ScaledSlice:
        """The slice that undoes it, bit for bit."""
        negated = tuple(-exponent for exponent in self.exponents)
        return ScaledSlice(self.tensor, self.axis, self.block, self.indices, negated)


@dataclass(frozen=True)
class FactoredLayer(LinearLayer):
    """One linear layer replaced by an inflated layer and its compensation (the paper's Algorithm 1).

    ``bias`` and ``transposed`` describe the base checkpoint: the factors are never stored transposed. In the hardened
    checkpoint ``tensor`` names the tombstone.
    """

    alpha: float
    """Factor by which the top singular values were multiplied."""
    top_k: int
    """How many singular values were inflated."""
    gauge: Gauge
    """Which factorization W = C·W~ is stored."""
    singular_values: tuple[float, ...]
    """The ``top_k`` largest singular values of W, largest first (Ritz values of the computed basis)."""
    reconstruction_error: float
    """‖C(W~X) − WX‖/‖WX‖ on Gaussian probes X, through the stored factors."""

    @property
    def stem(self) -> str:
        """The prefix of its tensors' names, in the base's files and in the hardened ones."""
        return self.tensor.removesuffix(".weight")

    @property
    def inflated_tensor(self) -> str:
        """Name of W~ (m×n) in the hardened checkpoint's files."""
        return f"{self.stem}.inflated.weight"

    @property
    def compensation_tensor(self) -> str:
        """Name of C (m×m) in the hardened checkpoint's files."""
        return f"{self.stem}.compensation.weight"

    @property
    def compensation_bias(self) -> str | None:
        """Name of the bias in the hardened checkpoint's files; it is added after C, so its values are unchanged."""
        return f"{self.stem}.compensation.bias" if self.bias else None

    @property
    def original(self) -> Shapes:
        """Its tensors in the base's files."""
        m, n = self.out_features, self.in_features
        return {self.tensor: (n, m) if self.transposed else (m, n)} | ({self.bias: (m,)} if self.bias else {})

    @property
    def stored(self) -> Shapes:
        """Its tensors in the hardened files; the tombstone has the weight's name."""
        m, n = self.out_features, self.in_features
        bias = {self.compensation_bias: (m,)} if self.compensation_bias else {}
        return {self.inflated_tensor: (m, n), self.compensation_tensor: (m, m), **bias, self.tensor: (1,)}

    @property
    def spec(self) -> dict[str, Any]:
        """Its entry in ``config.json``."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }


@dataclass(frozen=True)
class FoldedPair:
    """A symmetric pair of weights whose shared channels were rescaled in opposite directions."""

    name: str
    """Where, e.g. ``model.layers.0.self_attn.value_output``."""
    kind: str
    """Which symmetry, e.g. ``value_output``."""
    channels: tuple[int, ...]
    """The channels of the pair that were rescaled."""
    exponents: tuple[int, ...]
    """log2 of the factor of each channel."""
    slices: tuple[ScaledSlice, ...]
    """Every tensor slice that was multiplied; undoing the fold multiplies each by 2**-exponent."""
    given_up: float | None = None
    """Share of the energy that the readers put out, which a format that loses these channels loses; ``None`` where they
    were not chosen by that."""


@dataclass(frozen=True)
class ScaledChannels:
    """Channels of a weight that were multiplied by powers of two."""

    axis: int
    """The dimension of the weight that they count along."""
    indices: tuple[int, ...]
    """Positions along ``axis``."""
    exponents: tuple[int, ...]
    """The weight is scaled by 2**exponent at each of them."""
    period: int | None = None
    """Where given, all positions that leave such a remainder are scaled alike: the tokens of a vocabulary."""

    def along(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Every position on an axis of this length that is scaled, and its exponent."""
        if self.period is None:
            return self.indices, self.exponents
        steps = dict(zip(self.indices, self.exponents, strict=True))
        found = [position for position in range(length) if position % self.period in steps]
        return tuple(found), tuple(steps[position % self.period] for position in found)


@dataclass(frozen=True)
class ScaledModule:
    """A module whose weight was scaled by channel, and which undoes the scale when it runs."""

    module: str
    """Path in the transformers model."""
    kind: ScaledKind
    """What it does with its weight."""
    tensor: str
    """Name of the weight in the base checkpoint's files."""
    stem: str
    """What the names of its tensors in the hardened checkpoint's files begin with."""
    shape: tuple[int, ...]
    """Of the weight."""
    bias: str | None = None
    """Name of the bias in the base checkpoint's files, or ``None``; it is scaled with the output."""
    output: ScaledChannels | None = None
    input: ScaledChannels | None = None
    """What was scaled on the side of the module's input; ``output`` likewise."""
    tied_to: str | None = None
    """Module whose weight a head shares, and whose output channels are the head's input; the weight is stored once,
    with that module."""

    @property
    def tombstone(self) -> str:
        """Name of the one-element tensor in the weight's place."""
        return f"{self.stem}.weight"

    @property
    def inflated_tensor(self) -> str:
        """Name of the scaled weight; of a head that shares it, where it would stand."""
        return f"{self.stem}.inflated.weight"

    @property
    def inflated_bias(self) -> str | None:
        return f"{self.stem}.inflated.bias" if self.bias else None

    @property
    def scales(self) -> dict[str, ScaledChannels]:
        """Names of the scale vectors, which hold 2**-exponent, and the channels they undo."""
        sides = {"input_scale": self.input, "output_scale": self.output}
        return {f"{self.stem}.{name}.weight": side for name, side in sides.items() if side is not None}

    @property
    def exponents(self) -> tuple[int, ...]:
        """log2 of the factor of each scaled channel, on both sides."""
        return tuple(exponent for side in self.scales.values() for exponent in side.exponents)

    @property
    def parameters_added(self) -> int:
        """Length of the scale vectors."""
        return sum(self.shape[side.axis] for side in self.scales.values())

    @property
    def original(self) -> Shapes:
        """Its tensors in the base's files."""
        own = {} if self.tied_to else {self.tensor: self.shape}
        return own | ({self.bias: self._length} if self.bias else {})

    @property
    def stored(self) -> Shapes:
        """Its tensors in the hardened files."""
        own = {} if self.tied_to else {self.inflated_tensor: self.shape}
        bias = {self.inflated_bias: self._length} if self.inflated_bias else {}
        vectors = {name: (self.shape[side.axis],) for name, side in self.scales.items()}
        return {**own, **bias, **vectors, self.tombstone: (1,)}

    @property
    def spec(self) -> dict[str, Any]:
        """Its entry in ``config.json``."""
        return {
            "kind": self.kind,
            "weight": list(self.shape),
            "bias": None if self.bias is None else self._length[0],
            "input_scale": None if self.input is None else self.shape[self.input.axis],
            "output_scale": None if self.output is None else self.shape[self.output.axis],
            "tied_to": self.tied_to,
        }

    @property
    def _length(self) -> tuple[int, ...]:
        """The shape of the bias: every module is scaled on the side of its output."""
        assert self.output is not None
        return (self.shape[self.output.axis],)

    @property
    def slices(self) -> tuple[ScaledSlice, ...]:
        """The slices of the base's tensors that were multiplied."""
        sides = () if self.tied_to else self.scales.values()
        slices = [ScaledSlice(self.tensor, side.axis, None, *side.along(self.shape[side.axis])) for side in sides]
        if self.bias is not None and self.output is not None:
            slices.append(ScaledSlice(self.bias, 0, None, *self.output.along(self.shape[self.output.axis])))
        return tuple(slices)


Replaced = FactoredLayer | ScaledModule


class Changed:
    """What a plan and its manifest have in common."""

    folded: tuple[FoldedPair, ...]
    scaled: tuple[ScaledModule, ...]
    factored: tuple[FactoredLayer, ...]

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """The modules whose weight stands under another name, and which need code to run."""
        return (*self.factored, *self.scaled)

    @property
    def folded_slices(self) -> list[ScaledSlice]:
        """Everything that a fold multiplied."""
        return [part for pair in self.folded for part in pair.slices]

    @property
    def parameters_added(self) -> int:
        """Parameters that the compensation layers and the scale vectors add."""
        return sum(layer.parameters_added for layer in self.replaced)
