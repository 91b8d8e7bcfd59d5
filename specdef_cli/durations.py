"""Durations as users write and read them."""

from __future__ import annotations

import math
import re

from specdef_cli.errors import SpecDefError


def parse_duration(text: str, option: str) -> float:
    """Seconds of a duration as users write it: ``45m``, ``1h30m``, ``90s``."""
    match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)h)?\s*(?:(\d+(?:\.\d+)?)m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)s)?\s*", text)
    parts = match.groups() if match else ()
    seconds = sum(float(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=bool(parts)))
    if not 0 < seconds < math.inf:
        raise SpecDefError(f"{option} {text!r} is not a duration", "Write it like 45m, 1h30m or 90s.")
    return seconds


def in_words(seconds: float) -> str:
    """A duration for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
