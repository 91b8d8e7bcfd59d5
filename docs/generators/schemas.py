"""The page ``reference/schemas.md``: the JSON Schemas of the files that specdef writes, as the package ships them."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "reference/schemas.md"
MODULES = "python.md#specdef_cli."
ROOT = Path(__file__).parents[2]
SCHEMAS = {
    "specdef.json": "specdef_cli/checkpoint/schema.json",
    "report.json": "specdef_cli/report/schema.json",
    "certificate.json": "specdef_cli/certify/schema.json",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those that are built."""
    files.append(File.generated(config, PAGE, content=schemas_page()))
    return files


def schemas_page() -> str:
    """The schemas, each in a block of its own."""
    return "\n".join(
        (
            "# Files",
            "",
            "| file | written by | what it is |",
            "|---|---|---|",
            f"| `specdef.json` | `harden` | the manifest: [`Manifest`]({MODULES}checkpoint.manifest.Manifest) |",
            "| `report.json` | `attack` | every run and every finding |",
            "| `curves.csv` | `attack` | one row for each evaluation of each run |",
            "| `certificate.json` | `certify` | claims, figures, hashes: "
            f"[`Certificate`]({MODULES}certify.certificate.Certificate) |",
            "",
            *(line for name, path in SCHEMAS.items() for line in _schema(name, path)),
        )
    )


def _schema(name: str, path: str) -> tuple[str, ...]:
    return (
        f"## {name}",
        "",
        f'??? note "JSON Schema (`{path}`)"',
        "",
        "    ```json",
        *(f"    {line}" for line in (ROOT / path).read_text(encoding="utf-8").splitlines()),
        "    ```",
        "",
    )
