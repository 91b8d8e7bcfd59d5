"""Formats: a copy keeps everything, a damaged model does not, a fold loses what it must."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from specdef_cli.certify import formats
from specdef_cli.certify.formats import (
    DEFAULT_FORMATS,
    FORMATS,
    FormatFigure,
    Outcome,
    chosen_formats,
    compare,
    judge,
    measure_format,
    measure_formats,
)
from specdef_cli.certify.tools import Trial, missing
from specdef_cli.errors import SpecDefError, WrongUsage
from specdef_cli.hardening.options import Factors
from specdef_cli.model import load_model
from specdef_cli.model.inputs import token_batch
from specdef_cli.model.opened import open_model
from tests.commands import TINY_LLAMA
from tests.hardened import harden_to
from tests.hardening.mutations import edit_tensors
from tests.tiny_families import write_case


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    return token_batch(TINY_LLAMA, text, sequences=2, length=128)


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fold") / "hardened"
    harden_to(out, TINY_LLAMA)
    return out


@pytest.fixture(scope="module")
def factored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("factored") / "hardened"
    harden_to(out, TINY_LLAMA, Factors(alpha=1e4, top_k=25))
    return out


def one(base: Path, hardened: Path, tokens: torch.Tensor | None, name: str) -> FormatFigure:
    return measure_formats(open_model(base), open_model(hardened), tokens, [name])[0]


def damaged(out: Path) -> Path:
    """The tiny Llama with the signs of one layer's outputs turned: it loads everywhere, and says nothing sensible."""

    def turn(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.endswith(("down_proj.weight", "o_proj.weight")):
                weights[name] = -3 * weights[name]

    shutil.copytree(TINY_LLAMA, out)
    edit_tensors(out, turn)
    return out


@pytest.mark.slow
def test_an_unhardened_copy_keeps_everything_to_the_last_bit(tmp_path: Path, tokens: torch.Tensor) -> None:
    seen: list[FormatFigure] = []
    copy = shutil.copytree(TINY_LLAMA, tmp_path / "copy")
    names = [name for name in FORMATS if name != "compile"]
    figures = measure_formats(open_model(TINY_LLAMA), open_model(copy), tokens, names, on_figure=seen.append)
    assert [figure.format for figure in figures] == names
    assert list(figures) == seen
    for figure in figures:
        if figure.status == "skipped":  # a tool that is not here, or that fails on the base itself
            assert figure.note, figure
            continue
        assert figure.status == "kept", figure
        assert figure.base == figure.hardened, figure
    by_name = {figure.format: figure.base for figure in figures if figure.status == "kept"}
    assert len(by_name) >= len(DEFAULT_FORMATS)
    # No format left the model as it was.
    for name in set(by_name) - {"float32"}:
        assert by_name[name] != by_name["float32"], name


def test_the_words_for_two_outcomes() -> None:
    measured = Outcome("measured", 2.0)
    assert compare("x", "t", "loss", measured, measured).verdict == "kept"
    garbage = compare("x", "t", "loss", measured, Outcome("measured", None))
    assert (garbage.status, garbage.verdict) == ("broken", "broken, silently")
    loud = compare("x", "t", "loss", measured, Outcome("refused", note="unknown architecture"))
    assert (loud.status, loud.note) == ("refused", "unknown architecture")
    absent = compare("x", "t", "loss", Outcome("refused", note="no kernel"), measured)
    assert (absent.status, absent.note) == ("skipped", "the base fails: no kernel")


REAL_ENGINES = [name for name, row in FORMATS.items() if row.tool in {"bitsandbytes", "torchao", "llama.cpp"}]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_ENGINES)
def test_engines_keep_a_copy_and_see_a_broken_one(name: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    tool = FORMATS[name].tool
    if missing(tool):
        pytest.skip(missing(tool))
    kept = one(TINY_LLAMA, shutil.copytree(TINY_LLAMA, tmp_path / "copy"), tokens, name)
    if kept.status == "skipped":
        pytest.skip(kept.note)  # what the engine does not take at this size
    assert kept.status == "kept", kept
    broken = one(TINY_LLAMA, damaged(tmp_path / "broken"), tokens, name)
    assert broken.status in {"broken", "refused"}, broken


def test_the_loss_is_that_of_transformers(tokens: torch.Tensor) -> None:
    figure = one(TINY_LLAMA, TINY_LLAMA, tokens, "float32")
    with torch.inference_mode():
        expected = load_model(TINY_LLAMA)(input_ids=tokens, labels=tokens).loss
    assert figure.measure == "loss"
    assert figure.base == pytest.approx(float(expected), rel=1e-5)


def test_a_fold_is_exact_until_its_exponents_leave_the_format(fold: Path, tokens: torch.Tensor) -> None:
    figures = {figure.format: figure for figure in measure_formats(open_model(TINY_LLAMA), open_model(fold), tokens)}
    assert list(figures) == list(DEFAULT_FORMATS)
    assert figures["float32"].base == figures["float32"].hardened
    assert figures["bfloat16"].base == figures["bfloat16"].hardened
    assert figures["float16"].base is not None
    assert (figures["float16"].hardened, figures["float16"].status) == (None, "broken")


def test_factors_keep_their_function_but_not_in_int8(factored: Path, tokens: torch.Tensor) -> None:
    if missing("torchao"):
        pytest.skip(missing("torchao"))
    for name, expected in {"float32": "kept", "torchao-int8": "broken"}.items():
        assert one(TINY_LLAMA, factored, tokens, name).status == expected, name


def test_a_refusal_is_in_the_tools_words_and_names_no_directory(
    factored: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    if missing("bitsandbytes"):
        pytest.skip(missing("bitsandbytes"))
    refused = measure_format(Trial(open_model(factored), open_model(TINY_LLAMA), tmp_path, tokens), FORMATS["nf4"])
    assert (refused.kind, refused.value) == ("refused", None)
    assert "BitsAndBytesConfig" in refused.note
    assert str(factored) not in refused.note


def test_what_is_no_language_model_is_measured_by_its_outputs(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = checkpoints["vit"]
    harden_to(tmp_path / "factors", base, Factors(alpha=1e3, top_k=4))
    names = ["float32", "bfloat16", "gguf-f32"]
    found = measure_formats(open_model(base), open_model(tmp_path / "factors"), None, names)
    figures = {figure.format: figure for figure in found}
    assert {figure.measure for figure in figures.values()} == {"relative error"}
    assert figures["float32"].base == 0
    assert figures["float32"].hardened == pytest.approx(0, abs=1e-3)
    assert figures["float32"].status == "kept"
    assert 1e-4 < (figures["bfloat16"].base or 0) < 0.05
    assert figures["gguf-f32"].status == "skipped"


def test_what_cannot_be_measured_is_skipped_with_a_reason(
    tmp_path: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, name, command in (
        ("llama_cpp", "q8_0", "pip install llama-cpp-python"),
        ("bitsandbytes", "nf4", "pip install 'specdef-cli[deploy]'"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        absent = one(TINY_LLAMA, TINY_LLAMA, tokens, name)
        assert (absent.status, absent.note) == ("skipped", f"not installed: {command}")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert "of memory are free" in one(TINY_LLAMA, TINY_LLAMA, tokens, "float32").note
    monkeypatch.setattr(formats.shutil, "which", lambda _: None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    assert "compiler" in one(TINY_LLAMA, TINY_LLAMA, tokens, "compile").note


def test_a_base_that_breaks_by_itself_says_nothing_of_the_hardening(
    fold: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    # The fold stands for a base with such outliers.
    figure = one(fold, shutil.copytree(fold, tmp_path / "copy"), tokens, "float16")
    assert (figure.status, figure.base, figure.hardened) == ("skipped", None, None)
    assert "base itself" in figure.note


@pytest.mark.parametrize(
    ("difference", "expected"),
    [(0.0, "kept"), (0.009, "kept"), (-0.009, "kept"), (0.02, "degraded"), (-0.02, "degraded"), (0.68, "degraded"),
     (0.70, "broken"), (None, "broken")],
)  # fmt: skip
def test_the_limits_of_a_loss(difference: float | None, expected: str) -> None:
    assert judge("loss", 2.0, None if difference is None else 2.0 + difference) == expected


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecDefError, match="'int7'"):
        measure_formats(open_model(TINY_LLAMA), open_model(TINY_LLAMA), None, ["int7"])
    assert chosen_formats(None) == DEFAULT_FORMATS
    assert chosen_formats(("all", "nf4")) == tuple(FORMATS)
    assert chosen_formats(("none", "none")) == ()
    for beside in ("nf4", "all"):
        with pytest.raises(WrongUsage, match=f"none stands beside {beside}"):
            chosen_formats(("none", beside))
    assert chosen_formats(("nf4", "nf4")) == ("nf4",)
    with pytest.raises(SpecDefError, match="5 tokens"):
        token_batch(TINY_LLAMA, "short", length=128)
    bare = write_case("llama", tmp_path / "bare")
    with pytest.raises(SpecDefError, match="no tokenizer"):
        token_batch(bare, "text")


@pytest.mark.slow
def test_a_compiled_fold_keeps_its_loss(fold: Path, tokens: torch.Tensor) -> None:
    figure = one(TINY_LLAMA, fold, tokens, "compile")
    if figure.status == "skipped":
        pytest.skip(figure.note)
    assert figure.status == "kept"
    assert figure.hardened == pytest.approx(one(TINY_LLAMA, fold, tokens, "float32").base, abs=1e-4)
