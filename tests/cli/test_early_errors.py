"""What a user gets wrong is told before anything heavy is imported, wherever it can be known then."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoint.test_manifest import MANIFEST
from tests.commands import run_light

HEAVY = {"torch", "transformers", "datasets", "peft", "matplotlib"}
USAGE = (
    "harden model --out new --max-shard-size 5", "harden model --out new --base-model mine",
    "attack model --control model --steps 0", "attack model --control model --lr -1",
    "attack model --control model --training fulll", "attack model --control model --variant widht:2",
    "attack model --control model --optimizer adamm", "attack model --control model --suite quik",
    "attack model --control model --fail-if steps<", "attack model --control model --fail-if share_of_control>20",
    "attack model --control model --time-limit soon", "attack model --control model --report-to wandbb",
    "attack model --control model --subfolder ../there",
)  # fmt: skip
"""Wrong by themselves: exit code 2."""
WRONG = (
    "harden model --out there", "harden nowhere/ --out new",
    "attack model", "attack nowhere/", "attack model --control nowhere/",
    "attack model --control model --dataset missing.jsonl.gz",
    "attack model --control model --retained missing.txt",
    "attack model --control model --out there/file",
    "certify nowhere/", "certify model", "certify model --text missing.txt", "collapse model --out new",
    "inspect nowhere/", "inspect there", "harden there --out new", "harden hardened --out new",
    "certify hardened --base model --attacks missing.json", "convert-adapter there hardened --out new",
    "convert-adapter there nowhere/ --out new", "attack hardened --control model --card",
    "compare missing.json", "push nowhere org/name", "verify-certificate hardened", "verify-certificate nowhere/",
)  # fmt: skip


def test_it_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("something")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "hardened").mkdir()
    (tmp_path / "hardened" / "config.json").write_text("{}")
    (tmp_path / "hardened" / "specdef.json").write_text(MANIFEST.to_json())
    lines = (*USAGE, *WRONG)
    found = run_light(*(line.split() for line in lines), cwd=tmp_path)
    for line, (code, said, modules) in zip(lines, found, strict=True):
        assert code == (2 if line in USAGE else 1), line
        assert [part.split(":")[0] for part in said.splitlines()[:2]] == ["error", "hint"], line
        assert not HEAVY & modules, line
    assert {path.name for path in tmp_path.iterdir()} == {"there", "model", "hardened"}, "nothing was written"
