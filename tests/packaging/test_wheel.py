"""The wheel, in an environment of its own that has what the core asks for and nothing else.

It is built and installed through pip, so these tests need a package index; ``make wheel`` runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.commands import REPOSITORY

pytestmark = pytest.mark.slow
TINY = REPOSITORY / "examples/tiny_llama/model"
CONSTRAINTS = REPOSITORY / "constraints.txt"


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with ``python`` and ``specdef`` of an environment into which the wheel was installed."""
    root = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", root / "dist", REPOSITORY, cwd=root)
    (wheel,) = (root / "dist").glob("*.whl")
    venv.create(root / "venv", with_pip=True)
    # torch first and alone, as `make install` does: some indexes have builds of it that bring gigabytes of CUDA.
    run(root / "venv/bin/pip", "install", "--quiet", "torch", "-c", CONSTRAINTS, cwd=root)
    run(root / "venv/bin/pip", "install", "--quiet", wheel, "-c", CONSTRAINTS, cwd=root)
    return root / "venv/bin"


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command without the repository on Python's path; its exit code must be the given one."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == code, process.stdout + process.stderr
    return process


def test_the_core_lacks_something_of_every_extra(binaries: Path, tmp_path: Path) -> None:
    """Not all of it: torch brings jinja2, for one."""
    program = (
        "import json; from specdef_cli.errors import EXTRA_MODULES, missing_modules;"
        "print(json.dumps({extra: missing_modules(extra) for extra in EXTRA_MODULES}))"
    )
    found = json.loads(run(binaries / "python", "-c", program, cwd=tmp_path).stdout)
    assert all(found.values()), found
    assert "matplotlib" in found["report"]


def test_harden_inspect_load_and_collapse(binaries: Path, tmp_path: Path) -> None:
    specdef = binaries / "specdef"
    run(specdef, "inspect", TINY, cwd=tmp_path)
    run(specdef, "harden", TINY, "--method", "factors", "--top-k", "4", "--out", "inserted", cwd=tmp_path)
    run(specdef, "harden", TINY, "--method", "fold", "--out", "folded", cwd=tmp_path)
    run(specdef, "collapse", "folded", "--out", "plain", cwd=tmp_path)
    load = (
        "import specdef_cli, transformers;"
        "model = transformers.AutoModelForCausalLM.from_pretrained('inserted');"
        "print(type(model.model.layers[0].mlp.down_proj).__name__)"
    )
    assert run(binaries / "python", "-c", load, cwd=tmp_path).stdout.strip() == "SpecDefLinear"
    same = (
        "import sys, torch; from safetensors.torch import load_file;"
        "ours, theirs = (load_file(f'{directory}/model.safetensors') for directory in sys.argv[1:]);"
        "print(ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours))"
    )
    assert run(binaries / "python", "-c", same, "plain", TINY, cwd=tmp_path).stdout.strip() == "True"


@pytest.mark.parametrize("command", ["attack", "certify"])
def test_a_command_without_its_extra_names_it_in_two_lines(binaries: Path, tmp_path: Path, command: str) -> None:
    run(binaries / "specdef", "harden", TINY, "--method", "fold", "--no-verify", "--out", "folded", cwd=tmp_path)
    said = run(binaries / "specdef", command, "folded", cwd=tmp_path, code=1).stderr.splitlines()
    assert [line.split(":")[0] for line in said] == ["error", "hint"]
    assert "datasets" in said[0]
    assert said[1] == "hint: pip install 'specdef-cli[attack]'"


def test_the_extra_s_hint_is_understood_by_pip(binaries: Path, tmp_path: Path) -> None:
    said = run(binaries / "pip", "install", "--dry-run", "--quiet", "specdef-cli[attack]", cwd=tmp_path)
    assert "does not provide the extra" not in said.stderr
