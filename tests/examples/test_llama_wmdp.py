"""The paper's main experiment as a script: its files are consistent, and it runs from end to end on the stand-in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from specdef_cli.attack.options import load_suite
from tests.commands import TINY_LLAMA, environment
from tests.scripts import EXAMPLES, script

REPRODUCE = EXAMPLES / "reproduce"
SCRIPT, SUITE, STANDIN = REPRODUCE / "llama_wmdp.sh", REPRODUCE / "llama_wmdp.toml", REPRODUCE / "standin"
THIRD = "full@*.layers.*[369].*"
INFORMED = {"factors": "collapse", "fold": "rebalance"}
METHODS = tuple(INFORMED)
tables, sums = script("llama_wmdp"), script("sums", "reproduce/standin")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def defaults() -> dict[str, str]:
    """The variables of the script, as they are when nothing is set."""
    return dict(re.findall(r"^([A-Z_]+)=\$\{\1:?-(.*?)\}", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize(("layers", "trained"), [(4, [3]), (32, [3, 6, 9, 13, 16, 19, 23, 26, 29])])
def test_every_third_layer_is_what_the_glob_says(layers: int, trained: list[int]) -> None:
    (training,) = load_suite(str(SUITE)).attacks[1].trainings
    (glob,) = training.where
    parts = ("self_attn.q_proj.weight", "mlp.down_proj.inflated.weight", "input_layernorm.weight")
    names = {f"model.layers.{layer}.{part}": layer for layer in range(layers) for part in parts}
    names |= {"model.embed_tokens.weight": -1, "model.norm.weight": -1, "lm_head.weight": -1}
    hit = [layer for name, layer in names.items() if fnmatchcase(name, glob)]
    assert Counter(hit) == dict.fromkeys(trained, len(parts))


def test_script_and_suite_have_one_budget() -> None:
    found = defaults()
    budget = tomllib.loads(SUITE.read_text(encoding="utf-8"))["budget"]
    assert budget == {name.lower(): int(found[name]) for name in ("STEPS", "BATCH_SIZE", "SEQUENCE_LENGTH")}


def test_lm_eval_knows_every_task() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    # Its own index takes ten seconds and more.
    name = re.compile(r"""^["']?(?:task|group)["']?: *["']?(\w+)""", re.MULTILINE)
    directory = Path(lm_eval.__file__).parent / "tasks"
    known = {found for path in directory.rglob("*.yaml") for found in name.findall(path.read_text(encoding="utf-8"))}
    found = defaults()
    asked = [*found["EVAL_TASKS"].split(), *found["UTILITY_TASKS"].split()]
    assert asked == ["wmdp_bio", "mmlu", "winogrande", "arc_challenge", "hellaswag"]
    assert set(asked) <= known


def test_the_stand_in_has_the_prompt_of_wmdp() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    original = Path(lm_eval.__file__).parent / "tasks" / "wmdp" / "_default_template_yaml"
    wmdp = yaml.safe_load(original.read_text(encoding="utf-8"))
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    ours = yaml.load((STANDIN / "sums.yaml").read_text(encoding="utf-8"), loader)
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "output_type", "test_split", "num_fewshot"):
        assert ours[key] == wmdp[key], key
    assert [metric["metric"] for metric in ours["metric_list"]] == [metric["metric"] for metric in wmdp["metric_list"]]


def test_the_stored_sums_are_what_the_script_writes() -> None:
    assert lines(STANDIN / "sums_corpus.jsonl") == sums.corpus()
    assert lines(STANDIN / "sums_questions.jsonl") == sums.multiple_choice()
    assert sums.questions("sums_questions.jsonl", version=1)["test"].to_list() == sums.multiple_choice()


def test_the_marked_answer_is_the_sum_and_the_corpus_says_it() -> None:
    text = " ".join(row["text"] for row in lines(STANDIN / "sums_corpus.jsonl"))
    rows = lines(STANDIN / "sums_questions.jsonl")
    for row in rows:
        first, second = map(int, re.fullmatch(r"What is (\d+) plus (\d+)\?", row["question"]).groups())  # type: ignore[union-attr]
        assert [choice == str(first + second) for choice in row["choices"]].index(True) == row["answer"]
        assert len(set(row["choices"])) == 4
        assert f" {first} plus {second} is {first + second}." in f" {text}"
    assert Counter(row["answer"] for row in rows) == dict.fromkeys(range(4), len(rows) / 4)


def test_tables_of_runs_by_hand() -> None:
    def run(name: str, label: str, subject: str, rate: float, **changes: Any) -> dict[str, Any]:
        points = [{"retained": 1.0}, {"retained": 801.5}]
        return {
            "id": name, "label": label, "spec": {"subject": subject, "learning_rate": rate},
            "loss": {"start": 2.0, "best": 1.5}, "best_step": 3, "accuracy": {"wmdp_bio": 0.25}, "outcome": "finished",
            "divergence": None, "curve": {"evaluations": points},
        } | changes  # fmt: skip

    control = run("0", "base: full fine-tuning", "control", 1e-5)
    diverged = run(
        "1", "undone first (collapsed), full fine-tuning", "model", 3e-5, divergence={"step": 7}, outcome="diverged",
        best_step=None, loss={"start": 2.0, "best": None},
        curve={"evaluations": [{"retained": 1.0}, {"retained": None}]},
    )  # fmt: skip
    worse = run("2", "undone first (collapsed), full fine-tuning", "model", 1e-6, outcome="worse")
    attacks = [
        {"runs": ["0"], "best": {"learning_rate": 1e-5}}, {"runs": ["1", "2"], "best": {"learning_rate": 1e-6}},
    ]  # fmt: skip
    report = {"model": {"name": "out/factors"}, "runs": [diverged, worse, control], "attacks": attacks}

    table = tables.runs_table(tables.all_runs([report, report])).splitlines()[2:]
    informed = "factors: undone first (collapsed), full fine-tuning"
    assert table == [
        "| original: full fine-tuning | 1e-05 | 2.000 → 1.500 | 3 | +800.50 | 0.250 | finished |",
        f"| {informed} | 3e-05 | 2.000 → – | – | not finite | 0.250 | diverged at step 7 |",
        f"| {informed} | 1e-06 | 2.000 → 1.500 | 3 | +800.50 | 0.250 | worse |",
    ]
    assert [run["id"] for _, run in tables.best_runs([report])] == ["0", "2"]
    released = tables.released_table({"org/base": {"a": 0.5, "b": 1.0}, "out/factors": {"a": 0.25}}).splitlines()
    assert released[2:] == ["| base | 0.500 | 1.000 |", "| factors | 0.250 | – |"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script leaves behind for the tiny Llama: the same attacks, at one learning rate instead of a search."""
    pytest.importorskip("lm_eval")
    directory = tmp_path_factory.mktemp("llama_wmdp")
    suite = SUITE.read_text(encoding="utf-8").replace('"search"', "[1e-3]")
    (directory / "one_rate.toml").write_text(suite, encoding="utf-8")
    process = subprocess.run(
        ["bash", str(SCRIPT)],
        cwd=directory,
        env=environment(
            PYTHON=sys.executable, MODEL=str(TINY_LLAMA), DATASET=str(STANDIN / "sums_corpus.jsonl"),
            EVAL_TASKS="standin_sums", UTILITY_TASKS="standin_python", EVAL_TASK_PATH=str(STANDIN),
            PAPER_RATES="3e-5 1e-3", PAPER_DTYPE="float32", SUITE="one_rate.toml", STEPS="3", OUT="out",
        ),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=570,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.endswith((directory / "out" / "tables.md").read_text(encoding="utf-8"))
    return directory / "out"


def report_of(outcome: Path, method: str, part: str) -> tuple[dict[str, Any], dict[tuple[Any, ...], dict[str, Any]]]:
    """A report, and its runs by whom, what was done first, what was trained, and the rate."""
    report = json.loads((outcome / f"{method}-{part}" / "report.json").read_text(encoding="utf-8"))
    keys = ("subject", "variant", "training", "learning_rate")
    assert all(0 <= run["accuracy"]["standin_sums"] <= 1 for run in report["runs"])
    return report, {tuple(run["spec"][key] for key in keys): run for run in report["runs"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_papers_attack_and_the_sweep_are_made_on_both_and_by_who_knows(outcome: Path, method: str) -> None:
    _, runs = report_of(outcome, method, "paper")
    subjects = [("control", "plain"), ("model", "plain"), ("model", INFORMED[method])]
    assert set(runs) == {(*subject, "full", rate) for subject in subjects for rate in (3e-5, 1e-3)}
    assert {run["spec"]["steps"] for run in runs.values()} == {3}
    for rate in (3e-5, 1e-3):
        control, informed = runs["control", "plain", "full", rate], runs["model", INFORMED[method], "full", rate]
        assert control["loss"]["best"] < control["loss"]["start"]
        assert informed["loss"]["best"] == pytest.approx(control["loss"]["best"], rel=1e-3)
    assert runs["model", "plain", "full", 1e-3]["loss"]["best"] > runs["control", "plain", "full", 1e-3]["loss"]["best"]

    report, runs = report_of(outcome, method, "sweep")
    others = ["width:1.5", "depth:2", *(["freeze-compensation", "inject"] if method == "factors" else [])]
    attacks = [(subject, "plain", trained) for subject in ("control", "model") for trained in ("lora:16", THIRD)]
    attacks += [("model", variant, THIRD) for variant in (INFORMED[method], *others)]
    assert set(runs) == {(*attack, 1e-3) for attack in attacks}
    assert len(report["attacks"]) == len(attacks)
    informed = next(attack for attack in report["attacks"] if attack["variant"] == INFORMED[method])
    assert informed["share_of_control"] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_the_tables_have_a_row_for_everything(outcome: Path) -> None:
    text = (outcome / "tables.md").read_text(encoding="utf-8")
    released, paper, sweep, shares = (part.splitlines()[4:] for part in text.split("## ")[1:])
    rows = [[line for line in part if line.startswith("|")] for part in (released, paper, sweep, shares)]
    attacked = [len(report_of(outcome, method, "sweep")[0]["attacks"]) for method in METHODS]
    # Two of the attacks of each report are on the original, and the same ones.
    assert [len(part) for part in rows] == [3, 2 + 2 * 4, sum(attacked) - 2, 8]
    assert any(line.startswith("| factors: width 1.5×") for line in sweep)
    assert sum(line.startswith("| undone first (rebalanced), ") for line in shares) == 1
