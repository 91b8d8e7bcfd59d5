"""What a mistake costs until it is told: processor time of commands that end in an error."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

BASE = Path(__file__).parents[1] / "examples/tiny_llama/model"

# What is wrong, and the command; {base}, {hardened} and {certified} are models, there/ is a directory with files.
MISTAKES = (
    ("an `--out` that exists", "harden {base} --method fold --out there"),
    ("a model that is not there", "harden nowhere/ --out new"),
    ("a hardened model", "harden {hardened} --out new"),
    ("a base that is not there", "attack {hardened} --control nowhere/"),
    ("a base that is not there", "certify {hardened} --base nowhere/"),
    ("a hardened base", "attack {hardened} --control {hardened}"),
    ("an unknown training", "attack {hardened} --control {base} --training fulll"),
    ("a number of steps below 1", "attack {hardened} --control {base} --steps 0"),
    ("data that is not there", "attack {hardened} --control {base} --dataset missing.jsonl"),
    ("an `--out` below a file", "attack {hardened} --control {base} --out there/file"),
    ("an `--out` below a file", "certify {hardened} --base {base} --out there/file"),
    ("a report that is not there", "certify {hardened} --base {base} --attacks missing.json"),
    ("a malformed report", "certify {hardened} --base {base} --attacks there/config.json"),
    ("a model without a manifest", "certify {base}"),
    ("a model that is not there", "inspect nowhere/"),
    ("a directory without `config.json`", "inspect there/empty"),
    ("a model without a manifest", "collapse {base} --out new"),
    ("an `--out` that exists", "collapse {hardened} --out there"),
    ("a malformed size", "collapse {hardened} --out new --max-shard-size 5XB"),
    ("an adapter that is not there", "convert-adapter nowhere {hardened} --out new"),
    ("a report that is not there", "compare missing.json"),
    ("a malformed report", "compare there/config.json"),
    ("a malformed repository id", "push {hardened} not/a/name"),
    ("no token", "push {hardened} org/name"),
    ("a model without a certificate", "verify-certificate {hardened}"),
    ("a base that is not there", "verify-certificate {certified} --base nowhere/"),
    ("`--layers` that match nothing", "harden {base} --method fold --layers nothing* --out new"),
    ("a column that the data lacks", "attack {hardened} --control {base} --dataset rows.jsonl"),
    ("an unknown format", "certify {hardened} --base {base} --formats nothing"),
)


def mistakes_table(directory: Path) -> None:
    """Print one row for each mistake, as a Markdown table."""
    hardened = directory / "hardened"
    harden = ["harden", str(BASE), "--method", "fold", "--out", str(hardened), "--quiet"]
    subprocess.run([sys.executable, "-m", "specdef_cli", *harden], check=True, capture_output=True)
    (directory / "there" / "empty").mkdir(parents=True)
    (directory / "there" / "file").write_text("")
    (directory / "there" / "config.json").write_text("{}")
    certified = directory / "certified"
    shutil.copytree(hardened, certified)
    (certified / "certificate.json").write_text("{}")
    (directory / "rows.jsonl").write_text("".join(json.dumps({"body": "x"}) + "\n" for _ in range(50)))
    nobody = os.environ | {"HF_TOKEN": "", "HF_HOME": str(directory)}
    print("| mistake | command | processor time |\n|---|---|---|")
    for mistake, command in MISTAKES:
        before = _seconds()
        arguments = command.format(base=BASE, hardened=hardened, certified=certified).split()
        process = subprocess.run(
            [sys.executable, "-m", "specdef_cli", *arguments],
            cwd=directory, env=nobody, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode in (1, 2), process.stderr  # 2: wrong usage
        print(f"| {mistake} | `{command.split()[0]}` | {_seconds() - before:.1f} s |", flush=True)


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
