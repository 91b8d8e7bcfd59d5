"""What a caller may ask of :func:`specdef_cli.harden` and :func:`specdef_cli.collapse`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specdef_cli.checkpoint.manifest import Profile, Schedule
from specdef_cli.option import as_declared, option
from specdef_cli.spectral.gauges import Gauge

MethodChoice = Literal["auto", "insert", "fold"]
StoredDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class HardenOptions:
    """Options of :func:`specdef_cli.harden`. One that nothing in the plan would use is refused, not ignored.

    Attributes:
        model: A directory, or a Hub id ``org/name[@revision]``.
        out: The directory to publish.
        manifest_out: Where ``specdef.json`` goes instead of into the published directory; ``None`` leaves it there.
        method: ``fold`` (rescaled symmetric pairs, nothing added), ``insert`` (weights with something beside them that
            undoes the change, and code that runs it), or ``auto``: fold where the family is known and, with
            ``allow_code``, insert for the rest.
        alpha: Factor of the singular values that insert inflates, and of a ``constant`` fold (which takes the nearest
            power of two); ``None`` takes 10⁴.
        top_k: How many singular values of each layer insert inflates; ``None`` takes 25.
        gauge: Which factorization insert stores; ``None`` takes ``rotated``.
        schedule: ``staircase``: powers of two that go down from layer to layer, on channels of a fold's pairs or of the
            weights that insert scales. ``constant``: one α, in a fold's pairs or as the paper's two factors a layer.
            ``None`` takes the staircase, and for insert with ``alpha``, ``top_k`` or ``gauge`` the paper's.
        profile: What a fold must leave intact; ``None`` takes ``coverage``.
        layers: Globs over module paths and tensor names; none means every pair (fold), everything that can be
            scaled (insert), and the linears that write to the residual stream (the paper's factors).
        allow_code: Whether ``auto`` may make a checkpoint that needs code to load, to scale what no pair reaches,
            and everything where no pairs cross (but with ``profile`` or a ``constant`` schedule, which ask for a fold).
        base_model: Where a directory's weights are on the Hub (``org/name``), for the card and the manifest.
        exclude: Globs of what to leave alone; a fold leaves every pair alone that one of these tensors is part of.
        dtype: Store floating tensors in this dtype (``float32``, ``bfloat16``, ``float16``); ``None`` keeps each one's.
        max_shard_size: Largest output file in bytes.
        device: Where to compute; ``None`` takes every GPU there is, else the CPU.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        trust_remote_code: Whether the model's own Python code may run.
        seed: Seed of the randomized basis of insert; a fold has nothing random.
        resume: Go on where an interrupted run of the same plan stopped.
        verify: Reload the result and compare it with the base before publishing.

    Raises:
        SpecDefError: There is no such method, gauge, schedule, profile or dtype.
    """

    model: str
    out: Path = option(Path("hardened"), "Directory to publish; must not exist.", "--out", "-o")
    manifest_out: Path | None = option(
        None,
        "Write specdef.json, which says what was changed, to this file and not into the directory.",
        metavar="FILE",
        shown_default="OUT/specdef.json",
    )
    method: MethodChoice = option(
        "auto",
        "fold: existing pairs of weights are rescaled. insert: weights with code that undoes a change beside them. "
        "auto: fold, and insert for the rest with --allow-code.",
    )
    alpha: float | None = option(
        None,
        "Factor of the inflated singular values (insert) or of the rescaled channels (constant fold).",
        shown_default="1e4",
    )
    top_k: int | None = option(None, "Singular values inflated in each layer (insert).", shown_default="25")
    gauge: Gauge | None = option(
        None,
        "Which factorization insert stores; symmetric is the paper's, and needs float32.",
        shown_default="rotated",
    )
    schedule: Schedule | None = option(
        None,
        "staircase: powers of two that go down from layer to layer. constant: one alpha; insert then stores the "
        "paper's two factors a layer.",
        shown_default="staircase; constant for insert with --alpha, --top-k or --gauge",
    )
    profile: Profile | None = option(
        None,
        "coverage: every pair, within a float16 cache. bfloat16: further, and the cache must be bfloat16 or float32 "
        "(llama.cpp: no flash attention). quantizable: only queries and keys, which quantizers survive, but for "
        "double quantization.",
        shown_default="coverage",
    )
    allow_code: bool = option(
        False, "Let auto scale what no pair reaches, or all where no pairs cross; needs code to load."
    )
    layers: tuple[str, ...] = option(
        (),
        "Glob of layers to harden, e.g. '*.o_proj'.",
        shown_default="all; for constant insert the linears that write to the residual stream",
    )
    exclude: tuple[str, ...] = option((), "Glob of layers to leave alone.")
    base_model: str | None = option(
        None, "Where a directory's weights are on the Hub, for the card.", metavar="ORG/NAME"
    )
    dtype: StoredDtype | None = option(None, "Store floating tensors in this dtype.", shown_default="each tensor's own")
    max_shard_size: int = 5 * 10**9
    device: str | None = None
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    seed: int = option(0, "Seed of the randomized basis (insert).")
    resume: bool = False
    verify: bool = option(True, "Compare the result with the base before it is published.", "--verify/--no-verify")

    def __post_init__(self) -> None:
        as_declared(self)


@dataclass(frozen=True)
class CollapseOptions:
    """Options of :func:`specdef_cli.collapse`.

    Attributes:
        model: A hardened directory or Hub id.
        out: The directory to publish.
        manifest: ``specdef.json`` where it does not lie in the model's directory.
        max_shard_size: Largest output file in bytes.
        device: Where to multiply; ``None`` takes every GPU there is, else the CPU.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        resume: Go on where an interrupted run stopped.
    """

    model: str
    out: Path
    manifest: Path | None = None
    max_shard_size: int = 5 * 10**9
    device: str | None = None
    revision: str | None = None
    token: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        as_declared(self)
