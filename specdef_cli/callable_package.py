"""A package that can be called: ``specdef_cli.attack`` is the function ``attack`` and the package that it lives in.

Importing a package binds its name in its parent, so a function of the same name there would be overwritten by whichever
import comes first. Python lets a module have a class of its own instead (data model, "Customizing module attribute
access").
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function that is named as the package is."""
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


def make_callable(package: str) -> None:
    """Have a package stand for its function of the same name.

    Args:
        package: Its full name; it is imported already, and has such a function.
    """
    sys.modules[package].__class__ = _CallablePackage
