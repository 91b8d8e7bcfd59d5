"""The JSON Schemas of the files that specdef writes, for programs that validate: generated from the definitions.

python docs/generators/json_schemas.py    # `make schema`: writes them again
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from specdef_cli.certify import CERTIFICATE_NAME
from specdef_cli.certify.certificate import CERTIFICATE_RECORD
from specdef_cli.checkpoint.manifest import MANIFEST_NAME, manifest_record
from specdef_cli.report.document import REPORT_NAME, ReportDocument

_PACKAGE = Path(__file__).parents[2] / "specdef_cli"

SCHEMA_FILES: Mapping[str, Path] = {
    MANIFEST_NAME: _PACKAGE / "checkpoint/schema.json",
    REPORT_NAME: _PACKAGE / "report/schema.json",
    CERTIFICATE_NAME: _PACKAGE / "certify/schema.json",
}
"""Where the package ships the schema of each file."""


class _Written(GenerateJsonSchema):
    """Describes what is written: every key is there, and others may join them."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return True

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        described = {**super().dataclass_schema(schema), "description": _plain(schema["cls"].__doc__)}
        for cls in reversed(schema["cls"].__mro__):
            for name, text in _attributes(cls).items():
                described["properties"][name]["description"] = text
        return described

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


class _WrittenFinite(_Written):
    """As above, of a file in which a number that is not finite is null."""

    def float_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": ["number", "null"]}


def _plain(text: str) -> str:
    """The first paragraph of some documentation, without the marks that pages are made from."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.sub(r"(?::\w+:)?`+~?([^`]+)`+", r"\1", paragraph)


def _attributes(cls: type) -> dict[str, str]:
    """The texts below the fields of a class, which pydantic reads of its own models alone."""
    if not dataclasses.is_dataclass(cls):
        return {}
    described = {}
    for field, below in pairwise(ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body):  # type: ignore[attr-defined]
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(text))):
                described[name] = _plain(text.replace("``None``", "null"))
    return described


def schema_text(name: str) -> str:
    """The schema of one of :data:`SCHEMA_FILES`, as text."""
    definitions: dict[str, tuple[TypeAdapter[Any], type[_Written]]] = {
        MANIFEST_NAME: (manifest_record(), _Written),
        REPORT_NAME: (TypeAdapter(ReportDocument), _Written),
        CERTIFICATE_NAME: (CERTIFICATE_RECORD, _WrittenFinite),
    }
    definition, generator = definitions[name]
    schema = definition.json_schema(by_alias=True, mode="serialization", schema_generator=generator)
    described = {"$schema": GenerateJsonSchema.schema_dialect, **schema}
    return json.dumps(described, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, path in SCHEMA_FILES.items():
        path.write_text(schema_text(name), encoding="utf-8")
