"""The schemas that the package ships are those of the files that it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from typing import Any

import jsonschema
import pytest

from specdef_cli.certify import CERTIFICATE_NAME
from specdef_cli.certify.card import AttackFigure, Resistance
from specdef_cli.certify.certificate import Certificate, Claim, Provenance
from specdef_cli.certify.curvature import Curvature, CurvatureFigures
from specdef_cli.certify.formats import FormatFigure
from specdef_cli.certify.function import FunctionFigures, LayerSpectrum, SpectrumFigures
from specdef_cli.checkpoint.changes import ScaledChannels, ScaledModule
from specdef_cli.checkpoint.manifest import MANIFEST_NAME
from specdef_cli.hardening.verify import OutputComparison
from tests.checkpoint.test_manifest import MANIFEST
from tests.commands import REPOSITORY

WRITER = runpy.run_path(str(REPOSITORY / "docs/generators/json_schemas.py"))
SCHEMA_FILES, schema_text = WRITER["SCHEMA_FILES"], WRITER["schema_text"]
CURVATURE = CurvatureFigures(Curvature(-3.0, 1e-4, True, 20, 10), "model.layers.1", 0.6)
CERTIFICATE = Certificate(
    format=3,
    holds=False,
    specdef_version="0.1.0",
    model="hardened",
    base="base",
    provenance=Provenance("2026-01-01T00:00:00+00:00", {"python": "3.11"}, "Linux-x86_64", "cpu", 0, {"a": "00"}),
    claims=(Claim("function", False, "It differs."), Claim("curvature", None, "Not measured.")),
    function=FunctionFigures(OutputComparison(math.nan, math.inf, 0.1, 1.0, False), 2.0, None, 1.0, ("a",), True),
    spectrum=SpectrumFigures((LayerSpectrum("o_proj", (2.0,), (math.inf,)),), 0, (), 0),
    curvature=(CURVATURE, dataclasses.replace(CURVATURE, block=None)),
    deployment=(FormatFigure("int8", "bitsandbytes", "loss", 2.0, None, "broken"),),
    resistance=Resistance("m", "d", "10 steps", (AttackFigure("full", "none", 1e-3, None, 0.5, "slowed"),)),
)
SCALED = ScaledModule(
    "lm_head", "head", "e.weight", "lm_head", (8, 4), None, ScaledChannels(0, (1,), (3,), 4), None, "embed"
)
WRITTEN = {
    MANIFEST_NAME: dataclasses.replace(MANIFEST, scaled=(SCALED,)).to_json(),
    CERTIFICATE_NAME: CERTIFICATE.to_json(),
}


@pytest.mark.parametrize("name", SCHEMA_FILES)
def test_a_schema_is_what_the_code_writes(name: str) -> None:
    """`make schema` writes them."""
    text = SCHEMA_FILES[name].read_text(encoding="utf-8")
    assert schema_text(name) == text
    jsonschema.Draft202012Validator.check_schema(json.loads(text))


def strict_json(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(token)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_file_is_of_its_schema(name: str) -> None:
    """Every field of every part is there and described; one less or of another type is told."""
    data = strict_json(WRITTEN[name])
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILES[name].read_text(encoding="utf-8")))
    validator.validate(data)
    for key, value in list(data.items()):
        del data[key]
        assert not validator.is_valid(data), key
        data[key] = 3.5 if isinstance(value, dict | list) else {}
        assert not validator.is_valid(data), key
        data[key] = value


def test_a_certificate_says_format_and_verdict_first() -> None:
    data = strict_json(CERTIFICATE.to_json())
    assert list(data)[:3] == ["format", "holds", "specdef_version"]
    assert data["function"]["outputs"]["max_abs"] is data["spectrum"]["layers"][0]["measured"][0] is None
