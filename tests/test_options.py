"""Classes of options as programs fill them, without a command line that would have converted and checked them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from specdef_cli import AttackOptions, CertifyOptions, CollapseOptions, Factors, Fold, HardenOptions, SpecDefError


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
    with pytest.raises(SpecDefError, match=f"--{name} '{word}' is unknown") as caught:
        kind(**{"model": "model"} if "model" in options else {}, **choice)
    assert among in caught.value.hint
