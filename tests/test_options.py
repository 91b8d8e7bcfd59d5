"""Options as users write them, and as programs fill them that have no command line to convert and check them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from specdef_cli import AttackOptions, CertifyOptions, CollapseOptions, Factors, Fold, HardenOptions
from specdef_cli.option import in_words, parse_duration, parse_size
from tests.commands import refusal


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        (HardenOptions, {"out": "out", "manifest_out": "keys.json"}),
        (CollapseOptions, {"out": "out", "manifest": "keys.json"}),
        (CertifyOptions, {"out": "out", "attacks": "report.json", "text": "text.txt"}),
        (AttackOptions, {"out": "out", "runs": "runs", "manifest": "keys.json"}),
    ],
)
def test_text_is_a_path_where_only_a_path_is_meant(kind: Any, paths: dict[str, str]) -> None:
    options = kind("model", **paths)
    assert {name: getattr(options, name) for name in paths} == {name: Path(text) for name, text in paths.items()}
    assert options.model == "model"
    assert kind("model", **{**paths, "out": Path("~/x")}).out == Path("~/x").expanduser()  # no shell expands --out=~/x


def test_one_text_is_no_sequence_of_letters() -> None:
    """A star among the letters of a glob would be every layer."""
    assert HardenOptions("base", exclude="*.o_proj").exclude == ("*.o_proj",)  # type: ignore[arg-type]
    assert CertifyOptions("model", formats="bfloat16").formats == ("bfloat16",)  # type: ignore[arg-type]
    alone = AttackOptions("model", trainings="lora")  # type: ignore[arg-type]
    assert alone == AttackOptions("model", trainings=("lora",))


def test_numbers_stand_alone_or_in_lists_and_are_numbers() -> None:
    several = AttackOptions("m", learning_rates=[1e-3], seeds=[0, 5], trainings=["full"])  # type: ignore[arg-type]
    assert (several.learning_rates, several.seeds) == ((1e-3,), (0, 5))
    assert hash(several.trainings) == hash(AttackOptions("m", trainings=("full",)).trainings)
    assert AttackOptions("m", learning_rates=1e-3, seeds=2).seeds == (0, 1)  # type: ignore[arg-type]
    for name, value in {
        "steps": "30", "eval_every": 2.5, "learning_rates": ("1e-3",), "max_grad_norm": None, "seeds": ["a"],
    }.items():  # fmt: skip
        with refusal("is not a "):
            AttackOptions("m", **{name: value})  # type: ignore[arg-type]
    with refusal("--time-limit -5"):
        AttackOptions("m", time_limit=-5)


@pytest.mark.parametrize(
    ("kind", "choice", "among"),
    [
        (Fold, {"profile": "narrow"}, "float16-cache"),
        (Factors, {"gauge": "straight"}, "rotated"),
        (HardenOptions, {"dtype": "float8"}, "bfloat16"),
        (AttackOptions, {"dtype": "half"}, "mixed"),
        (AttackOptions, {"task": "language"}, "causal-lm"),
    ],
)
def test_a_word_that_is_no_choice_is_not_taken_for_the_default(kind: Any, choice: dict[str, str], among: str) -> None:
    ((name, word),) = choice.items()
    options = {field.name for field in dataclasses.fields(kind)}
    with refusal(f"--{name} '{word}' is unknown", among):
        kind(**{"model": "model"} if "model" in options else {}, **choice)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), (" 1.5 kb ", 1500), ("2GiB", 2**31), ("1tb", 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("45m", 2700), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("2h 5min", 7500)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "--time-limit") == seconds


def test_what_is_no_size_and_no_duration() -> None:
    sizes = ("", "5", "GB", "-5GB", "0GB", "0.0001KB", "5 GBs", "1..5GB", "nanGB", "infGB", "1e3GB", "9" * 400 + "GB")
    for text in sizes:
        with refusal(repr(text), "5GB"):
            parse_size(text)
    for text in ("", "45", "m", "-3m", "0s", "1d"):
        with refusal("not a duration", "45m"):
            parse_duration(text, "--time-limit")


def test_durations_in_words() -> None:
    assert [in_words(seconds) for seconds in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]
