"""What a caller may ask of :func:`specdef_cli.harden` and :func:`specdef_cli.collapse`."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from specdef_cli.checkpoint.changes import Method
from specdef_cli.errors import WrongUsage
from specdef_cli.option import Source, as_declared, option, parse_size
from specdef_cli.spectral import Gauge

Profile = Literal["float16-cache", "bfloat16", "quantizable", "gguf"]
BY_WEIGHTS = "none"
"""Stands in the place of a text to calibrate with."""
StoredDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Fold:
    """Rescale symmetric pairs by powers of two: an ordinary checkpoint of its architecture, bit-identical."""

    method: ClassVar[Method] = "fold"
    profile: Profile = option("float16-cache", "fold: bfloat16, quantizable or gguf.", metavar="NAME", group="Method")
    calibration: str | None = option(
        None, "quantizable, gguf: a text, or none.", metavar="FILE", shown_default="Python's", group="Method"
    )
    """What chooses the channels; ``none`` lets the weights alone choose those of ``quantizable``."""

    def __post_init__(self) -> None:
        as_declared(self)
        if self.profile == "gguf" and self.calibration == BY_WEIGHTS:
            raise WrongUsage(
                "--profile gguf needs a text: weights do not show how much blocks of activations lose",
                "Give a text, or leave --calibration out.",
            )
        if self.calibration is not None and self.profile not in ("quantizable", "gguf"):
            raise WrongUsage(
                f"--calibration {self.calibration} changes nothing in --profile {self.profile}",
                "Use --profile quantizable, or leave --calibration out.",
            )


@dataclass(frozen=True)
class Scale:
    """Scale every weight by powers of two, which vectors beside it undo: bit-identical, any architecture, with code."""

    method: ClassVar[Method] = "scale"


@dataclass(frozen=True)
class Factors:
    """Store W as C·W~, the paper's construction: the top singular values are inflated by α, and C undoes it."""

    method: ClassVar[Method] = "factors"
    alpha: float = option(
        1e4, "factors: multiplies the singular values.", metavar="X", shown_default="1e4", group="Method", at_least=1
    )
    top_k: int = option(25, "factors: how many singular values.", metavar="N", group="Method", at_least=1)
    gauge: Gauge = option("rotated", "factors: symmetric is the paper's.", metavar="NAME", group="Method")
    seed: int = option(0, "factors: seed of the random basis.", metavar="N", group="Method")

    def __post_init__(self) -> None:
        as_declared(self)


Construction = Fold | Scale | Factors
CONSTRUCTIONS: dict[Method, type[Construction]] = {kind.method: kind for kind in get_args(Construction)}


def construction_of(method: Method) -> Construction:
    """The construction of a name, with its defaults."""
    if method not in CONSTRUCTIONS:
        raise WrongUsage(f"--method {method!r} is unknown", f"Choose one of: {', '.join(CONSTRUCTIONS)}.")
    return CONSTRUCTIONS[method]()


@dataclass(frozen=True, kw_only=True)
class Publishing(Source):
    """Options of what writes a new directory."""

    max_shard_size: int = option(
        5 * 10**9, "Largest file, e.g. 500MB.", metavar="SIZE", shown_default="5GB", group="Output", parse=parse_size
    )
    device: str | None = option(
        None, "cpu, cuda:0, …", metavar="DEVICE", shown_default="every GPU, else cpu", group="Model"
    )
    resume: bool = option(False, "Continue an interrupted run.", group="Output")


@dataclass(frozen=True)
class HardenOptions(Publishing):
    """Options of :func:`specdef_cli.harden`."""

    out: Path = option(Path("hardened"), "New directory to publish.", "--out", "-o", metavar="DIR", group="Output")
    construction: Construction = option(
        Fold(),
        "fold; scale and factors need code to load.",
        "--method",
        metavar="NAME",
        shown_default="fold",
        group="Method",
        parse=construction_of,
    )
    layers: tuple[str, ...] = option((), "Harden only what matches.", metavar="GLOB", group="Method")
    exclude: tuple[str, ...] = option((), "Leave alone what matches.", metavar="GLOB", group="Method")
    dtype: StoredDtype | None = option(
        None, "Store floats in this dtype, e.g. bfloat16.", metavar="DTYPE", group="Output"
    )
    base_model: str | None = option(None, "The base on the Hub, for the card.", metavar="REPO", group="Output")
    manifest_out: Path | None = option(
        None, "Write specdef.json there, not into --out.", metavar="FILE", group="Output"
    )
    verify: bool = option(True, "Compare the outputs with the base's.", "--verify/--no-verify", group="Output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.construction, Construction):
            raise WrongUsage(
                f"construction is {self.construction!r}", "Give Fold(), Scale() or Factors(), of specdef_cli."
            )
        if self.base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.base_model):
            raise WrongUsage(f"--base-model {self.base_model!r} is no Hub id", "Give it as org/name, or leave it out.")


@dataclass(frozen=True)
class CollapseOptions(Publishing):
    """Options of :func:`specdef_cli.collapse`."""

    out: Path = option(MISSING, "New directory to publish.", "--out", "-o", metavar="DIR", group="Output")
