"""What users are told of another library's exception and of one that is missing, and what the extras bring."""

from __future__ import annotations

import importlib.metadata
import pickle
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import specdef_cli
from specdef_cli.errors import (
    EXTRA_MODULES,
    INSTALLATION,
    MissingExtraError,
    first_line,
    missing_modules,
    require_extra,
)
from tests.commands import REPOSITORY, environment, run_cli


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
    assert (type(again), again.arguments) == (MissingExtraError, ("attacks", extra))


def test_harden_imports_no_module_of_an_extra_and_attack_names_it(llama: Path, tmp_path: Path) -> None:
    """In processes that cannot import them. transformers takes peft, diffusers and bitsandbytes for present all the
    same, as it asks for the packages' metadata; tests/packaging has an environment without them."""
    hidden = ["datasets", "gguf", "lm_eval", "matplotlib", "pytorch_optimizer"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    hardened = run_cli("harden", llama, "--out", "folded", "--method", "fold", cwd=tmp_path, PYTHONPATH=path)
    assert hardened.code == 0, hardened.stderr
    refused = run_cli("attack", "folded", cwd=tmp_path, PYTHONPATH=path)
    assert refused.code == 1
    assert refused.stderr.splitlines() == [
        "error: attacks need datasets, pytorch_optimizer, which are not installed",
        "hint: pip install 'specdef-cli[attack]'",
    ]


def test_a_package_that_is_called_calls_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import specdef_cli.attack

    monkeypatch.setattr("specdef_cli.attack.run.attack", lambda *given, **options: (given, options))
    called: Any = specdef_cli.attack
    assert called(1, on_progress=2) == ((1,), {"on_progress": 2})
    assert called.options.AttackOptions is specdef_cli.AttackOptions


def test_the_version_has_one_source() -> None:
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", specdef_cli.__version__)
    assert "pip install ." in INSTALLATION
