"""Durations and sizes as people write them: 45m, 1h30m, 5GB."""

from __future__ import annotations

import math
import re

from specdef_cli.errors import WrongUsage


def parse_duration(text: str, option: str) -> float:
    """Seconds of a duration as users write it: ``45m``, ``1h30m``, ``90s``."""
    match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)h)?\s*(?:(\d+(?:\.\d+)?)m(?:in)?)?\s*(?:(\d+(?:\.\d+)?)s)?\s*", text)
    parts = match.groups() if match else ()
    seconds = sum(float(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=bool(parts)))
    if not 0 < seconds < math.inf:
        raise WrongUsage(f"{option} {text!r} is not a duration", "Write it like 45m, 1h30m or 90s.")
    return seconds


def in_words(seconds: float) -> str:
    """A duration for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``500MB``."""
    unit = text.strip().upper().lstrip("0123456789.")
    number = text.strip()[: len(text.strip()) - len(unit)]
    try:
        size = int(float(number) * UNITS[unit.strip()])
    except (KeyError, ValueError, OverflowError) as error:
        raise WrongUsage(f"{text!r} is not a size", "Write it like 5GB or 500MB.") from error
    if size <= 0:
        raise WrongUsage(f"{text!r} is not a positive size", "Write it like 5GB or 500MB.")
    return size
