"""The one failure that an attack can go on after."""

from __future__ import annotations

from specdef_cli.errors import SpecDefError


class NotApplicable(SpecDefError):
    """The model has nothing that a variant works on, or nothing of what was to be trained."""
