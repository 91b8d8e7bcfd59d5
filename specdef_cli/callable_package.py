"""A package that can be called: ``specdef_cli.attack`` is the function ``attack`` and the package that it lives in.

Importing a package binds its name in its parent, so a function of the same name there would be overwritten by whichever
import comes first. Python lets a module have a class of its own instead (data model, "Customizing module attribute
access"). The package's other public names are imported on their first use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    _PUBLIC: Mapping[str, str]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function that is named as the package is."""
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Import a public name; Python asks here for what the package does not have yet."""
        if name not in self._PUBLIC:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(self._PUBLIC[name]), name)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *self._PUBLIC})


def make_callable(package: str) -> None:
    """Have a package stand for its function of the same name.

    Args:
        package: Its full name. It is imported already, has such a function, and says in ``_PUBLIC`` which module each
            public name is in.
    """
    sys.modules[package].__class__ = _CallablePackage
