"""The engines' rows on a real pretrained model, fetched by ``make real-models``; without it these tests are skipped."""

from __future__ import annotations

import pydoc_data.topics
import shutil
from pathlib import Path

import pytest
import torch

from specdef_cli.certify.formats import FORMATS, measure_format, measure_formats
from specdef_cli.certify.tools import LLAMA_CPP, Trial, missing
from specdef_cli.model.inputs import token_batch
from specdef_cli.model.opened import open_model
from tests.commands import REPOSITORY, run_cli
from tests.consumer_tables import TABLES, generator
from tests.examples.test_consumer_rows import one, rows
from tests.hardening.mutations import edit_tensors

SMOLLM2 = REPOSITORY / "models" / "smollm2-135m-instruct"
CONVERTED = REPOSITORY / "models" / "tools" / "llama.cpp"
"""Where `make real-tools` puts llama.cpp's converter."""

ENGINES = [name for name, row in FORMATS.items() if row.tool in {"bitsandbytes", "torchao", "llama.cpp"}]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`make real-models` fetches the model"),
]


@pytest.fixture(autouse=True)
def converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's converter, where `make real-tools` has put it."""
    if CONVERTED.is_dir():
        monkeypatch.setenv(LLAMA_CPP, str(CONVERTED))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return token_batch(SMOLLM2, "\n".join(pydoc_data.topics.topics.values())[5_000:], sequences=2, length=256)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with the gains of the norms before its MLPs scaled by 2^12: it loads everywhere."""
    out = shutil.copytree(SMOLLM2, tmp_path_factory.mktemp("damaged") / "model")

    def scale(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.endswith("post_attention_layernorm.weight"):
                weights[name] = weights[name] * 2.0**12

    for path in out.glob("*.safetensors"):
        edit_tensors(out, scale, path.name)
    return out


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_costs_the_base_little_and_sees_a_damaged_model(
    name: str, damaged: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    if missing(FORMATS[name].tool):
        pytest.skip(missing(FORMATS[name].tool))
    plain = measure_format(Trial(open_model(SMOLLM2), open_model(SMOLLM2), tmp_path, tokens), FORMATS["float32"]).value
    figure = measure_formats(open_model(SMOLLM2), open_model(damaged), tokens, [name])[0]
    if figure.status == "skipped":
        pytest.skip(figure.note)  # the tool has no kernel for this machine
    assert plain is not None
    assert figure.base == pytest.approx(plain, abs=0.8)  # four bits cost a model of this size up to 0.7 nats
    assert figure.status in {"broken", "refused"}, figure


WAYS = {"fold": (), "bfloat16": ("--profile", "bfloat16")}
"""Ways of hardening whose cells are measured again, by the name of their column in the table."""

CELLS = [
    (way, name)
    for way in WAYS
    for name in ("float32", "static-cache", "float16", "nf4", "torchao-int8", "gguf-f32", "gguf-f16/converter", "merge")
]


@pytest.fixture(scope="module")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model hardened by the command, each way."""
    root = tmp_path_factory.mktemp("hardened")
    for way, options in WAYS.items():
        done = run_cli("harden", SMOLLM2, "--method", "fold", *options, "--out", root / way, "--quiet")
        assert done.code == 0, done.stderr
    return {way: root / way for way in WAYS}


@pytest.mark.parametrize(("way", "name"), CELLS)
def test_a_cell_of_the_table_comes_out_as_it_stands_there(
    way: str, name: str, hardened: dict[str, Path], tokens: torch.Tensor, tmp_path: Path
) -> None:
    row = rows.ROWS[name]
    if reason := rows.missing(row.tool):
        pytest.skip(reason)
    table = generator("tools").read_table((TABLES / f"consumers-{SMOLLM2.name}.md").read_text(encoding="utf-8"))
    figure = one(hardened[way], tokens[:, :128], name, tmp_path, SMOLLM2)
    assert figure.verdict == table.verdicts[row.tool, row.description][way], figure
