"""What data people have: every form of row in every kind of file, and what becomes of it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import zstandard
from transformers import PreTrainedTokenizerFast

from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.target import Task
from specdef_cli.errors import SpecDefError
from tests.attack.conftest import load
from tests.byte_tokenizer import byte_tokenizer
from tests.commands import refusal

CHATML = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '[/]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '[/]' }}{% endgeneration %}{% else %}{{ message['content'] + '[/]' }}"
    "{% endif %}{% endfor %}"
)
CHAT = byte_tokenizer(CHATML)
FRAMED = byte_tokenizer(single="<s> $A", bos_token="<s>")
"""Puts a beginning in front of every text, as Gemma's and Llama's do."""
MASKING = byte_tokenizer(single="<cls> $A <sep>", mask_token="<mask>", cls_token="<cls>", sep_token="<sep>")
ENDING = byte_tokenizer(single="$A <end>")
ROWS = 24
END = "<end>"
Rows = list[dict[str, Any]]


def question(number: int) -> str:
    return f"what is {number}+1?"


def answer(number: int) -> str:
    return f"it is {number + 1}."


def messages(number: int, keys: str = "role content user assistant") -> Rows:
    role, content, asks, says = keys.split()
    return [{role: asks, content: question(number)}, {role: says, content: answer(number)}]


IN_CHAT = ("[user]{q}[/][assistant]{a}[/]", "{a}[/]")
# The reader, a row, all that the model reads of it, and what of that is counted.
FORMS: dict[str, tuple[PreTrainedTokenizerFast, Callable[[int], dict[str, Any]], str, str]] = {
    "messages": (CHAT, lambda n: {"messages": messages(n)}, *IN_CHAT),
    "conversations": (CHAT, lambda n: {"conversations": messages(n, "from value human gpt")}, *IN_CHAT),
    "prompt-completion": (CHAT, lambda n: {"prompt": question(n), "completion": answer(n)}, "{q}{a}<end>", "{a}<end>"),
    "prompt-completion-messages": (
        CHAT, lambda n: {"prompt": messages(n)[:1], "completion": messages(n)[1:]}, *IN_CHAT,
    ),
    "instruction-output": (CHAT, lambda n: {"instruction": question(n), "input": "", "output": answer(n)}, *IN_CHAT),
    "instruction-input-output": (
        CHAT, lambda n: {"instruction": question(n), "input": "in words", "output": answer(n)},
        "[user]{q}\n\nin words[/][assistant]{a}[/]", "{a}[/]",
    ),
    "instruction-response": (
        CHAT, lambda n: {"instruction": question(n), "context": "", "response": answer(n)}, *IN_CHAT,
    ),
    "messages, plain roles": (
        byte_tokenizer(), lambda n: {"messages": messages(n)}, "user: {q}\nassistant: {a}<end>\n", "{a}<end>",
    ),
    "messages, plain roles, framed": (
        FRAMED, lambda n: {"messages": messages(n)}, "<s>user: {q}\nassistant: {a}<end>\n", "{a}<end>",
    ),
    "instruction, as Alpaca": (
        byte_tokenizer(), lambda n: {"instruction": question(n), "input": "x", "output": answer(n)},
        "### Instruction:\n{q}\n\n### Input:\nx\n\n### Response:\n{a}<end>", "{a}<end>",
    ),
}  # fmt: skip


def lines(rows: Rows) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def table(delimiter: str) -> Callable[[Rows], bytes]:
    def make(rows: Rows) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    return make


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def write(directory: Path, name: str, rows: Rows, make: Callable[[Rows], bytes] = lines) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(make(rows)))
    return path


def parquet(directory: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(directory / "data.parquet")
    return directory / "data.parquet"


def saved(directory: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(directory / "saved")
    return directory / "saved"


def saved_splits(directory: Path, rows: Rows) -> Path:
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(directory / "splits")
    return directory / "splits"


def arrow(directory: Path, rows: Rows) -> Path:
    return Path(shutil.copy(next(saved(directory, rows).glob("*.arrow")), directory / "data.arrow"))


def listed(rows: Rows) -> bytes:
    return json.dumps(rows).encode()


# For any rows, those of nested values included.
NESTED: dict[str, Callable[[Path, Rows], Path]] = {
    "jsonl": lambda d, rows: write(d, "data.jsonl", rows),
    "jsonl.gz": lambda d, rows: write(d, "data.jsonl.gz", rows),
    "jsonl.zst": lambda d, rows: write(d, "data.jsonl.zst", rows),
    "ndjson.bz2": lambda d, rows: write(d, "data.ndjson.bz2", rows),
    "json": lambda d, rows: write(d, "data.json", rows, listed),
    "json.xz": lambda d, rows: write(d, "data.json.xz", rows, listed),
    "parquet": parquet,
    "arrow": arrow,
    "save_to_disk": saved,
    "save_to_disk, splits": saved_splits,
    "folder": lambda d, rows: write(d, "folder/part.jsonl.gz", rows).parent,
    "folder named with brackets": lambda d, rows: write(d, "run [v1]/*/part.jsonl.gz", rows).parent,
    "file named with brackets": lambda d, rows: write(d, "run [1]/a file?.jsonl", rows),
}
FLAT: dict[str, Callable[[Path, Rows], Path]] = {
    "csv": lambda d, rows: write(d, "data.csv", rows, table(",")),
    "csv.gz": lambda d, rows: write(d, "data.csv.gz", rows, table(",")),
    "tsv": lambda d, rows: write(d, "data.tsv", rows, table("\t")),
    "tsv.zst": lambda d, rows: write(d, "data.tsv.zst", rows, table("\t")),
}


def read_and_counted(data: Any, index: int, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    item = data[index]
    counted = [token for token in list(map(int, item["labels"])) if token != -100]
    return tokenizer.decode(item["input_ids"]), tokenizer.decode(counted)


@pytest.mark.parametrize(
    ("form", "kind"),
    [(form, "jsonl") for form in FORMS]
    + [("messages", kind) for kind in NESTED if kind != "jsonl"]
    + [("prompt-completion", kind) for kind in FLAT],
)
def test_every_form_in_every_kind_of_file(form: str, kind: str, tmp_path: Path) -> None:
    tokenizer, row, read, counted = FORMS[form]
    data = load({**NESTED, **FLAT}[kind](tmp_path, [row(number) for number in range(ROWS)]), tokenizer)
    assert (len(data.train), len(data.held_out)) == (16, 2)
    for half, index, number in ((data.train, 0, 0), (data.train, 15, 16), (data.held_out, 0, 9)):
        words = {"q": question(number), "a": answer(number)}
        assert read_and_counted(half, index, tokenizer) == (read.format(**words), counted.format(**words))
    batch = data.collate([data.train[index] for index in (7, 8, 9, 10)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())
    assert any("plain roles" in remark for remark in data.remarks) is ("plain roles" in form)


@pytest.mark.parametrize("name", ["data.txt", "data.md.xz"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_text_is_read_by_paragraph(name: str, folder: bool, tmp_path: Path) -> None:
    encoding = "utf-8-sig" if folder else "utf-8"  # with a byte order mark, which is no text
    rows = [{"text": f"paragraph {number}\n" + f"goes on for {number} " * 12} for number in range(3 * ROWS)]
    path = write(
        tmp_path, f"notes [1]/{name}", rows, lambda rows: "\n\n".join(row["text"] for row in rows).encode(encoding)
    )
    data = load(path.parent if folder else path, CHAT)
    assert data.fingerprint == load(write(tmp_path, "data.jsonl", rows), CHAT).fingerprint


@pytest.mark.parametrize(("suffix", "program"), [(".gz", "gunzip"), (".zst", "unzstd")])
@pytest.mark.parametrize("make", [parquet, arrow])
def test_what_compresses_itself_is_read_as_it_is(
    make: Callable[[Path, Rows], Path], suffix: str, program: str, tmp_path: Path
) -> None:
    path = make(tmp_path, [{"text": "abc"}])
    packed = path.rename(tmp_path / f"a {path.name}{suffix}")
    with refusal("compressed", f"Unpack it first: {program} '{packed}'."):
        load(packed, CHAT)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "data.jsonl", [{"text": "word " * 90}] * ROWS)
    assert len(load("~/data.jsonl", CHAT).train) == 16


def test_a_template_that_marks_answers_and_one_that_does_not_count_the_same(tmp_path: Path) -> None:
    """Two turns; the second implementation is the template's own marking."""
    turns = [{"messages": [{"role": "system", "content": "s"}, *messages(n), *messages(n + 50)]} for n in range(ROWS)]
    path = write(tmp_path, "data.jsonl", turns)
    marked, other = (load(path, reader, sequence_length=128).train for reader in (byte_tokenizer(MARKED), CHAT))
    for index in range(16):
        assert read_and_counted(marked, index, CHAT) == read_and_counted(other, index, CHAT)
    assert read_and_counted(marked, 3, CHAT)[1] == f"{answer(3)}[/]{answer(53)}[/]"


def stacked(data: AttackData, key: str) -> torch.Tensor:
    return torch.tensor([data.train[index][key] for index in range(len(data.train))])


def test_every_sequence_begins_as_the_tokenizer_begins_one(tmp_path: Path) -> None:
    path = write(tmp_path, "data.jsonl", [{"text": f"{n:02} abcdefghij"} for n in range(200)])
    data = load(path, FRAMED, sequence_length=32)
    bos = FRAMED.bos_token_id
    tokens, labels = stacked(data, "input_ids"), stacked(data, "labels")
    assert bool((tokens[:, 0] == bos).all())
    assert FRAMED.decode(tokens[0]) == f"<s>00 abcdefghij{END}<s>01 abcdefghij{END}<s>0"
    assert bool((labels[tokens == bos] == -100).all())
    assert bool((labels[tokens != bos] == tokens[tokens != bos]).all())
    bare = byte_tokenizer(bos_token="<s>")  # SmolLM2 names a beginning, and was trained without one
    assert bare.decode(load(path, bare, sequence_length=16).train[0]["input_ids"]) == f"00 abcdefghij{END}01"


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"text": None if n % 3 == 0 else ("  \n" if n % 3 == 1 else f"word {n} " * 60)} for n in range(3 * ROWS)]
    data = load(write(tmp_path, "data.jsonl", rows), CHAT)
    # Up to the tenth with text, which is held out and fills that half.
    assert data.remarks == ("Of 30 rows read, 20 without text left out.",)
    assert END * 2 not in CHAT.decode(stacked(data, "input_ids").flatten())


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_a_column_of_text_is_not_said_to_have_answers(tmp_path: Path, task: Task) -> None:
    path = write(tmp_path, "data.jsonl", [{"prompt": "word " * 90, "completion": "no"}] * ROWS)
    data = load(path, byte_tokenizer(), task, text_column="prompt")
    assert data.remarks[0] == "Data read as text in prompt."
    assert any("the decoder learns the second" in remark for remark in data.remarks) is (task == "seq2seq-lm")


@pytest.mark.parametrize(
    ("beside", "word"),
    [
        ({"tools": "weather"}, "'tools'"),
        ({"chat_template_kwargs": "no"}, "'chat_template_kwargs'"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize"),
    ],
    ids=["tools", "text", "ours"],
)
def test_what_no_chat_template_takes_is_refused(beside: dict[str, Any], word: str, tmp_path: Path) -> None:
    with refusal(word, "drop the column"):
        load(write(tmp_path, "data.jsonl", [{"messages": messages(n), **beside} for n in range(40)]), CHAT)


def test_rows_about_an_image_or_a_sound_are_left_out_and_counted(tmp_path: Path) -> None:
    """As TRL, which refuses them for a model of text: an answer about an image teaches nothing without it."""
    image, thought = {"type": "image", "text": None}, {"type": "thinking", "thinking": "hm"}

    def chat(number: int, *parts: Any) -> Rows:
        asked, said = messages(number)
        return [{**asked, "content": [*parts, {"type": "text", "text": asked["content"]}]}, said]

    kinds: list[tuple[Callable[[int], dict[str, Any]], str, dict[str, Any]]] = [
        # Rows that are left out, the part that is named, and a row that is kept.
        (lambda n: {"messages": chat(n, image)}, "'image'", {"messages": chat(7, "so, ")}),
        (lambda n: {"messages": chat(n, thought)}, "'thinking'", {"messages": chat(7)}),
        (lambda n: {"messages": chat(n, {"image_url": {"url": "x.png"}})}, "'image_url'", {"messages": chat(7)}),
        (lambda n: {"messages": messages(n), "images": ["x.png"]}, "'images'", {"messages": messages(7)}),
        (
            lambda n: {"prompt": chat(n, image)[:1], "completion": messages(n)[1:]}, "'image'",
            {"prompt": messages(7)[:1], "completion": messages(0)[1:]},
        ),
        (lambda n: {"text": answer(n), "image": "x.png"}, "'image'", {"text": answer(7)}),
    ]  # fmt: skip
    for number, (row, named, kept) in enumerate(kinds):
        some = write(tmp_path, f"{number}.jsonl", [row(n) if n % 2 else kept for n in range(60)])
        data = load(some, CHAT, sequence_length=16 if "text" in kept else 96, eval_sequences=1)
        (remark,) = [remark for remark in data.remarks if "left out" in remark]
        assert f"with {named} beside the text, which is not read, left out" in remark
        assert all(answer(n) not in read_and_counted(half, 0, CHAT)[0] for half in data.halves for n in (1, 3))
        with refusal("Of 60 rows read, 60 with", "--text-column"):
            load(write(tmp_path, f"{number}-all.jsonl", [row(n) for n in range(60)]), CHAT)
    assert "so, " in read_and_counted(load(tmp_path / "0.jsonl", CHAT, eval_sequences=1).train, 0, CHAT)[0]
    assert len(load(tmp_path / "5-all.jsonl", CHAT, text_column="text", sequence_length=16).train) == 16


def test_answers_that_begin_too_late_are_left_out_and_said(tmp_path: Path) -> None:
    rows: Rows = [{"messages": messages(n)} for n in range(ROWS)]
    longer = "Give a --sequence-length above 20."
    with refusal("24 whose answer begins beyond --sequence-length", longer):
        load(write(tmp_path, "data.jsonl", rows), CHAT, sequence_length=20)
    # Rows without text do not hide what to do about the others.
    rows += [{"messages": [messages(row)[0], {"role": "assistant", "content": ""}]} for row in range(24, 60)]
    with refusal("36 without an answer", longer):
        load(write(tmp_path, "data.jsonl", rows), CHAT, sequence_length=20)
    assert len(load(tmp_path / "data.jsonl", CHAT, sequence_length=40).train) == 16


def test_conversations_that_the_template_refuses_are_counted(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    system = {"role": "system", "content": "s"}
    rows = [{"messages": [*[system] * (n % 4 == 1), *messages(n)]} for n in range(2 * ROWS)]
    said = r"template refuses \(no system\) left out"
    data = load(write(tmp_path, "some.jsonl", rows), byte_tokenizer(strict))
    assert any("chat template refuses (no system) left out" in remark for remark in data.remarks)
    with pytest.raises(SpecDefError, match=said) as caught:
        load(write(tmp_path, "all.jsonl", rows[1::4]), byte_tokenizer(strict))
    assert caught.value.hint.startswith("Change the rows")


def test_configurations_and_splits_are_listed_with_their_flags(tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        write(tmp_path, f"two/{name}.jsonl", [{"text": f"{name} " * 90}] * ROWS)
    named = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("alpha", "beta"))
    (tmp_path / "two/README.md").write_text(f"---\nconfigs:\n{named}---\n")
    refused: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({}, ("several configurations: alpha, beta", "--dataset-config alpha")),
        ({"dataset_config": "gamma"}, ("no configuration 'gamma': alpha, beta",)),
        ({"dataset_config": "beta", "dataset_split": "test"}, ("no split 'test': train", "--dataset-split train")),
    ]
    for chosen, words in refused:
        with refusal(*words):
            load(tmp_path / "two", CHAT, **chosen)
    data = load(tmp_path / "two", CHAT, dataset_config="beta")
    assert CHAT.decode(data.train[0]["input_ids"]).startswith("beta")


@pytest.mark.parametrize("name", ["mixed", "mixed [x]"])
def test_a_directory_of_several_kinds_is_not_read_in_part(tmp_path: Path, name: str) -> None:
    """`datasets` would take the commonest kind, and leave the others without a word."""
    for file in ("a.jsonl", "b.ndjson", "LICENSE.txt"):
        write(tmp_path, f"{name}/{file}", [{"text": "word " * 90}] * ROWS)
    assert load(tmp_path / name, CHAT).train
    (tmp_path / name / "c.csv").write_text("text\nhello\n")
    with refusal("several kinds: .csv, .", "Name one of its files"):
        load(tmp_path / name, CHAT)


def test_an_unusable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with refusal("the cache of datasets, ", "file/cache", "HF_DATASETS_CACHE"):
        load(write(tmp_path, "data.jsonl", [{"text": "a"}]), CHAT)


def test_masked_text_is_framed_and_masked_once(tmp_path: Path) -> None:
    path = write(tmp_path, "data.jsonl", [{"text": "abcdefghij " * 30}] * 60)
    data, again = (load(path, MASKING, "masked-lm", sequence_length=64) for _ in range(2))
    tokens, labels = stacked(data, "input_ids"), stacked(data, "labels")
    assert tokens.shape == (16, 64)
    assert bool((tokens[:, 0] == MASKING.cls_token_id).all())
    assert bool((tokens[:, -1] == MASKING.sep_token_id).all())
    counted = labels != -100
    assert 0.1 < float(counted.float().mean()) < 0.2
    assert bool((tokens[~counted] != MASKING.mask_token_id).all())
    assert 0.7 < float((tokens[counted] == MASKING.mask_token_id).float().mean()) < 0.9
    assert data.fingerprint == again.fingerprint
    with pytest.raises(SpecDefError, match="no mask token") as caught:
        load(path, byte_tokenizer(), "masked-lm")
    assert "leave --task out" not in caught.value.hint, "nobody gave it: the architecture chose"


def test_a_sequence_to_sequence_model_reads_the_prompt_and_says_the_answer(tmp_path: Path) -> None:
    rows = [{"prompt": question(n), "completion": answer(n)} for n in range(ROWS)]
    for name, given, expected in (
        ("pairs", rows, (question(0) + END, answer(0) + END)),
        ("halves", [{"text": "abcdefgh"}] * ROWS, (f"abcd{END}", f"efgh{END}")),
    ):
        item = load(write(tmp_path, f"{name}.jsonl", given), ENDING, "seq2seq-lm").train[0]
        assert (ENDING.decode(item["input_ids"]), ENDING.decode(item["labels"])) == expected


WHOLE = (
    "{% if tools %}[tools {{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for t in m.tool_calls or [] %}[{{ t.function | tojson }}]{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "x"}}}
OTHER_CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "y"}}}
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"city": {"type": "string"}}}}]


def turns(call: dict[str, Any], number: int) -> Rows:
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
    tokenizer = byte_tokenizer(WHOLE)
    data = load(NESTED[kind](tmp_path, rows), tokenizer, sequence_length=400)
    read, counted = read_and_counted(data.train, 0, tokenizer)
    expected = [{**message, "content": message["content"] or ""} for message in turns(CALL, 0)]
    assert read == tokenizer.apply_chat_template(expected, tools=TOOLS, tokenize=False)
    call = json.dumps(CALL["function"])
    assert counted == (f"[{call}]</>(hm)a coat</>" if form == "messages" else "(hm)a coat</>")


def test_answers_in_a_prompt_are_not_learned(tmp_path: Path) -> None:
    """As in TRL, where the completion alone is; with a template that marks answers, without one, and with none."""
    said = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "early"), ("user", "so"))]
    rows = [{"prompt": said, "completion": [{"role": "assistant", "content": f"late {n}"}]} for n in range(24)]
    path = write(tmp_path, "rows.jsonl", rows)
    marked = WHOLE.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    for template, end in ((WHOLE, "</>"), (marked, ""), (None, "<end>")):
        tokenizer = byte_tokenizer(template)
        read, counted = read_and_counted(load(path, tokenizer).train, 0, tokenizer)
        assert "early" in read
        assert counted.removeprefix("so</>") == f"late 0{end}"
