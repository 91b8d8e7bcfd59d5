"""The engines' rows on a real pretrained model, fetched by ``make real-models``; without it these tests are skipped."""

from __future__ import annotations

import pydoc_data.topics
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdef_cli.certify.deployment import FORMATS, Trial, measure_deployment, measure_format, token_batch
from specdef_cli.certify.deployment.tools import missing

SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
ENGINES = [
    name
    for name, row in FORMATS.items()
    if row.tool in {"bitsandbytes", "torchao", "llama.cpp"} and "/" not in name  # the settings of llama.cpp apart
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`make real-models` fetches the model"),
]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return token_batch(SMOLLM2, "\n".join(pydoc_data.topics.topics.values())[5_000:], sequences=2, length=256)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with the gains of the norms before its MLPs scaled by 2^12: it loads everywhere."""
    out = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(SMOLLM2, out)
    for path in out.glob("*.safetensors"):
        weights = load_file(path)
        for name, weight in weights.items():
            if name.endswith("post_attention_layernorm.weight"):
                weights[name] = weight * 2.0**12
        save_file(weights, path, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_costs_the_base_little_and_sees_a_damaged_model(
    name: str, damaged: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    if missing(FORMATS[name].tool):
        pytest.skip(missing(FORMATS[name].tool))
    plain = measure_format(Trial(SMOLLM2, SMOLLM2, tmp_path, tokens), "float32").value
    figure = measure_deployment(SMOLLM2, damaged, tokens, [name])[0]
    assert not figure.simulated
    assert plain is not None
    assert figure.base == pytest.approx(plain, abs=0.5)  # four bits cost a model of this size up to 0.4 nats
    assert figure.status in {"broken", "refused"}, figure
