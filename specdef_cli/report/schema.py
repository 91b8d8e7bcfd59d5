"""``schema.json``: the shape of ``report.json`` for programs that validate, generated from its definition.

python -m specdef_cli.report.schema    # writes the file again
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from specdef_cli.report.document import ReportDocument

SCHEMA_FILE = Path(__file__).with_name("schema.json")


class _Written(GenerateJsonSchema):
    """Describes what is written: every key is there, and others may join them."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return True

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        return {**super().dataclass_schema(schema), "description": _plain(schema["cls"].__doc__)}

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


def _plain(docstring: str) -> str:
    """The first paragraph, without the marks that documentation is made from."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.sub(r"(?::\w+:)?`+([^`]+)`+", r"\1", paragraph)


def schema_text() -> str:
    """The text of ``schema.json``."""
    schema = ReportDocument.model_json_schema(by_alias=True, mode="serialization", schema_generator=_Written)
    described = {"$schema": GenerateJsonSchema.schema_dialect, **schema}
    return json.dumps(described, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
