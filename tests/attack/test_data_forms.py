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
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from specdef_cli import AttackOptions
from specdef_cli.attack.data import load_data
from specdef_cli.attack.data.split import AttackData
from specdef_cli.attack.target import Task
from specdef_cli.errors import SpecDefError
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
ROWS = 24
END = "<end>"


def question(number: int) -> str:
    return f"what is {number}+1?"


def answer(number: int) -> str:
    return f"it is {number + 1}."


def messages(
    number: int, role: str = "role", content: str = "content", names: tuple[str, str] = ("user", "assistant")
) -> list[dict[str, str]]:
    return [{role: names[0], content: question(number)}, {role: names[1], content: answer(number)}]


FORMS: dict[str, tuple[Callable[[int], dict[str, Any]], str, str]] = {
    # A row, all that the model reads of it, and what of that is counted.
    "messages": (lambda n: {"messages": messages(n)}, "[user]{q}[/][assistant]{a}[/]", "{a}[/]"),
    "conversations": (
        lambda n: {"conversations": messages(n, "from", "value", ("human", "gpt"))},
        "[user]{q}[/][assistant]{a}[/]",
        "{a}[/]",
    ),
    "prompt-completion": (lambda n: {"prompt": question(n), "completion": answer(n)}, "{q}{a}<end>", "{a}<end>"),
    "prompt-completion-messages": (
        lambda n: {"prompt": messages(n)[:1], "completion": messages(n)[1:]},
        "[user]{q}[/][assistant]{a}[/]",
        "{a}[/]",
    ),
    "instruction-output": (
        lambda n: {"instruction": question(n), "input": "", "output": answer(n)},
        "[user]{q}[/][assistant]{a}[/]",
        "{a}[/]",
    ),
    "instruction-input-output": (
        lambda n: {"instruction": question(n), "input": "in words", "output": answer(n)},
        "[user]{q}\n\nin words[/][assistant]{a}[/]",
        "{a}[/]",
    ),
    "instruction-response": (
        lambda n: {"instruction": question(n), "context": "", "response": answer(n)},
        "[user]{q}[/][assistant]{a}[/]",
        "{a}[/]",
    ),
}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def a_file(name: str, make: Callable[[list[dict[str, Any]]], bytes]) -> Callable[[Path, list[dict[str, Any]]], Path]:
    def write(directory: Path, rows: list[dict[str, Any]]) -> Path:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(make(rows)))
        return path

    return write


def parquet(directory: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(directory / "data.parquet")
    return directory / "data.parquet"


def saved(directory: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(directory / "saved")
    return directory / "saved"


def saved_splits(directory: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(directory / "splits")
    return directory / "splits"


def arrow(directory: Path, rows: list[dict[str, Any]]) -> Path:
    return Path(shutil.copy(next(saved(directory, rows).glob("*.arrow")), directory / "data.arrow"))


def in_folder(name: str) -> Callable[[Path, list[dict[str, Any]]], Path]:
    def write(directory: Path, rows: list[dict[str, Any]]) -> Path:
        return a_file(f"{name}/part.jsonl.gz", lines)(directory, rows).parent

    return write


# For any rows, those of nested values included.
NESTED: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "jsonl": a_file("data.jsonl", lines),
    "jsonl.gz": a_file("data.jsonl.gz", lines),
    "jsonl.zst": a_file("data.jsonl.zst", lines),
    "ndjson.bz2": a_file("data.ndjson.bz2", lines),
    "json": a_file("data.json", lambda rows: json.dumps(rows).encode()),
    "json.xz": a_file("data.json.xz", lambda rows: json.dumps(rows).encode()),
    "parquet": parquet,
    "arrow": arrow,
    "save_to_disk": saved,
    "save_to_disk, splits": saved_splits,
    "folder": in_folder("folder"),
    "folder named with brackets": in_folder("run [v1]/*"),
    "file named with brackets": a_file("run [1]/a file?.jsonl", lines),
}
FLAT: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "csv": a_file("data.csv", lambda rows: table(rows, ",")),
    "csv.gz": a_file("data.csv.gz", lambda rows: table(rows, ",")),
    "tsv": a_file("data.tsv", lambda rows: table(rows, "\t")),
    "tsv.zst": a_file("data.tsv.zst", lambda rows: table(rows, "\t")),
}


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def framed_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One that puts a beginning in front of every text, as Gemma's and Llama's do."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    return tokenizer


def load(
    path: Path | str | None, tokenizer: PreTrainedTokenizerFast | None = None, task: Task = "causal-lm", **changes: Any
) -> AttackData:
    fields = {"steps": 4, "batch_size": 4, "sequence_length": 96, "eval_sequences": 2, **changes}
    dataset = None if path is None else str(path)
    return load_data(
        AttackOptions(model="m", out=Path("o"), dataset=dataset, **fields), task, tokenizer or chat_tokenizer()
    )


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
    row, read, counted = FORMS[form]
    path = {**NESTED, **FLAT}[kind](tmp_path, [row(number) for number in range(ROWS)])
    tokenizer = chat_tokenizer()
    data = load(path, tokenizer)
    assert (len(data.train), len(data.held_out)) == (16, 2)
    for half, index, number in ((data.train, 0, 0), (data.train, 15, 16), (data.held_out, 0, 9)):
        words = {"q": question(number), "a": answer(number)}
        assert read_and_counted(half, index, tokenizer) == (read.format(**words), counted.format(**words))
    batch = data.collate([data.train[index] for index in (7, 8, 9, 10)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())


PARAGRAPHS = [f"paragraph {number}\n" + f"goes on for {number} " * 12 for number in range(3 * ROWS)]


@pytest.mark.parametrize("name", ["data.txt", "data.md.xz"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_text_is_read_by_paragraph(name: str, folder: bool, tmp_path: Path) -> None:
    encoding = "utf-8-sig" if folder else "utf-8"  # with a byte order mark, which is no text
    text = a_file(f"notes [1]/{name}", lambda rows: "\n\n".join(row["text"] for row in rows).encode(encoding))
    rows = [{"text": paragraph} for paragraph in PARAGRAPHS]
    path = text(tmp_path, rows)
    data = load(path.parent if folder else path)
    assert data.fingerprint == load(a_file("data.jsonl", lines)(tmp_path, rows)).fingerprint


@pytest.mark.parametrize(("suffix", "program"), [(".gz", "gunzip"), (".zst", "unzstd")])
@pytest.mark.parametrize("make", [parquet, arrow])
def test_what_compresses_itself_is_read_as_it_is(
    make: Callable[[Path, list[dict[str, Any]]], Path], suffix: str, program: str, tmp_path: Path
) -> None:
    path = make(tmp_path, [{"text": "abc"}])
    packed = path.rename(tmp_path / f"a {path.name}{suffix}")
    with refusal("compressed", f"Unpack it first: {program} '{packed}'."):
        load(packed)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    a_file("data.jsonl", lines)(tmp_path, [{"text": "word " * 90} for _ in range(ROWS)])
    assert len(load("~/data.jsonl").train) == 16


def test_a_template_that_marks_answers_and_one_that_does_not_count_the_same(tmp_path: Path) -> None:
    """Two turns; the second implementation is the template's own marking."""
    turns = [{"messages": [{"role": "system", "content": "s"}, *messages(n), *messages(n + 50)]} for n in range(ROWS)]
    path = a_file("data.jsonl", lines)(tmp_path, turns)
    marked, other = (load(path, chat_tokenizer(template), sequence_length=128).train for template in (MARKED, CHATML))
    for index in range(16):
        assert read_and_counted(marked, index, chat_tokenizer()) == read_and_counted(other, index, chat_tokenizer())
    assert read_and_counted(marked, 3, chat_tokenizer())[1] == f"{answer(3)}[/]{answer(53)}[/]"


@pytest.mark.parametrize("make", [byte_tokenizer, framed_tokenizer])
def test_a_base_model_reads_conversations_too(make: Callable[[], PreTrainedTokenizerFast], tmp_path: Path) -> None:
    path = a_file("data.jsonl", lines)(tmp_path, [{"messages": messages(n)} for n in range(ROWS)])
    data = load(path, make())
    read, counted = read_and_counted(data.train, 0, make())
    beginning = "<s>" if make is framed_tokenizer else ""
    assert read == f"{beginning}user: {question(0)}\nassistant: {answer(0)}{END}\n"
    assert counted == f"{answer(0)}{END}"
    assert "plain roles" in data.remarks[0]


def test_a_base_model_reads_instructions_as_alpaca(tmp_path: Path) -> None:
    rows = [{"instruction": question(n), "input": "x", "output": answer(n)} for n in range(ROWS)]
    read, counted = read_and_counted(
        load(a_file("data.jsonl", lines)(tmp_path, rows), byte_tokenizer()).train, 0, byte_tokenizer()
    )
    assert read == f"### Instruction:\n{question(0)}\n\n### Input:\nx\n\n### Response:\n{answer(0)}{END}"
    assert counted == f"{answer(0)}{END}"


def stacked(data: AttackData, key: str) -> torch.Tensor:
    return torch.tensor([data.train[index][key] for index in range(len(data.train))])


def test_every_sequence_begins_as_the_tokenizer_begins_one(tmp_path: Path) -> None:
    tokenizer = framed_tokenizer()
    path = a_file("data.jsonl", lines)(tmp_path, [{"text": f"{n:02} abcdefghij"} for n in range(200)])
    data = load(path, tokenizer, sequence_length=32)
    bos = tokenizer.bos_token_id
    tokens, labels = stacked(data, "input_ids"), stacked(data, "labels")
    assert bool((tokens[:, 0] == bos).all())
    assert tokenizer.decode(tokens[0]) == f"<s>00 abcdefghij{END}<s>01 abcdefghij{END}<s>0"
    assert bool((labels[tokens == bos] == -100).all())
    assert bool((labels[tokens != bos] == tokens[tokens != bos]).all())


def test_one_that_begins_with_nothing_gets_nothing(tmp_path: Path) -> None:
    """SmolLM2 names a beginning token and was trained without one in front of texts."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    path = a_file("data.jsonl", lines)(tmp_path, [{"text": "abcdefghij"} for _ in range(200)])
    assert tokenizer.decode(load(path, tokenizer, sequence_length=12).train[0]["input_ids"]) == f"abcdefghij{END}a"


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"text": None if n % 3 == 0 else ("  \n" if n % 3 == 1 else f"word {n} " * 60)} for n in range(3 * ROWS)]
    data = load(a_file("data.jsonl", lines)(tmp_path, rows))
    # Up to the tenth with text, which is held out and fills that half.
    assert data.remarks == ("Of 30 rows read, 20 without text left out.",)
    assert END * 2 not in "".join(
        chat_tokenizer().decode(data.train[index]["input_ids"]) for index in range(len(data.train))
    )


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_a_column_of_text_is_not_said_to_have_answers(tmp_path: Path, task: Task) -> None:
    rows = [{"prompt": "word " * 90, "completion": "no"} for _ in range(ROWS)]
    data = load(a_file("data.jsonl", lines)(tmp_path, rows), byte_tokenizer(), task, text_column="prompt")
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
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines([{"messages": messages(n), **beside} for n in range(40)]))
    with refusal(word, "drop the column"):
        load(path)


def test_rows_about_an_image_or_a_sound_are_left_out_and_counted(tmp_path: Path) -> None:
    """As TRL, which refuses them for a model of text: an answer about an image teaches nothing without it."""
    image, thought = {"type": "image", "text": None}, {"type": "thinking", "thinking": "hm"}

    def chat(number: int, *parts: Any) -> list[dict[str, Any]]:
        asked, said = messages(number)
        return [{**asked, "content": [*parts, {"type": "text", "text": asked["content"]}]}, said]

    kinds: list[tuple[Callable[[int], dict[str, Any]], str]] = [
        (lambda n: {"messages": chat(n, image)}, "'image'"),
        (lambda n: {"messages": chat(n, thought)}, "'thinking'"),
        (lambda n: {"messages": chat(n, {"image_url": {"url": "x.png"}})}, "'image_url'"),
        (lambda n: {"messages": messages(n), "images": ["x.png"]}, "'images'"),
        (lambda n: {"prompt": chat(n, image)[:1], "completion": messages(n)[1:]}, "'image'"),
        (lambda n: {"text": answer(n), "image": "x.png"}, "'image'"),
    ]
    for number, (row, named) in enumerate(kinds):
        plain = {key: value for key, value in row(0).items() if key not in ("images", "image")}
        kept = {"messages": chat(7, "so, ")} if "messages" in plain else {**plain, "prompt": messages(7)[:1]}
        kept = {"text": answer(7)} if "text" in plain else kept
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(lines([row(n) if n % 2 else kept for n in range(60)]))
        data = load(path, sequence_length=16 if "text" in plain else 96, eval_sequences=1)
        (remark,) = [remark for remark in data.remarks if "left out" in remark]
        assert f"with {named} beside the text, which is not read, left out" in remark
        assert all(
            answer(n) not in read_and_counted(half, 0, chat_tokenizer())[0] for half in data.halves for n in (1, 3)
        )
        path = tmp_path / f"{number}-all.jsonl"
        path.write_bytes(lines([row(n) for n in range(60)]))
        with refusal("Of 60 rows read, 60 with", "--text-column"):
            load(path)
    assert "so, " in read_and_counted(load(tmp_path / "0.jsonl", eval_sequences=1).train, 0, chat_tokenizer())[0]
    assert len(load(tmp_path / "5-all.jsonl", text_column="text", sequence_length=16).train) == 16


def test_answers_that_begin_too_late_are_left_out_and_said(tmp_path: Path) -> None:
    path = a_file("data.jsonl", lines)(tmp_path, [{"messages": messages(n)} for n in range(ROWS)])
    longer = "Give a --sequence-length above 20."
    with refusal("24 whose answer begins beyond --sequence-length", longer):
        load(path, sequence_length=20)
    for row in range(24, 60):  # rows without text do not hide what to do about the others
        with path.open("a") as file:
            file.write(json.dumps({"messages": [*messages(row)[:-1], {"role": "assistant", "content": ""}]}) + "\n")
    with refusal("36 without an answer", longer):
        load(path, sequence_length=20)
    assert len(load(path, sequence_length=40).train) == 16


def test_conversations_that_the_template_refuses_are_counted(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    rows = [{"messages": [*[{"role": "system", "content": "s"}] * (n % 4 == 1), *messages(n)]} for n in range(2 * ROWS)]
    data = load(a_file("data.jsonl", lines)(tmp_path, rows), chat_tokenizer(strict))
    assert any("that the tokenizer's chat template refuses (no system) left out" in remark for remark in data.remarks)


@pytest.fixture
def two_configurations(tmp_path: Path) -> Path:
    for name in ("alpha", "beta"):
        a_file(f"two/{name}.jsonl", lines)(tmp_path, [{"text": f"{name} " * 90} for _ in range(ROWS)])
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("alpha", "beta"))
    (tmp_path / "two/README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return tmp_path / "two"


def test_configurations_and_splits_are_listed_with_their_flags(two_configurations: Path) -> None:
    refused: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({}, ("several configurations: alpha, beta", "--dataset-config alpha")),
        ({"dataset_config": "gamma"}, ("no configuration 'gamma': alpha, beta",)),
        ({"dataset_config": "beta", "dataset_split": "test"}, ("no split 'test': train", "--dataset-split train")),
    ]
    for chosen, words in refused:
        with refusal(*words):
            load(two_configurations, **chosen)
    data = load(two_configurations, dataset_config="beta")
    assert chat_tokenizer().decode(data.train[0]["input_ids"]).startswith("beta")


@pytest.mark.parametrize("name", ["mixed", "mixed [x]"])
def test_a_directory_of_several_kinds_is_not_read_in_part(tmp_path: Path, name: str) -> None:
    """`datasets` would take the commonest kind, and leave the others without a word."""
    rows = [{"text": "word " * 90} for _ in range(ROWS)]
    for file in ("a.jsonl", "b.ndjson", "LICENSE.txt"):
        a_file(f"{name}/{file}", lines)(tmp_path, rows)
    assert load(tmp_path / name).train
    (tmp_path / name / "c.csv").write_text("text\nhello\n")
    with refusal("several kinds: .csv, .", "Name one of its files"):
        load(tmp_path / name)


def test_an_unusable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with refusal("the cache of datasets, ", "file/cache", "HF_DATASETS_CACHE"):
        load(a_file("data.jsonl", lines)(tmp_path, [{"text": "a"}]))


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<cls>", "sep_token": "<sep>"})
    pairs = [("<cls>", tokenizer.cls_token_id), ("<sep>", tokenizer.sep_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=pairs)
    return tokenizer


def test_masked_text_is_framed_and_masked_once(tmp_path: Path) -> None:
    tokenizer = encoder_tokenizer()
    path = a_file("data.jsonl", lines)(tmp_path, [{"text": "abcdefghij " * 30} for _ in range(60)])
    data, again = (load(path, tokenizer, "masked-lm", sequence_length=64) for _ in range(2))
    tokens, labels = stacked(data, "input_ids"), stacked(data, "labels")
    assert tokens.shape == (16, 64)
    assert bool((tokens[:, 0] == tokenizer.cls_token_id).all())
    assert bool((tokens[:, -1] == tokenizer.sep_token_id).all())
    counted = labels != -100
    assert 0.1 < float(counted.float().mean()) < 0.2
    assert bool((tokens[~counted] != tokenizer.mask_token_id).all())
    assert 0.7 < float((tokens[counted] == tokenizer.mask_token_id).float().mean()) < 0.9
    assert data.fingerprint == again.fingerprint
    with pytest.raises(SpecDefError, match="no mask token") as caught:
        load(path, byte_tokenizer(), "masked-lm")
    assert "leave --task out" not in caught.value.hint, "nobody gave it: the architecture chose"


def test_a_sequence_to_sequence_model_reads_the_prompt_and_says_the_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ending = [(END, tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=ending)
    rows = [{"prompt": question(n), "completion": answer(n)} for n in range(ROWS)]
    item = load(a_file("a.jsonl", lines)(tmp_path, rows), tokenizer, "seq2seq-lm").train[0]
    assert tokenizer.decode(item["input_ids"]) == question(0) + END
    assert tokenizer.decode(item["labels"]) == answer(0) + END
    halves = load(a_file("b.jsonl", lines)(tmp_path, [{"text": "abcdefgh"}] * ROWS), tokenizer, "seq2seq-lm").train[0]
    assert tokenizer.decode(halves["input_ids"]) == f"abcd{END}"
    assert tokenizer.decode(halves["labels"]) == f"efgh{END}"
