"""Scripts of this checkout that are no package, as modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.commands import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


def script(name: str, folder: str = "reproduce") -> ModuleType:
    """A module of a folder of examples, which finds its neighbours by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / folder))
        return importlib.import_module(name)


def by_path(path: Path) -> ModuleType:
    """A module that stands alone, or whose name another has, too."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
