"""The command line as users meet it: processes, exit codes, what stands on stdout and what on stderr."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.core import TyperGroup
from typer.main import get_command

import specdef_cli
from specdef_cli.attack.optimizers import OPTIMIZERS
from specdef_cli.attack.options import suite_names
from specdef_cli.attack.trainings import TRAININGS
from specdef_cli.attack.variants import VARIANTS
from specdef_cli.cli.app import COMMANDS, app
from tests.commands import (
    REPOSITORY,
    assert_refused,
    call_cli,
    environment,
    run_cli,
    run_light,
    run_program,
    snapshot,
    succeed,
)
from tests.faults.small_attack import SMALL
from tests.hardening.mutations import config, spoiled
from tests.hardening.test_adapter import lora
from tests.weights import tensors

TinyModel = Callable[..., Path]


def test_help_imports_nothing_heavy() -> None:
    lines = (("--help",), ("--version",), *((command, "--help") for command in COMMANDS))
    for line, (code, _, modules) in zip(lines, run_light(*lines), strict=True):
        assert code == 0, line
        assert not modules & {"torch", "transformers", "numpy", "accelerate", "peft", "datasets", "huggingface_hub"}
        assert "typer" in modules


def test_list_names_everything_that_attack_takes() -> None:
    listed = json.loads(call_cli("attack", "--list", "--json").stdout)
    tables: dict[str, Any] = {"variants": VARIANTS, "trainings": TRAININGS, "optimizers": OPTIMIZERS}
    for key, table in tables.items():
        assert {entry["name"].partition(":")[0]: entry["help"] for entry in listed[key]} == {
            row.name: row.help for row in table.values()
        }
    assert {entry["name"] for entry in listed["suites"]} == set(suite_names())
    assert all(entry["help"] for entry in listed["suites"])
    said = " ".join(call_cli("attack", "--list").stdout.split())
    assert all(f"{entry['name']} {entry['help']}" in said for entries in listed.values() for entry in entries)


def test_root_help_names_every_command_in_whole_sentences() -> None:
    root = call_cli("--help").stdout
    assert all(command in root for command in COMMANDS)
    assert "secure" not in root.lower()
    assert "..." not in root.partition("Commands:")[2]
    assert call_cli("--version").stdout == f"specdef {specdef_cli.__version__}\n"


def test_from_a_directory_and_back_in_processes_of_their_own(
    tiny_model: TinyModel, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """None of them can import what an extra brings. transformers takes peft, diffusers and bitsandbytes for present all
    the same, as it asks for the packages' metadata; tests/packaging has an environment without them."""
    without = tmp_path_factory.mktemp("without")
    hidden = ["datasets", "gguf", "lm_eval", "matplotlib", "pytorch_optimizer"]
    (without / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n")
    where: Any = {"cwd": tmp_path, "PYTHONPATH": f"{without}:{REPOSITORY}"}
    base = tiny_model("llama", torch.bfloat16)
    arguments = ("--method", "factors", "--top-k", "4", "--max-shard-size", "20KB")
    hardened = run_cli("harden", base, "--out", "hardened", *arguments, "--json", "--quiet", **where)
    assert (hardened.code, hardened.stderr) == (0, "")
    said = json.loads(hardened.stdout)
    assert (said["out"], said["parameters_added"], len(said["manifest"]["factored"])) == ("hardened", 4 * 32 * 32, 4)
    assert said["manifest"]["verification"]["relative"] < 0.05
    assert said["manifest"]["base"]["name"] == base.name

    back = run_cli("collapse", "hardened", "--out", "back", "--quiet", **where)
    assert (back.code, back.stderr) == (0, "")
    assert "4 pairs of factors multiplied" in back.stdout
    expected, found = tensors(base), tensors(tmp_path / "back")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=2e-2)
    refused = run_cli("attack", "hardened", **where)
    assert_refused(refused, "attacks need datasets, pytorch_optimizer, which are not installed", "specdef-cli[attack]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hardened"]


def test_a_dry_run_writes_nothing_and_tells_all(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(llama)
    result = succeed("harden", llama, "--method", "factors", "--top-k", "4", "--alpha", "100", "--dry-run", "--json")
    assert list(tmp_path.iterdir()) == []
    assert snapshot(llama) == before
    plan = json.loads(result.stdout)
    assert (plan["method"], plan["layers"]) == ("factors", 4)
    assert plan["changed"] == {"self_attn.o_proj": 2, "mlp.down_proj": 2}
    assert plan["parameters_added"] == 4 * 32 * 32
    assert plan["bytes_after"] - plan["bytes_before"] == (4 * 32 * 32 + 4) * 4
    weights = load_file(llama / "model.safetensors")
    assert plan["parameters"] == sum(weight.numel() for weight in weights.values())
    table = call_cli("harden", llama, "--method", "factors", "--top-k", "4", "--dry-run")
    assert "nothing was written" in " ".join(table.stdout.split())
    assert "down_proj" in table.stdout


LINES = {"harden": 50, "attack": 70}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_whole_at_80_columns(command: str) -> None:
    shown = call_cli(command, "--help", width=80).stdout
    lines = shown.splitlines()
    assert len(lines) <= LINES.get(command, 40)
    assert max(map(len, lines)) <= 80
    usage = get_command(app)
    assert isinstance(usage, TyperGroup)
    written = set(re.split(r"[\s,]+", shown.replace("--[no-]", "--")))
    for parameter in usage.commands[command].params:
        if parameter.param_type_name == "option" and not getattr(parameter, "hidden", False):
            assert set(parameter.opts) <= written
    assert shown.index("Examples:") < shown.index("Model:" if "Model:" in shown else "Output:")
    assert f"specdef {command}" in shown
    assert {"--json", "--quiet"} <= written


@pytest.mark.usefixtures("no_fresh_process")
def test_stdout_is_data_and_quiet_quiet(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command but push, which needs a server (tests/checkpoint/test_upload.py)."""
    monkeypatch.chdir(tmp_path)
    quick = ("--text", text, "--formats", "none", "--no-curvature")
    certify = ("--base", llama, "--attacks", "attack/report.json", *quick)
    adapter = lora(llama, tmp_path / "lora")
    typed: dict[str, tuple[str | Path, ...]] = {
        "inspect": (llama,),
        "harden": (llama, "--out", "hardened"),
        "attack": ("hardened", "--control", llama, "--dataset", text, *SMALL),
        "compare": ("attack",),
        "certify": ("hardened", *certify),
        "verify-certificate": ("hardened",),
        "collapse": ("hardened", "--out", "back"),
        "convert-adapter": (adapter, "hardened", "--out", "adapter"),
    }
    assert {*typed, "push"} == set(COMMANDS)
    for command, arguments in typed.items():
        result = succeed(command, *arguments, "--json", "--quiet")
        assert isinstance(json.loads(result.stdout), dict), command
        assert result.stderr == "", command
    spoken = call_cli("inspect", "hardened", "--json")
    assert isinstance(json.loads(spoken.stdout), dict)


FAILING = {
    "harden": ("nowhere/", "--out", "out"), "attack": ("nowhere/",), "certify": ("nowhere/",),
    "collapse": ("nowhere/", "--out", "out"), "compare": ("nowhere",), "inspect": ("nowhere/",),
    "convert-adapter": ("nowhere", "nowhere/", "--out", "out"), "push": ("nowhere", "org/name"),
    "verify-certificate": ("./nowhere",),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_tell_failure_from_wrong_usage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(call_cli(name, *FAILING[name]), "nowhere", empty=tmp_path)
    wrong = call_cli(name, *FAILING[name], "--no-such-option")
    assert (wrong.code, wrong.stdout) == (2, "")
    assert "--no-such-option" in wrong.stderr
    monkeypatch.setenv("SPECDEF_DEBUG", "1")
    shown = call_cli(name, *FAILING[name])
    assert shown.code == 1
    assert "Traceback" in shown.stderr


def test_inspect_before_and_after(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("gpt2")
    before = json.loads(call_cli("inspect", base, "--json").stdout)
    assert before["manifest"] is None
    assert before["architecture"] == "GPT2LMHeadModel"
    weights = load_file(base / "model.safetensors")
    assert before["parameters"] == sum(weight.numel() for weight in weights.values())
    for layer in before["layers"]:
        singular_values = torch.linalg.svdvals(weights[layer["tensor"]].double())
        rank = float(singular_values.square().sum() ** 2 / singular_values.pow(4).sum())
        assert layer["sigma"] == pytest.approx(float(singular_values[0]), rel=1e-4)
        assert layer["effective_rank"] == pytest.approx(rank, rel=1e-3)
        assert layer["alpha"] is None
    chosen = {layer["module"] for layer in before["layers"] if layer["default"]}
    assert chosen == {f"transformer.h.{i}.{name}.c_proj" for i in (0, 1) for name in ("attn", "mlp")}

    succeed("harden", base, "--out", tmp_path / "out", "--method", "factors", "--alpha", "500", "--top-k", "4")
    after = json.loads(call_cli("inspect", tmp_path / "out", "--json").stdout)
    assert after["architecture"] == "GPT2LMHeadModel"
    assert after["manifest"]["method"] == "factors"
    assert [layer["module"] for layer in after["layers"]] == [layer["module"] for layer in before["layers"]]
    for old, new in zip(before["layers"], after["layers"], strict=True):
        if old["module"] in chosen:
            assert new["alpha"] == 500
            assert new["sigma"] == pytest.approx(500 * old["sigma"], rel=1e-4)
            assert new["effective_rank"] < old["effective_rank"]
        else:
            assert (new["alpha"], new["sigma"]) == (None, old["sigma"])
    table = call_cli("inspect", tmp_path / "out").stdout
    assert "hardened (factors)" in " ".join(table.split())


def test_what_looks_like_markup_is_printed_as_it_is(llama: Path, tmp_path: Path) -> None:
    odd = tmp_path / "[bold]model[red]"
    assert_refused(call_cli("inspect", odd), "[bold]model[red]")
    odd.symlink_to(llama)
    out = tmp_path / "[link]out"
    for arguments in (
        ("inspect", odd),
        ("harden", odd, "--out", out, "--method", "factors", "--top-k", "4"),
        ("collapse", out, "--out", tmp_path / "[dim]back"),
    ):
        result = succeed(*arguments)
        assert not {"\r", "\x1b"} & {*result.stdout, *result.stderr}, "nothing moves on a pipe, which goes to logs"
        assert Path(str(arguments[-1] if len(arguments) in (2, 4) else out)).name in result.stdout
    assert_refused(call_cli("harden", llama, "--out", tmp_path / "o", "--layers", "[/x]*"), "[/x]*")


def test_every_public_name_is_there() -> None:
    assert [name for name in specdef_cli.__all__ if getattr(specdef_cli, name, None) is None] == []
    assert specdef_cli.harden.__module__ == "specdef_cli.hardening.run"
    assert set(specdef_cli.__all__) <= set(dir(specdef_cli))


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages on request here"
)
def test_weights_come_to_lie_in_huge_pages() -> None:
    code = (
        "from specdef_cli.process import prefer_huge_pages; prefer_huge_pages()\n"
        "import json, torch; weight = torch.ones(2**24)\n"
        "sizes = [line.split() for line in open('/proc/self/smaps') if line.startswith('AnonHugePages')]\n"
        "print(json.dumps({'bytes': sum(int(size) for _, size, _ in sizes) * 1024}))"
    )
    assert run_program("-c", code, env=environment())["bytes"] >= 2**25


def test_inspect_says_what_each_method_would_do_and_what_harden_does(llama: Path, tmp_path: Path) -> None:
    """The outlook's figures are those of the directories that the same methods write."""
    weights = load_file(llama / "model.safetensors")
    found = json.loads(call_cli("inspect", llama, "--json").stdout)["outlook"]
    outlooks = {outlook["method"]: outlook for outlook in found["methods"]}
    assert list(outlooks) == ["fold", "scale", "factors"]
    assert {**found["recommended"], "notes": []} == {**outlooks["fold"], "notes": []}
    for method, outlook in outlooks.items():
        out = tmp_path / method
        hardened = json.loads(call_cli("harden", llama, "--out", out, "--method", method, "--json").stdout)
        written = load_file(out / "model.safetensors")
        same = {name for name in weights if name in written and torch.equal(weights[name], written[name])}
        assert outlook["parameters"] == sum(weight.numel() for weight in weights.values())
        assert sum(outlook["left"].values()) == sum(weights[name].numel() for name in same)
        assert outlook["parameters_changed"] == outlook["parameters"] - sum(outlook["left"].values())
        assert outlook["parameters_added"] == hardened["parameters_added"]
        assert outlook["bytes_after"] == sum(weight.nbytes for weight in written.values())
        assert outlook["pairs"] == len(hardened["manifest"]["folded"])
        assert outlook["layers"] == len(hardened["manifest"]["factored"])


def test_inspect_fits_a_screen_and_lists_layers_when_asked(llama: Path) -> None:
    screen = call_cli("inspect", llama).stdout
    assert len(screen.splitlines()) < 40
    words = " ".join(screen.split())
    assert "Recommended: fold" in words
    assert "undo it in one pass" in words
    assert "embed_tokens" in words
    assert "does not survive: float16 weights" in words
    assert "model.layers.1.mlp.down_proj" not in screen
    assert "model.layers.1.mlp.down_proj" in call_cli("inspect", llama, "--layers").stdout


def test_inspect_recommends_scale_where_no_norm_can_be_folded(checkpoints: dict[str, Path]) -> None:
    words = " ".join(call_cli("inspect", checkpoints["gemma3"]).stdout.split())
    assert "Recommended: scale, as no norm inside the blocks can be folded" in words


def test_inspect_says_what_stands_in_the_way(llama: Path, tmp_path: Path) -> None:
    """A quantized checkpoint: every method is refused, and so is the recommendation."""
    quantized = spoiled(llama, tmp_path, config(quantization_config={"quant_method": "gptq"}))
    words = " ".join(call_cli("inspect", quantized).stdout.split())
    assert words.count("is quantized (gptq)") == 4
    assert "Recommended: leave it as it is" in words
    assert "Harden the unquantized checkpoint" in words
    narrow = spoiled(llama, tmp_path / "narrow", config(dtype="float16"))
    words = " ".join(call_cli("inspect", narrow).stdout.split())
    assert "Recommended: harden it with --dtype bfloat16" in words
    succeed("harden", narrow, "--dtype", "bfloat16", "--out", tmp_path / "out", "--quiet")


def test_an_attack_without_a_name_finds_what_was_hardened_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(REPOSITORY / "examples/tiny_llama/model", tmp_path / "tiny-llama")
    monkeypatch.chdir(tmp_path)
    succeed("harden", "tiny-llama", "--out", "hardened", "--no-verify")
    result = succeed("attack", "--expand", "2x", "--dry-run")
    planned = [line.split() for line in result.stdout.splitlines()]
    assert ["model", "hardened"] in planned
    assert ["control", "tiny-llama"] in planned
    assert "width 2×, full fine-tuning" in " ".join(result.stdout.split())
