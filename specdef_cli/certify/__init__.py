"""Checks of a hardened checkpoint against its base: what was promised, measured."""

import sys

from specdef_cli import CallablePackage, __getattr__  # noqa: F401 (public names of this room are found there, too)

sys.modules[__name__].__class__ = CallablePackage
