"""Sizes of files as users write them."""

from __future__ import annotations

from specdef_cli.errors import SpecDefError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``500MB``."""
    unit = text.strip().upper().lstrip("0123456789.")
    number = text.strip()[: len(text.strip()) - len(unit)]
    try:
        size = int(float(number) * UNITS[unit.strip()])
    except (KeyError, ValueError, OverflowError) as error:
        raise SpecDefError(f"{text!r} is not a size", "Write it like 5GB or 500MB.") from error
    if size <= 0:
        raise SpecDefError(f"{text!r} is not a positive size", "Write it like 5GB or 500MB.")
    return size
