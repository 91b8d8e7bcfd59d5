"""What an attack gives a model to read is what the model was trained on: the first and last tokens, a chat's template.

Gemma without its beginning token starts two nats too high, and a short attack would only teach it to do without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from specdef_cli.attack import run
from specdef_cli.attack.data.rows import AttackData
from specdef_cli.attack.one_run import RunSpec
from specdef_cli.attack.train import TrainRun
from specdef_cli.errors import SpecDefError
from specdef_cli.model import load_model
from tests.attack.test_data_forms import chat_tokenizer, encoder_tokenizer, framed_tokenizer, messages
from tests.attack.test_tasks import DECODER, bert, ending_tokenizer, t5
from tests.commands import assert_refused, call_cli, succeed
from tests.faults.small_attack import SMALL

PROSE = [{"text": f"{number:03} what comes after {number} is {number + 1}."} for number in range(200)]
CHATS = [{"messages": messages(number)} for number in range(60)]


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


@dataclass(frozen=True)
class Case:
    """A model, its tokenizer, and how the first sequence of the data must begin and end.

    Attributes:
        begins: The first characters, special tokens included.
        ends: The last ones; empty where the sequence is cut.
        silent: What must not be learned: tokens with no loss.
    """

    model: Callable[[], Any]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    rows: list[dict[str, Any]]
    begins: str
    ends: str = ""
    silent: str = ""


CASES = {
    "beginning token": Case(llama, framed_tokenizer, PROSE, "<s>", silent="<s>"),
    "chat template": Case(llama, chat_tokenizer, CHATS, "[user]what is", "[/]", silent="[user]what is"),
    "cls and sep": Case(bert, encoder_tokenizer, PROSE, "<cls>", "<sep>", silent="<cls>"),
    "end of a source": Case(t5, ending_tokenizer, PROSE, "", "<end>"),
}


def write(case: Case, directory: Path) -> Path:
    torch.manual_seed(0)
    case.model().save_pretrained(directory)
    case.tokenizer().save_pretrained(directory)
    return directory


def given_by(directory: Path, rows: list[dict[str, Any]], where: Path, monkeypatch: pytest.MonkeyPatch) -> AttackData:
    """What ``specdef attack`` of a model would train it on."""
    found: list[AttackData] = []

    def instead(self: TrainRun, spec: RunSpec, *_: Any) -> Any:
        found.append(self.data)
        raise SpecDefError("nothing is trained here", "It was looked at alone.")

    monkeypatch.setattr(run.TrainRun, "__call__", instead)
    dataset = where / "rows.jsonl"
    dataset.write_text("\n".join(map(json.dumps, rows)))
    options = [value if value != "8" else "64" for value in SMALL]
    result = call_cli("attack", directory, "--control", directory, "--dataset", dataset, *options, "--out", where / "o")
    assert_refused(result, "nothing is trained here")
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_a_model_reads_what_it_was_trained_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    data = given_by(write(case, tmp_path / "model"), case.rows, tmp_path, monkeypatch)
    tokenizer = case.tokenizer()
    for half in data.halves:
        for index in range(len(half)):
            row = half[index]
            tokens, labels = (torch.as_tensor(row[key]).tolist() for key in ("input_ids", "labels"))
            text = tokenizer.decode(tokens)
            assert text.startswith(case.begins), text
            assert text.endswith(case.ends), text
            if case.silent:
                length = len(tokenizer(case.silent, add_special_tokens=False)["input_ids"])
                assert labels[:length] == [-100] * length
                assert any(label != -100 for label in labels)


@pytest.mark.parametrize("method", [("fold",), ("factors", "--top-k", "4")], ids=["fold", "factors"])
def test_a_hardened_decoder_starts_with_the_token_of_its_base(method: tuple[str, ...], tmp_path: Path) -> None:
    base, out = write(CASES["end of a source"], tmp_path / "model"), tmp_path / "out"
    succeed("harden", base, "--method", *method, "--out", out, "--quiet")
    labels = torch.tensor([[3, 4, 256]])
    started = [load_model(place).prepare_decoder_input_ids_from_labels(labels).tolist() for place in (base, out)]
    assert started == [[[257, 3, 4]]] * 2
