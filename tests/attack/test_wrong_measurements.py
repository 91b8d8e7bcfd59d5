"""Figures that were wrong and came with exit 0: each kind with the right value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from specdef_cli import AttackOptions
from specdef_cli.attack.data import load_data
from specdef_cli.attack.data.labels import labels_of
from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.queue import visible_devices
from specdef_cli.attack.run import plan_attack
from specdef_cli.attack.target import Head
from specdef_cli.attack.tasks import task_of
from specdef_cli.checkpoint.reader import read_config
from specdef_cli.cli.attack import Condition
from specdef_cli.errors import SpecDefError
from tests.attack.test_data_forms import a_file, chat_tokenizer, lines, load, read_and_counted
from tests.attack.test_tasks import TEXT, classifier
from tests.byte_tokenizer import byte_tokenizer
from tests.report.test_report import report, run

assert report  # a fixture

NAMED = {"label2id": {"positive": 0, "negative": 1, "neither": 2}}


def classified(path: Path, head: Head, tokenizer: Any = None, **changes: Any) -> AttackData:
    fields = {"steps": 4, "batch_size": 4, "sequence_length": 32, "eval_sequences": 4, **changes}
    options = AttackOptions(model="m", out=Path("o"), dataset=str(path), **fields)
    return load_data(options, "sequence-classification", tokenizer or byte_tokenizer(), head)


def labels(data: AttackData) -> dict[str, int]:
    found = {}
    for half in (data.train, data.held_out):
        for index in range(len(half)):
            found[byte_tokenizer().decode(half[index]["input_ids"]).split(" ")[0]] = half[index]["label"]
    return found


@pytest.mark.parametrize("kind", ["names", "class labels", "id2label alone"])
def test_classes_are_numbered_as_the_checkpoint_numbers_them(kind: str, tmp_path: Path) -> None:
    config = NAMED if kind != "id2label alone" else {"id2label": {0: "positive", 1: "negative", 2: "neither"}}
    directory = classifier(tmp_path / "model", **config)
    if kind == "id2label alone":
        path = directory / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "label2id"}))
    names = ["negative", "neither", "positive"]
    rows = [{"text": f"{names[n % 3]} {n}", "label": names[n % 3]} for n in range(60)]
    table = datasets.Dataset.from_list(rows)
    if kind == "class labels":
        table = table.cast_column("label", datasets.ClassLabel(names=names))
    table.to_parquet(tmp_path / "rows.parquet")
    data = classified(tmp_path / "rows.parquet", task_of(read_config(directory), directory, None)[1])
    assert labels(data) == NAMED["label2id"]
    assert (data.resize_head, data.remarks) == (False, ())


def test_names_that_the_checkpoint_does_not_know_are_remarked_on() -> None:
    head = Head(2, names={"positive": 0, "negative": 1})
    found = labels_of(["pos", "neg"], head, "label", "d")
    assert found.classes == {"neg": 0, "pos": 1}
    assert "positive, negative" in found.remark
    assert not labels_of(["pos", "neg"], Head(2, names={"LABEL_0": 0, "LABEL_1": 1}), "label", "d").remark
    new = labels_of(["a", "b", "c"], head, "label", "d").remark
    assert "has 2 outputs, and d needs 3" in new
    assert "names" not in new, "a new head has none"
    assert "has 2 outputs, and d needs 1" in labels_of([0.5, 1.5], head, "label", "d").remark


def test_names_are_those_of_the_head_whatever_their_case() -> None:
    upper = {"POSITIVE": 0, "NEGATIVE": 1}
    found = labels_of(["positive", " Negative"], Head(2, names=upper), "label", "d")
    assert (found.classes, found.remark) == ({"positive": 0, " Negative": 1}, "")
    both = labels_of(["it", "IT"], Head(2, names={"IT": 0, "it": 1}), "label", "d")
    assert both.classes == {"IT": 0, "it": 1}


def test_numbers_that_are_written_as_text_stand_for_themselves() -> None:
    """In alphabetical order 10 comes before 2."""
    written = [str(number) for number in range(12)]
    found = labels_of(written, Head(12, names={f"LABEL_{number}": number for number in range(12)}), "label", "d")
    assert (found.classes, found.remark) == ({text: int(text) for text in written}, "")


def test_text_pairs_are_read_as_the_tokenizer_joins_them(tmp_path: Path) -> None:
    rows = [{"text": f"a{n}", "and": f"b{n}", "label": n % 2} for n in range(60)]
    path = a_file("rows.jsonl", lines)(tmp_path, rows)
    data = classified(path, Head(2), text_pair_column="and")
    text = byte_tokenizer().decode(data.held_out[0]["input_ids"])
    number = text[1 : len(text) // 2]
    assert text == byte_tokenizer().decode(byte_tokenizer()(f"a{number}", f"b{number}")["input_ids"])
    with pytest.raises(SpecDefError, match="no column 'other'"):
        classified(path, Head(2), text_pair_column="other")
    with pytest.raises(SpecDefError, match="the task is causal-lm"):
        load(path, text_pair_column="and")
    for name, value in {"prompts": "p.txt", "retained": "r.txt", "eval_tasks": ("arc_easy",)}.items():
        with pytest.raises(SpecDefError, match=f"--{name[:4]}.* the task is sequence-classification"):
            classified(path, Head(2), **{name: value})


WHOLE = (
    "{% if tools %}[tools {{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for t in m.tool_calls or [] %}[{{ t.function | tojson }}]{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "x"}}}
OTHER_CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "y"}}}
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"city": {"type": "string"}}}}]


def turns(call: dict[str, Any], number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"rain {number}?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "rain", "content": "yes"},
        {"role": "assistant", "reasoning_content": "hm", "content": "a coat"},
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_a_conversation_reaches_the_template_whole(form: str, kind: str, tmp_path: Path) -> None:
    """The second implementation is the template itself. Parquet writes None for what another row's call has."""
    rows = []
    for number in range(24):
        said = turns(OTHER_CALL if number % 2 else CALL, number)
        fields = {"messages": said} if form == "messages" else {"prompt": said[:3], "completion": said[3:]}
        rows.append({**fields, "tools": json.dumps(TOOLS) if kind == "parquet" else TOOLS})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_bytes(lines(rows))
    tokenizer = chat_tokenizer(WHOLE)
    read, counted = read_and_counted(load(path, tokenizer, sequence_length=400).train, 0, tokenizer)
    expected = [{**message, "content": message["content"] or ""} for message in turns(CALL, 0)]
    assert read == tokenizer.apply_chat_template(expected, tools=TOOLS, tokenize=False)
    call = json.dumps(CALL["function"])
    assert counted == (f"[{call}]</>(hm)a coat</>" if form == "messages" else "(hm)a coat</>")


def test_answers_in_a_prompt_are_not_learned(tmp_path: Path) -> None:
    """As in TRL, where the completion alone is; with a template that marks answers, without one, and with none."""
    said = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "early"), ("user", "so"))]
    rows = [{"prompt": said, "completion": [{"role": "assistant", "content": f"late {n}"}]} for n in range(24)]
    path = a_file("rows.jsonl", lines)(tmp_path, rows)
    marked = WHOLE.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    for template, end in ((WHOLE, "</>"), (marked, ""), (None, "<end>")):
        tokenizer = chat_tokenizer(template)
        read, counted = read_and_counted(load(path, tokenizer).train, 0, tokenizer)
        assert "early" in read
        assert counted.removeprefix("so</>") == f"late 0{end}"


def test_rows_on_both_sides_of_the_split_are_remarked_on(tmp_path: Path) -> None:
    same = a_file("same.jsonl", lines)(tmp_path, [{"text": "word " * 90}] * 40)
    others = a_file("others.jsonl", lines)(tmp_path, [{"text": f"word {n} " * 60} for n in range(40)])
    remarks = load(same).remarks
    assert any("1 held-out rows, 1 are repeated" in remark for remark in remarks), remarks
    assert load(others).remarks == ()
    labelled = a_file("labelled.jsonl", lines)(tmp_path, [{"text": f"a{n % 2}", "label": n % 2} for n in range(60)])
    assert any("4 are repeated" in remark for remark in classified(labelled, Head(2)).remarks)


def test_the_hints_of_refusals_work(tmp_path: Path) -> None:
    config = transformers.BertConfig(**TEXT)
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path / "ner")
    with pytest.raises(SpecDefError, match="BertForTokenClassification") as caught:
        task_of(read_config(tmp_path / "ner"), tmp_path / "ner", None)
    named = caught.value.hint.rpartition("--task ")[2].rstrip(".").split(" or ")
    assert named == ["sequence-classification", "masked-lm"]
    for task in named:
        assert task_of(read_config(tmp_path / "ner"), tmp_path / "ner", task)[0] == task  # type: ignore[arg-type]
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + WHOLE
    rows = [{"messages": [{"role": "system", "content": "s"}, *turns(CALL, n)]} for n in range(24)]
    with pytest.raises(SpecDefError, match=r"template refuses \(no system role\) left out") as caught:
        load(a_file("rows.jsonl", lines)(tmp_path, rows), chat_tokenizer(strict))
    assert caught.value.hint.startswith("Change the rows")


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_an_engine_that_nothing_here_uses_is_named(engine: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(SpecDefError, match=f"ACCELERATE_USE_{engine} is set"):
        plan_attack(AttackOptions(model=base, control=base, out=base.parent / "out"))


@pytest.mark.parametrize(
    ("named", "driver", "devices"),
    [
        ("", 2, ("0", "1")),
        ("2,3", 2, ("2", "3")),
        (" GPU-a1, GPU-b2 ", 2, ("GPU-a1", "GPU-b2")),
        ("1,0,-1,3", 2, ("1", "0")),  # CUDA takes nothing from the first invalid one on
        ("-1", 0, ()),
        ("MIG-a,MIG-b,MIG-c", None, ("MIG-a", "MIG-b", "MIG-c")),  # of which a process sees one: not to be asked
    ],
)
def test_places_are_those_of_the_environment(named: str, driver: int | None, devices: tuple[str, ...]) -> None:
    def count() -> int:
        assert driver is not None
        return driver

    assert visible_devices(named, count) == devices


def gate(text: str, report: Any, **changes: Any) -> tuple[str, ...]:
    return Condition.parse(text).failures(replace(report, **changes))


def test_a_gate_fails_on_what_was_not_measured(report: Any) -> None:
    assert gate("share_of_control>0.9", report) == ()
    assert gate("share_of_control>0.4", report) == ("full fine-tuning meets share_of_control>0.4",)
    control, *attacks = report.runs
    assert gate("best_loss<0", report, runs=(control,)) == ("no attack was measured for best_loss<0",)
    informed = tuple(run for run in attacks if run.spec.variant.kind == "collapse")
    assert gate("best_loss<0", report, runs=(control, *informed)) == ("no attack was measured for best_loss<0",)
    (late,) = gate("share_of_control>0.9", report, not_reached=("LoRA",))
    assert late == "LoRA was not reached within --time-limit"
    still = run("control", [3.0, 3.0, 3.0])
    for metric in ("share_of_control>0.2", "steps_to_control<500"):
        (unknown,) = gate(metric, report, runs=(still, *attacks))
        assert "was not measured, as the control learned nothing" in unknown
    (broken,) = gate("best_loss<1", report, runs=(control, run("model", [None], diverged=True)))
    assert "its start is not finite" in broken
