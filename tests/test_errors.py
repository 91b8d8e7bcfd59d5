"""What users are told of another library's exception and of one that is missing, and what the extras bring."""

from __future__ import annotations

import importlib.metadata
import pickle
import re
import sys
import tomllib
from typing import Any

import pytest

from specdef_cli.errors import (
    EXTRA_MODULES,
    MissingExtraError,
    first_line,
    missing_modules,
    require_extra,
)
from tests.commands import REPOSITORY


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  no such key  \nTraceback …"), "no such key"),
        (RuntimeError("\n \n  second line\nthird"), "second line"),
        (KeyError("name"), "'name'"),
        (OSError(), "OSError"),
        (ValueError(" \n"), "ValueError"),
        (OSError("401 for https://user:secretword@host/x"), "401 for https://***@host/x"),
        (OSError("Bearer hf_abcdefghijklmnop was refused"), "Bearer *** was refused"),
    ],
)
def test_the_first_line_with_text_without_tokens(error: Exception, line: str) -> None:
    assert first_line(error) == line


PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distributions(extra: str) -> set[str]:
    """Normalized names of what an extra asks for, without other extras of this project."""
    asked = (re.split(r"[\[<>=]", line)[0] for line in PROJECT["optional-dependencies"][extra])
    return {name.lower().replace("_", "-") for name in asked} - {"specdef-cli"}


@pytest.mark.parametrize("extra", EXTRA_MODULES)
def test_the_modules_of_an_extra_are_those_that_it_installs(extra: str) -> None:
    found = importlib.metadata.packages_distributions()
    installed = {name.lower().replace("_", "-") for module in EXTRA_MODULES[extra] for name in found[module]}
    assert installed == distributions(extra)
    assert missing_modules(extra) == ()


def test_all_has_every_extra_that_a_command_may_ask_for() -> None:
    named = {extra for line in PROJECT["optional-dependencies"]["all"] for extra in re.findall(r"\w+", line)}
    within = {extra for line in PROJECT["optional-dependencies"]["attack"] for extra in re.findall(r"\w+", line)}
    assert set(EXTRA_MODULES) <= named | within


@pytest.mark.parametrize("extra", EXTRA_MODULES)
def test_a_missing_module_is_named_with_the_extra_that_brings_it(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = EXTRA_MODULES[extra][0]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        require_extra(extra, "attacks")
    error = caught.value
    assert isinstance(error, MissingExtraError)
    assert error.problem == f"attacks need {module}, which is not installed"
    assert error.hint == f"pip install 'specdef-cli[{extra}]'"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (MissingExtraError, str(error))


def test_a_package_that_is_called_calls_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import specdef_cli.attack

    monkeypatch.setattr("specdef_cli.attack.run.attack", lambda *given, **options: (given, options))
    called: Any = specdef_cli.attack
    assert called(1, on_progress=2) == ((1,), {"on_progress": 2})
    assert called.options.AttackOptions is specdef_cli.AttackOptions
